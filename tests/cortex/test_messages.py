"""Anthropic Messages through the gateway, over fake neurons: bytes pass, errors and heartbeats are of the dialect."""

import asyncio
import json
import logging

import orjson
import pytest
from answers import MESSAGES_ANSWER, MESSAGES_STREAM
from fake_node import FakeNode, Line, Received, error
from gateway_rig import rig

from cortex import event_stream
from cortex.config import ModelProfile, Timeouts
from cortex.wire.node import ModelState

BODY = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
STREAM = BODY | {"stream": True}
PROFILE = ModelProfile(id="m", source="/weights")
MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"


async def test_bodies_and_answers_go_through_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cortex.request")
    neuron = FakeNode().ready("m")
    async with rig(neuron) as gateway:
        whole = await gateway.call("POST", MESSAGES, BODY).end()
        streamed = await gateway.call("POST", MESSAGES, STREAM).end()
        count = await gateway.call("POST", COUNT, STREAM).end()
        for name, tokens in (("prompt", 14), ("completion", 4), ("cached", 6)):
            labels = {"model": "m", "node": "a", "dialect": "anthropic-messages"}
            assert gateway.metric(f"cortex_{name}_tokens_total", **labels) == tokens
    assert whole.body == MESSAGES_ANSWER
    assert streamed.body == b"".join(MESSAGES_STREAM)
    assert (count.headers["content-type"], count.body) == ("application/json", b'{"input_tokens":7}')
    assert [received.path for received in neuron.requests] == [MESSAGES, MESSAGES, COUNT]
    assert neuron.requests[0].body == orjson.dumps(BODY)
    assert [record.fields["finish"] for record in caplog.records] == ["end_turn", "end_turn", ""]  # type: ignore[attr-defined]


async def test_names_that_nothing_else_answers_to_go_by_the_longest_prefix() -> None:
    neuron = FakeNode().ready("m", "n", "claude-local")
    prefixes, models = {"claude-": "m", "claude-haiku": "n"}, (PROFILE, ModelProfile(id="n", source="/w"))
    async with rig(neuron, models=models, prefixes=prefixes, aliases={"claude-opus": "n"}) as gateway:
        for name in ("claude-sonnet-5", "claude-haiku-4-5", "claude-opus", "claude-local"):
            assert (await gateway.call("POST", MESSAGES, BODY | {"model": name}).end()).status == 200
        assert (await gateway.call("POST", MESSAGES, BODY | {"model": "claude"}).end()).status == 404
        assert (await gateway.call("GET", "/v1/models/claude-haiku-x").end()).json()["alias_of"] == "n"
        listed = (await gateway.call("GET", "/v1/models").end()).json()["data"]
        theirs = await gateway.call("GET", "/v1/models", headers={"anthropic-version": "2023-06-01"}).end()
    assert [orjson.loads(received.body)["model"] for received in neuron.requests] == ["m", "n", "n", "claude-local"]
    assert [model["id"] for model in listed] == ["claude-local", "m", "n", "claude-opus"]
    assert [model["id"] for model in theirs.json()["data"]] == [model["id"] for model in listed]
    assert theirs.json()["last_id"] == "claude-opus"
    assert set(theirs.json()["data"][0]) == {
        "type", "id", "display_name", "created_at", "lifecycle", "max_input_tokens", "max_tokens"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("body", "status", "kind", "code"),
    [
        (b"{", 400, "invalid_request_error", "invalid_json"),
        (b"{}", 400, "invalid_request_error", "missing_required_parameter"),
        (b'{"model": 5}', 400, "invalid_request_error", "invalid_type"),
        (b'{"model": "nobody"}', 404, "not_found_error", "model_not_found"),
        (b'{"model": "cold"}', 529, "overloaded_error", "no_node"),
        (b'{"model": "m", "pad": "' + b"x" * 4096 + b'"}', 413, "request_too_large", "request_too_large"),
    ],
)
@pytest.mark.parametrize("path", [MESSAGES, COUNT])
async def test_errors_are_in_the_dialect(path: str, body: bytes, status: int, kind: str, code: str) -> None:
    cold = ModelProfile(id="cold", source="/w", memory_bytes=1 << 60)
    async with rig(FakeNode().ready("m"), models=(cold,), max_body_bytes=2048) as gateway:
        call = await gateway.call("POST", path, body).end()
    assert call.status == status
    assert call.json()["type"] == "error"
    assert call.json()["request_id"] == call.headers["request-id"]
    assert (call.json()["error"]["type"], call.json()["error"]["details"]["error_code"]) == (kind, code)
    assert ("retry-after" in call.headers) == (status == 529)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", MESSAGES, 405), ("POST", "/v1/messages/batches", 404), ("PATCH", COUNT, 405), ("POST", "/v1/mess", 404)],
)
async def test_paths_that_are_not_there(method: str, path: str, status: int) -> None:
    async with rig(FakeNode().ready("m")) as gateway:
        call = await gateway.call(method, path).end()
    assert call.status == status
    assert ("type" in call.json()) == path.startswith(MESSAGES)


async def test_a_node_without_the_dialect_is_not_tried() -> None:
    old, new = FakeNode("a", dialects=("openai-completions",)).ready("m"), FakeNode("b").ready("m")
    async with rig(old, new) as gateway:
        for _ in range(4):
            assert (await gateway.call("POST", MESSAGES, BODY).end()).status == 200
    assert old.requests == []
    async with rig(FakeNode(dialects=("openai-completions",)).ready("m")) as gateway:
        assert (await gateway.call("POST", MESSAGES, BODY).end()).status == 529


@pytest.mark.parametrize("stream", [False, True])
async def test_a_nodes_overload_goes_to_another_replica(stream: bool) -> None:
    failure = b'{"type":"error","error":{"type":"overloaded_error","message":"full","details":{"error_code":"x"}}}'

    async def full(received: Received, line: Line) -> None:
        await line.reply(529, failure, "retry-after: 3")

    first, second = FakeNode("a", script=full).ready("m"), FakeNode("b").ready("m")
    async with rig(first, second) as gateway:
        assert (await gateway.call("POST", MESSAGES, BODY | {"stream": stream}).end()).status == 200
        second.script = full
        call = await gateway.call("POST", MESSAGES, BODY | {"stream": stream}).end()
    assert (call.status, call.body, call.headers["retry-after"]) == (529, failure, "3")


async def test_a_node_that_lost_the_model_is_believed_in_this_dialect_too() -> None:
    async def gone(received: Received, line: Line) -> None:
        neuron.script = FakeNode().script
        details = {"type": "not_found_error", "message": "no", "details": {"error_code": "model_not_found"}}
        await line.reply(404, orjson.dumps({"type": "error", "error": details}))

    neuron = FakeNode(script=gone).ready("m")
    async with rig(neuron, models=(PROFILE,)) as gateway:
        assert (await gateway.call("POST", MESSAGES, BODY).end()).status == 200
    assert [spec.id for spec in neuron.loads] == ["m"]


@pytest.mark.parametrize("how", ["cut", "end early", "stall"])
async def test_a_broken_stream_ends_in_an_error_event(how: str) -> None:
    async def script(received: Received, line: Line) -> None:
        await line.start_stream()
        await line.chunk(b"".join(MESSAGES_STREAM[:3]) + b'event: content_block_delta\ndata: {"half')
        match how:
            case "cut":
                line.cut()
            case "end early":
                await line.end()
            case "stall":
                await asyncio.sleep(60)

    async with rig(FakeNode(script=script).ready("m"), timeouts=Timeouts(stall_s=0.3)) as gateway:
        call = await gateway.call("POST", MESSAGES, STREAM).end()
    begun = b"".join(MESSAGES_STREAM[:3])
    assert call.body.startswith(begun)
    name, data = call.body.removeprefix(begun).strip().split(b"\ndata: ")
    assert name == b"event: error"
    kind, code = ("timeout_error", "upstream_timeout") if how == "stall" else ("api_error", "upstream_error")
    assert json.loads(data)["error"]["type"] == kind
    assert json.loads(data)["error"]["details"]["error_code"] == code


async def test_a_nodes_error_event_is_the_only_one() -> None:
    failure = b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"lost"}}\n\n'

    async def script(received: Received, line: Line) -> None:
        await line.start_stream()
        await line.chunk(MESSAGES_STREAM[0] + failure)
        await line.end()

    async with rig(FakeNode(script=script).ready("m")) as gateway:
        assert (await gateway.call("POST", MESSAGES, STREAM).end()).body == MESSAGES_STREAM[0] + failure


async def test_a_silence_is_filled_with_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "HOLD_HEADERS_S", 0.01)
    monkeypatch.setattr(event_stream, "HEARTBEAT_INTERVAL_S", 0.01)
    neuron = FakeNode()
    loading = asyncio.Event()

    async def load(spec: object) -> object:
        await loading.wait()
        return neuron.ready("m").models["m"]

    neuron.load = load  # type: ignore[assignment]
    async with rig(neuron, models=(PROFILE,)) as gateway:
        call = gateway.call("POST", MESSAGES, STREAM)
        await call.until(lambda call: len(call.chunks) > 2)
        loading.set()
        await call.end()
    ping = b'event: ping\ndata: {"type":"ping"}\n\n'
    assert call.body.startswith(ping * 3)
    assert call.body.endswith(MESSAGES_STREAM[-1])
    assert neuron.models["m"].state is ModelState.READY


async def test_an_error_after_the_first_ping_has_the_nodes_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "HOLD_HEADERS_S", 0.0)
    refuse = error(400, "context_length_exceeded")

    async def late(received: Received, line: Line) -> None:
        await asyncio.sleep(0.05)
        await refuse(received, line)

    async with rig(FakeNode(script=late).ready("m")) as gateway:
        call = await gateway.call("POST", MESSAGES, STREAM).end()
    assert call.status == 200
    event = call.body.strip().split(b"\n\n")[-1]
    assert json.loads(event.split(b"data: ")[1])["error"]["message"] == "error context_length_exceeded"
