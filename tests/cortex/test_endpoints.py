"""The gateway through its public interface, in process, over fake neurons."""

import asyncio
import json
import time

import msgspec
import orjson
import pytest
from answers import CHAT_ANSWER, CHAT_STREAM, MESSAGES_STREAM, RESPONSES_STREAM
from daemons import free_port
from fake_node import FakeNode, Line, Received, Script, answer, error
from gateway_rig import CHAT, STREAM, rig, until
from hypothesis import given, settings
from hypothesis import strategies as st

from cortex import event_stream
from cortex.config import ModelProfile, Polling, Price, Timeouts
from cortex.wire.node import Capability, ModelSpec, ModelState, ModelStatus, SamplingDefaults

PROFILE = ModelProfile(id="m", source="/weights")
GIB = 1024**3


async def test_a_body_goes_through_as_it_is_and_the_answer_too() -> None:
    neuron = FakeNode().ready("m")
    body = b'{ "model" : "m",\n "messages":[{"role":"user","content":"\\u00e9 \xc3\xa9 "}], "x": 1.50 }'
    async with rig(neuron) as gateway:
        call = await gateway.call("POST", "/v1/chat/completions", body, {"x-request-id": "abc-1"}).end()
    assert (call.status, call.body) == (200, CHAT_ANSWER)
    assert call.headers["x-request-id"] == "abc-1"
    assert neuron.requests[0].body == body
    assert neuron.requests[0].headers["x-request-id"] == "abc-1"
    assert neuron.requests[0].headers["x-cortex-report-usage"] == "1"


@pytest.mark.parametrize(
    ("path", "sse_events"), [("/v1/chat/completions", CHAT_STREAM), ("/v1/responses", RESPONSES_STREAM)]
)
async def test_a_stream_goes_through_as_it_is(path: str, sse_events: tuple[bytes, ...]) -> None:
    async with rig(FakeNode().ready("m")) as gateway:
        call = await gateway.call("POST", path, STREAM).end()
        assert call.status == 200
        assert call.headers["content-type"].startswith("text/event-stream")
        assert call.body == b"".join(sse_events)
        assert gateway.in_flight == 0


async def test_an_alias_is_spliced_and_nothing_else_changes() -> None:
    neuron = FakeNode().ready("m/long-name")
    async with rig(neuron, models=(ModelProfile(id="m/long-name", source="/w"),), aliases={"al": "m/long-name"}) as r:
        call = r.call("POST", "/v1/chat/completions", b'{"a": {"model": "al"}, "model" :  "al" , "b":[1, 2]}')
        assert (await call.end()).status == 200
        assert neuron.requests[0].body == b'{"a": {"model": "al"}, "model" :  "m/long-name" , "b":[1, 2]}'


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=12), st.booleans())
def test_any_split_of_the_bytes_gives_the_same_stream(sizes: list[int], as_http_chunks: bool) -> None:
    """Random splits, both of the SSE bytes into HTTP chunks and of the HTTP bytes into TCP segments."""
    payload = b"".join(CHAT_STREAM)

    async def script(received: Received, line: Line) -> None:
        await line.start_stream()
        raw = b"%x\r\n%s\r\n0\r\n\r\n" % (len(payload), payload)
        at, piece_number = 0, 0
        data = payload if as_http_chunks else raw
        while at < len(data):
            piece = data[at : at + sizes[piece_number % len(sizes)]]
            await (line.chunk(piece) if as_http_chunks else line.send(piece))
            at, piece_number = at + len(piece), piece_number + 1
            await asyncio.sleep(0)
        if as_http_chunks:
            await line.end()

    async def story() -> None:
        async with rig(FakeNode(script=script).ready("m")) as gateway:
            call = await gateway.chat(stream=True).end()
            assert call.body == payload
            assert all(chunk.endswith(b"\n\n") for chunk in call.chunks), "whole SSE events only"

    asyncio.run(story())


# ------------------------------------------------------------------ wrong requests


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (b"", 400, "invalid_json", None),
        (b"{", 400, "invalid_json", None),
        (b"[]", 400, "invalid_json", None),
        (b'"x"', 400, "invalid_json", None),
        (b"{}", 400, "missing_required_parameter", "model"),
        (b'{"model": ""}', 400, "missing_required_parameter", "model"),
        (b'{"model": 5}', 400, "invalid_type", "model"),
        (b'{"model": null}', 400, "invalid_type", "model"),
        (b'{"model": "m", "stream": "yes"}', 400, "invalid_type", "stream"),
        (b'{"model": "nobody"}', 404, "model_not_found", "model"),
        (b'{"model": "m", "pad": "' + b"x" * 4096 + b'"}', 413, "request_too_large", None),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
async def test_a_wrong_request_gets_the_reason(
    path: str, body: bytes, status: int, code: str, param: str | None
) -> None:
    neuron = FakeNode().ready("m")
    async with rig(neuron, max_body_bytes=2048) as gateway:
        call = await gateway.call("POST", path, body).end()
        assert call.status == status
        assert set(call.json()["error"]) == {"message", "type", "param", "code"}
        assert call.json()["error"]["code"] == code
        assert call.json()["error"]["param"] == param
        assert call.headers["x-request-id"].startswith("req_")
        assert not neuron.requests
        text = gateway.gateway.metrics.registry
        labels = {label for family in text.collect() for sample in family.samples for label in sample.labels.values()}
        assert "nobody" not in labels


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/v1/nothing", 404, None),
        ("POST", "/nothing", 404, None),
        ("POST", "/", 405, "GET, HEAD, OPTIONS"),
        ("HEAD", "/nothing", 404, None),
        ("OPTIONS", "/nothing", 404, None),
        ("GET", "/v1/models/", 404, None),
        ("GET", "/v1/chat/completions", 405, "POST, OPTIONS"),
        ("HEAD", "/v1/chat/completions", 405, "POST, OPTIONS"),
        ("DELETE", "/v1/models", 405, "GET, HEAD, OPTIONS"),
        ("OPTIONS", "/v1/responses", 204, "POST, OPTIONS"),
        ("OPTIONS", "/v1/models/m", 204, "GET, HEAD, OPTIONS"),
        ("HEAD", "/v1/models", 200, None),
        ("HEAD", "/health", 200, None),
        ("GET", "/version", 200, None),
        ("BREW", "/health", 405, "GET, HEAD, OPTIONS"),
    ],
)
async def test_every_method_and_path_has_an_answer(method: str, path: str, status: int, allow: str | None) -> None:
    async with rig(FakeNode().ready("m")) as gateway:
        call = await gateway.call(method, path).end()
        assert call.status == status
        assert call.headers.get("allow") == allow
        if method == "HEAD":
            assert call.body == b""
        elif status >= 400:
            assert call.json()["error"]["code"] in {"unknown_url", "method_not_allowed"}


@pytest.mark.parametrize("given", ["", "has space", "x" * 129, "new\tline", "né"])
async def test_an_unfit_request_id_is_replaced(given: str) -> None:
    async with rig(FakeNode().ready("m")) as gateway:
        call = await gateway.call("GET", "/version", b"", {"x-request-id": given}).end()
        assert call.headers["x-request-id"].startswith("req_")
        assert call.headers["request-id"] == call.headers["x-request-id"]


# ------------------------------------------------------------------ errors of a node


@pytest.mark.parametrize("stream", [False, True])
async def test_a_nodes_error_keeps_its_status_body_and_retry_after(stream: bool) -> None:
    neuron = FakeNode(script=error(400, "context_length_exceeded")).ready("m")
    async with rig(neuron) as gateway:
        call = await gateway.chat(stream=stream).end()
        assert call.status == 400
        assert call.json() == {
            "error": {"message": "error context_length_exceeded", "type": "t", "param": None,
                      "code": "context_length_exceeded"}
        }  # fmt: skip
        neuron.script = error(503, "device_worker_lost", "retry-after: 7")
        call = await gateway.chat(stream=stream).end()
        assert (call.status, call.headers["retry-after"]) == (503, "7")
        assert len(neuron.requests) == 2, "there is no other replica to try"
        assert gateway.in_flight == 0


async def test_an_error_that_is_not_json_gets_an_envelope() -> None:
    async def script(received: Received, line: Line) -> None:
        await line.reply(502, b"<html>bad</html>", content_type="text/html")

    async with rig(FakeNode(script=script).ready("m")) as gateway:
        call = await gateway.chat().end()
        assert call.status == 502
        assert "status 502" in call.json()["error"]["message"]


@pytest.mark.parametrize("how", ["cut", "reset", "end early", "stall", "garbage"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
async def test_a_broken_stream_ends_in_an_error_of_its_dialect(how: str, path: str) -> None:
    begun = CHAT_STREAM[:2] if path == "/v1/chat/completions" else RESPONSES_STREAM[:2]

    async def script(received: Received, line: Line) -> None:
        await line.start_stream()
        for sse_event in begun:
            await line.chunk(sse_event)
        await line.chunk(b'data: {"half')
        match how:
            case "cut":
                line.cut()
            case "reset":
                await asyncio.sleep(0.05)  # what was sent before a reset may be lost with it
                line.reset()
            case "end early":
                await line.end()
            case "garbage":
                await line.send(b"not a chunk\r\n")
            case "stall":
                await asyncio.sleep(60)

    async with rig(FakeNode(script=script).ready("m"), timeouts=Timeouts(stall_s=0.3)) as gateway:
        call = await gateway.call("POST", path, STREAM).end()
        assert call.status == 200
        whole = b"".join(begun)
        assert call.body.startswith(whole)
        ending = call.body.removeprefix(whole)
        expected = "upstream_timeout" if how == "stall" else "upstream_error"
        if path == "/v1/chat/completions":
            assert ending.startswith(b"data: ")
            assert json.loads(ending[6:])["error"]["code"] == expected
            assert b"[DONE]" not in call.body
        else:
            first, second = (block.split(b"\ndata: ") for block in ending.strip().split(b"\n\n"))
            assert first[0] == b"event: error"
            assert second[0] == b"event: response.failed"
            failure, failed = json.loads(first[1]), json.loads(second[1])
            assert (failure["sequence_number"], failed["sequence_number"]) == (2, 3)
            assert failure["code"] == failure["error"]["code"] == expected
            assert failed["response"]["id"] == "resp_1"
            assert failed["response"]["status"] == "failed"
            assert failed["response"]["error"]["code"] == "server_error"
        status = "504" if how == "stall" else "502"
        dialect = "openai-chat" if path == "/v1/chat/completions" else "openai-responses"
        assert gateway.metric("cortex_requests_total", model="m", node="a", dialect=dialect, status=status) == 1
        assert gateway.in_flight == 0


@pytest.mark.parametrize(
    ("path", "sse_events", "heartbeat"),
    [
        ("/v1/chat/completions", CHAT_STREAM, b": keep-alive\n\n"),
        ("/v1/responses", RESPONSES_STREAM, b": keep-alive\n\n"),
        ("/v1/messages", MESSAGES_STREAM, b'event: ping\ndata: {"type":"ping"}\n\n'),
    ],
)
async def test_a_silence_in_the_middle_is_filled_and_never_within_an_sse_event(
    path: str, sse_events: tuple[bytes, ...], heartbeat: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert event_stream.HOLD_HEADERS_S < 1
    assert event_stream.HEARTBEAT_INTERVAL_S <= 10
    monkeypatch.setattr(event_stream, "HEARTBEAT_INTERVAL_S", 0.02)
    heartbeats_seen = asyncio.Event()

    async def script(received: Received, line: Line) -> None:
        await line.start_stream()
        await line.chunk(sse_events[0] + sse_events[1][:9])
        await heartbeats_seen.wait()
        await line.chunk(sse_events[1][9:] + b"".join(sse_events[2:]))
        await line.end()

    async with rig(FakeNode(script=script).ready("m")) as gateway:
        call = gateway.call("POST", path, STREAM)
        await call.until(lambda call: call.chunks.count(heartbeat) >= 3)
        heartbeats_seen.set()
        await call.end()
    assert b"".join(chunk for chunk in call.chunks if chunk != heartbeat) == b"".join(sse_events)
    assert all(chunk.endswith(b"\n\n") for chunk in call.chunks)


async def test_a_stream_that_is_complete_may_lose_its_connection() -> None:
    async def script(received: Received, line: Line) -> None:
        await line.start_stream()
        for sse_event in CHAT_STREAM:
            await line.chunk(sse_event)
        line.cut()

    async with rig(FakeNode(script=script).ready("m")) as gateway:
        assert (await gateway.chat(stream=True).end()).body == b"".join(CHAT_STREAM)


async def test_a_nodes_own_error_sse_event_is_the_only_one() -> None:
    failure = b'data: {"error":{"message":"lost","type":"server_error","param":null,"code":"device_worker_lost"}}\n\n'

    async def script(received: Received, line: Line) -> None:
        await line.start_stream()
        await line.chunk(CHAT_STREAM[0] + failure)
        await line.end()

    async with rig(FakeNode(script=script).ready("m")) as gateway:
        assert (await gateway.chat(stream=True).end()).body == CHAT_STREAM[0] + failure


@pytest.mark.parametrize("how", ["cut", "short", "silent"])
async def test_a_broken_answer_is_an_error_and_never_half_a_body(how: str) -> None:
    async def script(received: Received, line: Line) -> None:
        if how != "silent":
            await line.head(200, "content-type: application/json", f"content-length: {len(CHAT_ANSWER)}")
            await line.send(CHAT_ANSWER[:-5])
            line.cut()
        await asyncio.sleep(60 if how == "silent" else 0)

    async with rig(FakeNode(script=script).ready("m"), timeouts=Timeouts(answer_s=0.2)) as gateway:
        call = await gateway.chat().end()
        assert call.status == (504 if how == "silent" else 502)
        assert call.json()["error"]["code"] == ("upstream_timeout" if how == "silent" else "upstream_error")
        assert gateway.in_flight == 0


async def test_a_streamed_request_that_is_not_streamed_back_is_an_error() -> None:
    async def script(received: Received, line: Line) -> None:
        await line.reply(200, CHAT_ANSWER)

    async with rig(FakeNode(script=script).ready("m")) as gateway:
        call = await gateway.chat(stream=True).end()
        assert call.status == 502


# ------------------------------------------------------------------ replicas


@pytest.mark.parametrize("how", ["refused", "reset", "503", "429"])
@pytest.mark.parametrize("stream", [False, True])
async def test_another_replica_is_tried_before_the_first_byte(how: str, stream: bool) -> None:
    async def reset(received: Received, line: Line) -> None:
        line.reset()

    first, second = FakeNode("a").ready("m"), FakeNode("b").ready("m")
    first.script = {"503": error(503, "x"), "429": error(429, "x")}.get(how, reset)
    async with first.serving(), second.serving(), rig(first, second, routing_policy="least_outstanding") as gateway:
        if how == "refused":
            # Its address is gone while the gateway still has it as up.
            state = gateway.gateway.fleet.state
            pool = gateway.gateway.service.pools["a"]
            pool._port = 1
            assert state.nodes["a"].up
        call = await gateway.chat(stream=stream).end()
        assert call.status == 200
        assert call.body == (b"".join(CHAT_STREAM) if stream else CHAT_ANSWER)
        assert (len(first.requests), len(second.requests)) == (0 if how == "refused" else 1, 1)
        reason = {"refused": "upstream_unreachable", "reset": "upstream_reset"}.get(how, "x")
        assert gateway.metric("cortex_upstream_retries_total", node="a", reason=reason) == 1
        assert gateway.metric("cortex_requests_total", model="m", node="b", dialect="openai-chat", status="200") == 1
        assert gateway.in_flight == 0


async def test_nothing_is_sent_twice_once_an_answer_has_begun() -> None:
    async def script(received: Received, line: Line) -> None:
        await line.start_stream()
        await line.chunk(CHAT_STREAM[0])
        await asyncio.sleep(0.05)
        line.reset()

    first, second = FakeNode("a", script=script).ready("m"), FakeNode("b", script=script).ready("m")
    async with rig(first, second) as gateway:
        call = await gateway.chat(stream=True).end()
        assert b'"code":"upstream_error"' in call.body
        assert len(first.requests) + len(second.requests) == 1


async def test_silence_is_not_sent_again() -> None:
    async def script(received: Received, line: Line) -> None:
        await asyncio.sleep(60)

    first, second = FakeNode("a", script=script).ready("m"), FakeNode("b").ready("m")
    async with rig(first, second, timeouts=Timeouts(first_byte_s=0.2)) as gateway:
        call = await gateway.chat(stream=True).end()
        assert call.status == 504
        assert not second.requests


async def test_a_burst_spreads_over_the_replicas() -> None:
    go = asyncio.Event()

    async def script(received: Received, line: Line) -> None:
        await go.wait()
        await answer(received, line)

    neurons = [FakeNode(name, script=script).ready("m") for name in "abcd"]
    async with rig(*neurons) as gateway:
        calls = [gateway.chat() for _ in range(40)]
        await until(lambda: sum(len(neuron.requests) for neuron in neurons) == 40)
        assert [len(neuron.requests) for neuron in neurons] == [10, 10, 10, 10]
        assert gateway.metric("cortex_in_flight_requests", node="a") == 10
        go.set()
        assert {(await call.end()).status for call in calls} == {200}
        assert gateway.in_flight == 0
        assert gateway.metric("cortex_in_flight_requests", node="a") == 0


async def test_a_node_that_lost_the_model_gets_it_again() -> None:
    neuron = FakeNode().ready("m")
    scripts = [error(404, "model_not_found"), answer]

    async def script(received: Received, line: Line) -> None:
        await scripts.pop(0)(received, line)

    neuron.script = script
    async with rig(neuron, models=(PROFILE,)) as gateway:
        assert (await gateway.chat().end()).status == 200
        assert [spec.id for spec in neuron.loads] == ["m"]


# ------------------------------------------------------------------ cold loads, seen from a client


async def test_a_stream_that_waits_for_a_load_has_headers_and_heartbeats_within_a_second() -> None:
    go = asyncio.Event()
    neuron = FakeNode()

    async def load(spec: object) -> object:
        await go.wait()
        return neuron.ready("m").models["m"]

    neuron.load = load  # type: ignore[assignment]
    async with rig(neuron, models=(PROFILE,)) as gateway:
        asked_at = time.monotonic()
        call = gateway.chat(stream=True)
        await call.until(lambda call: call.body)
        assert time.monotonic() - asked_at < 1.0
        assert call.body == b": loading m 0%\n\n"
        go.set()
        await call.end()
        assert call.data() == b"".join(sse_event for sse_event in CHAT_STREAM if not sse_event.startswith(b":"))


async def test_a_load_that_fails_late_is_an_error_in_the_stream() -> None:
    go = asyncio.Event()

    async def load(spec: object) -> object:
        await go.wait()
        return error(422, "does_not_fit")

    async with rig(FakeNode(load=load), models=(PROFILE,)) as gateway:  # type: ignore[arg-type]
        call = gateway.chat(stream=True)
        await call.until(lambda call: call.body)
        go.set()
        await call.end()
        assert json.loads(call.data()[6:])["error"]["code"] == "model_load_refused"


async def test_no_node_is_503_with_retry_after_and_nothing_is_denied_for_it() -> None:
    neuron = FakeNode()
    async with neuron.serving():
        pass  # its port is known, and closed
    async with rig(neuron, models=(PROFILE,)) as gateway:
        call = await gateway.chat().end()
        assert (call.status, call.json()["error"]["code"]) == (503, "no_node")
        assert int(call.headers["retry-after"]) >= 1
        unpolled = await gateway.chat(model="x").end()
        assert (unpolled.status, unpolled.json()["error"]["code"]) == (503, "no_node")


async def test_a_recovering_model_is_loaded_beside_what_is_elsewhere() -> None:
    first, second = FakeNode("a").ready("m"), FakeNode("b")
    first.models["m"] = msgspec.structs.replace(first.models["m"], state=ModelState.RECOVERING)
    async with rig(first, second, models=(PROFILE,)) as gateway:
        assert (await gateway.chat(stream=True).end()).status == 200
        assert not first.loads
        assert [load.id for load in second.loads] == ["m"]


async def test_a_recovering_model_is_503_where_no_other_node_has_free_memory() -> None:
    first, second = FakeNode("a").ready("m"), FakeNode("b", free_bytes=GIB).ready("other")
    first.models["m"] = msgspec.structs.replace(first.models["m"], state=ModelState.RECOVERING)
    profile = msgspec.structs.replace(PROFILE, memory_bytes=2 * GIB)
    async with rig(first, second, models=(profile,)) as gateway:
        call = await gateway.chat(stream=True).end()
        assert call.status == 503
        assert call.headers["retry-after"] == "5"
        assert not first.loads + second.loads


@pytest.mark.parametrize("dies", ["before", "with the request"])
async def test_a_model_whose_only_replica_is_dead_is_loaded_elsewhere_at_once(dies: str) -> None:
    async def reset(received: Received, line: Line) -> None:
        line.reset()

    first, second = FakeNode("a", script=reset).ready("m"), FakeNode("b")
    async with rig(first, second, models=(PROFILE,), polling=Polling(interval_s=60, timeout_s=3)) as gateway:
        await until(lambda: gateway.gateway.fleet.state.complete)
        if dies == "before":
            gateway.gateway.service.pools["a"]._port = free_port()  # where nothing listens
        call = await gateway.chat().end()
        assert (call.status, [load.id for load in second.loads]) == (200, ["m"])
        assert len(second.requests) == 1


async def test_a_model_that_no_other_node_can_load_is_503_and_not_denied_for_good() -> None:
    async def reset(received: Received, line: Line) -> None:
        line.reset()

    async def refuse(spec: ModelSpec) -> Script:
        return error(422, "source_not_found")

    first, second = FakeNode("a", script=reset).ready("m"), FakeNode("b", load=refuse)
    async with rig(first, second, models=(PROFILE,)) as gateway:
        call = await gateway.chat().end()
        assert (call.status, call.json()["error"]["code"]) == (503, "no_node")
        assert "retry-after" in call.headers


# ------------------------------------------------------------------ the catalogue and the rest


async def test_models_are_the_catalogue_and_what_nodes_have() -> None:
    first, second = FakeNode("a").ready("m", context_tokens=8192), FakeNode("b").ready("m", "extra")
    cold = ModelProfile(id="cold", source="/w", context_tokens=2048)
    async with rig(first, second, models=(PROFILE, cold), aliases={"gpt-4o": "m"}) as gateway:
        listed = (await gateway.call("GET", "/v1/models").end()).json()
        assert listed["object"] == "list"
        by_id = {model["id"]: model for model in listed["data"]}
        assert list(by_id) == ["cold", "extra", "m", "gpt-4o"]
        assert all(model["object"] == "model" and isinstance(model["created"], int) for model in by_id.values())
        assert by_id["cold"]["state"] == "available"
        assert by_id["cold"]["context_length"] == 2048
        assert by_id["m"]["context_length"] == 8192
        assert by_id["m"]["capabilities"] == ["chat"]
        assert not any("nodes" in model for model in listed["data"])
        full = (await gateway.call("GET", "/admin/models").end()).json()
        known = {model["id"]: model for model in full["data"]}
        assert [node["name"] for node in known["m"]["nodes"]] == ["a", "b"]
        assert by_id["gpt-4o"]["alias_of"] == "m"
        one = (await gateway.call("GET", "/v1/models/gpt-4o").end()).json()
        assert one == by_id["gpt-4o"]
        assert (await gateway.call("GET", "/v1/models/none").end()).status == 404


LENGTHS = ("context_length", "max_model_len", "max_input_tokens", "max_output_tokens")


async def test_models_have_the_fields_that_clients_look_for() -> None:
    neuron = FakeNode().ready("m", context_tokens=8192).ready("sees", "embeds")
    for name, capabilities in (("sees", (Capability.CHAT, Capability.VISION)), ("embeds", (Capability.EMBEDDINGS,))):
        neuron.models[name] = msgspec.structs.replace(neuron.models[name], capabilities=capabilities)
    profiles = (
        ModelProfile(id="m", source="/w", price=Price(0.05, 1.2, 0.0)),
        ModelProfile(id="cold", source="/w", price=Price(3, 15)),
    )
    async with rig(neuron, models=profiles, aliases={"claude-local": "m"}) as gateway:
        models = {model["id"]: model for model in (await gateway.call("GET", "/v1/models").end()).json()["data"]}
        theirs = await gateway.call("GET", "/v1/models/claude-local", headers={"anthropic-version": "2026-10-21"}).end()
    for name in ("m", "claude-local"):
        assert [models[name][field] for field in LENGTHS] == [8192] * 4
        assert models[name]["name"] == models[name]["display_name"] == name
        assert models[name]["modalities"] == {"input": ["text"], "output": ["text"]}
        prices = {"prompt": "0.00000005", "completion": "0.0000012", "input_cache_read": "0"}
        assert models[name]["pricing"] == prices
    assert models["sees"]["modalities"]["input"] == ["text", "image"]
    assert models["sees"]["architecture"] == {"input_modalities": ["text", "image"], "output_modalities": ["text"]}
    assert models["embeds"]["modalities"] == {"input": ["text"], "output": ["embeddings"]}
    assert models["sees"]["pricing"] is None
    assert models["cold"]["pricing"] == {"prompt": "0.000003", "completion": "0.000015"}
    for field in (*LENGTHS, "modalities", "architecture"):
        assert models["cold"][field] is None, "not known before a load"
    described = theirs.json()
    assert (described["type"], described["id"], described["display_name"]) == ("model", "claude-local", "claude-local")
    assert (described["max_input_tokens"], described["max_tokens"]) == (8192, 8192)


async def test_clients_see_neither_nodes_nor_paths() -> None:
    node = FakeNode("secret-node").ready("m")
    node.models["broken"] = ModelStatus(
        "broken", ModelState.FAILED, source="/srv/x", error="no file /srv/x/config.json"
    )
    profile = ModelProfile(id="m", source="/srv/m", sampling=SamplingDefaults(temperature=0.25))
    async with rig(node, models=(profile,), aliases={"other": "broken"}) as gateway:
        for path in ("/v1/models", "/v1/models/m", "/v1/models/broken", "/v1/models/other"):
            for headers in ({}, {"anthropic-version": "2023-06-01"}):
                call = await gateway.call("GET", path, headers=headers).end()
                assert call.status == 200
                assert b"secret-node" not in call.body
                assert b"/srv" not in call.body
        full = {model["id"]: model for model in (await gateway.call("GET", "/admin/models").end()).json()["data"]}
        assert full["broken"]["nodes"][0]["error"] == "no file /srv/x/config.json"
        assert full["m"]["sampling"] == {"temperature": 0.25}


async def test_the_operators_view_and_health() -> None:
    async with rig(FakeNode("a").ready("m"), FakeNode("b")) as gateway:
        health = (await gateway.call("GET", "/health").end()).json()
        assert health == {"state": "ready", "nodes_up": 2, "nodes": 2, "in_flight": 0, "degraded": []}
        nodes = (await gateway.call("GET", "/admin/fleet").end()).json()["nodes"]
        assert [node["name"] for node in nodes] == ["a", "b"]
        assert nodes[0]["devices"][0]["id"] == "cpu:0"
        assert nodes[0]["models"][0]["id"] == "m"


def test_the_fake_nodes_answers_are_as_the_tests_assume() -> None:
    assert orjson.loads(CHAT_ANSWER)["usage"]["prompt_tokens"] == 7
    assert CHAT["model"] == "m"
