"""The fast path: the plainest requests take it, with the same result, and a request that leaves it is answered."""

import asyncio
import json
import logging
from typing import Any

import pytest
from answers import CHAT_ANSWER
from asgi_call import Call
from fake_node import FakeNode, Line, Received, answer, error
from gateway_rig import CHAT, Rig, rig, until
from key_rig import KEY, ring

from cortex.access.keys import KeyRing, Limits, Principal
from cortex.config import Timeouts

LARGE = json.dumps({"choices": [{"message": {"content": "x" * 300_000}, "finish_reason": "stop"}]}).encode()
AUTHORIZED = {"authorization": f"Bearer {KEY}"}


INTERFACES = "asgi", "rsgi"

by_each = pytest.mark.parametrize("interface", INTERFACES)


class SlowPath:
    """Counts the requests of a gateway that go the slow path, for some of it at least."""

    def __init__(self, gateway: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        handle = gateway.gateway.handle

        async def counted(exchange: Any) -> None:
            self.count += 1
            await handle(exchange)

        monkeypatch.setattr(gateway.gateway, "handle", counted)


async def warm(gateway: Rig, **fields: Any) -> None:
    """Have a connection that waits for a request."""
    assert (await gateway.chat(**fields).end()).status == 200


async def observed(gateway: Rig, neuron: FakeNode, caplog: pytest.LogCaptureFixture, **request: Any) -> dict[str, Any]:
    """Send a request twice; return the response, log line and counters of the second."""
    await warm(gateway)
    neuron.requests.clear()
    caplog.clear()
    call = await gateway.call("POST", "/v1/chat/completions", **request).end()
    await until(lambda: gateway.metric("cortex_requests_total", **LABELS) >= 2)
    (record,) = (record for record in caplog.records if record.name == "cortex.request" and record.fields["id"] == "r2")
    fields = {name: value for name, value in record.fields.items() if name != "total_s"}
    assert record.fields["total_s"] > 0
    (received,) = neuron.requests
    counted = {name: gateway.metric(name, **LABELS) for name in COUNTERS}
    counted["durations"] = gateway.metric(
        "cortex_request_duration_seconds_count", **{k: v for k, v in LABELS.items() if k != "status"}
    )
    received_headers = {name: value for name, value in received.headers.items() if name != "host"}
    return {"status": call.status, "headers": call.headers, "body": call.body, "received": received_headers,
            "received_body": received.body, "log": fields, "counted": counted}  # fmt: skip


LABELS = {"model": "m", "node": "a", "dialect": "openai-chat", "status": "200"}
COUNTERS = ("cortex_requests_total",)


@pytest.mark.parametrize("alias", [False, True])
async def test_both_paths_have_the_same_result(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, alias: bool
) -> None:
    caplog.set_level(logging.INFO, "cortex")
    keys = ring((KEY, Principal("k", ("*",), priority=3)), anonymous=Principal())
    seen = []
    for interface in ("slow", *INTERFACES):
        neuron = FakeNode("a").ready("m")
        async with rig(neuron, keys=keys, aliases={"other": "m"}, interface=interface) as gateway:
            request = {"body": {**CHAT, "model": "other" if alias else "m"}}
            request["headers"] = {"x-request-id": "r2", **AUTHORIZED}
            seen.append(await observed(gateway, neuron, caplog, **request))
            slow = SlowPath(gateway, monkeypatch)
            assert (await gateway.call("POST", "/v1/chat/completions", **request).end()).status == 200
            assert slow.count == (interface == "slow")
            assert gateway.in_flight == 0
    assert seen[0] == seen[1] == seen[2]


@by_each
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {**CHAT}),
        ("/v1/completions", {"model": "m", "prompt": "Hi"}),
        ("/v1/messages", {**CHAT, "max_tokens": 5}),
        ("/v1/messages/count_tokens", {**CHAT}),
    ],
)
async def test_which_requests_it_is_for(
    monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], interface: str
) -> None:
    neuron = FakeNode("a").ready("m")
    async with rig(neuron, interface=interface) as gateway:
        await warm(gateway)
        slow = SlowPath(gateway, monkeypatch)
        call = await gateway.call("POST", path, body).end()
        assert (call.status, slow.count) == (200, 0)
        for otherwise in ({"traceparent": f"00-{'1' * 32}-{'2' * 16}-01"}, {"content-length": ""}):
            assert (await gateway.call("POST", path, body, otherwise).end()).status == 200
        assert (await gateway.call("POST", path, {**body, "stream": True}).end()).status == 200
        assert (await gateway.call("POST", "/v1/responses", {"model": "m", "input": "Hi"}).end()).status == 200
        assert slow.count == 4


@by_each
async def test_a_busy_fleet_goes_the_slow_path(monkeypatch: pytest.MonkeyPatch, interface: str) -> None:
    """Several nodes have to be compared, or no node has an idle connection."""

    async def slow(received: Received, line: Line) -> None:
        await asyncio.sleep(0.05)
        await answer(received, line)

    neurons = FakeNode("a", script=slow).ready("m"), FakeNode("b").ready("n"), FakeNode("c").ready("n")
    async with rig(*neurons, interface=interface) as gateway:
        for model in "mn":
            await warm(gateway, model=model)
        slow = SlowPath(gateway, monkeypatch)
        await warm(gateway, model="n")
        assert slow.count == 1
        calls = [gateway.chat(model="m") for _ in range(4)]
        for call in calls:
            assert (await call.end()).status == 200
        assert slow.count == 4
        assert gateway.in_flight == 0


async def end_of(script: Any, interface: str, **settings: Any) -> tuple[Call, Rig, FakeNode]:
    """Return how a second request ends, once ``script`` is what the node does."""
    neuron = FakeNode("a").ready("m")
    async with rig(neuron, interface=interface, **settings) as gateway:
        await warm(gateway)
        neuron.script = script
        call = await gateway.call("POST", "/v1/chat/completions", CHAT, {"x-request-id": "r"}).end()
        assert gateway.in_flight == 0
        gateway.gateway.metrics.fold()
        return call, gateway, neuron


async def cut_in_the_middle(received: Received, line: Line) -> None:
    await line.head(200, "content-type: application/json", f"content-length: {len(CHAT_ANSWER)}")
    await line.send(CHAT_ANSWER[:20])
    await asyncio.sleep(0.01)
    line.cut()


async def silence(received: Received, line: Line) -> None:
    await asyncio.sleep(5)


async def unanswered(gateway: Rig, neuron: FakeNode) -> Call:
    """Return a request on its way that the node has and does not answer."""
    await warm(gateway)
    neuron.script = silence
    call = gateway.chat()
    await until(lambda: len(neuron.requests) == 2)
    return call


async def reset(received: Received, line: Line) -> None:
    line.reset()


async def nonsense(received: Received, line: Line) -> None:
    await line.send(b"this is no HTTP\r\n\r\n")


async def in_pieces(received: Received, line: Line) -> None:
    await line.start_stream()
    for at in range(0, len(LARGE), 10_000):
        await line.chunk(LARGE[at : at + 10_000])
    await line.end()


async def large(received: Received, line: Line) -> None:
    await line.reply(200, LARGE)


async def of_another_type(received: Received, line: Line) -> None:
    await line.reply(200, CHAT_ANSWER, content_type="application/json; charset=utf-8")


async def byte_by_byte(received: Received, line: Line) -> None:
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(CHAT_ANSWER)}\r\n\r\n"
    for byte in head.encode() + CHAT_ANSWER:
        await line.send(bytes([byte]))
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    "script",
    [
        cut_in_the_middle,
        silence,
        reset,
        nonsense,
        in_pieces,
        large,
        of_another_type,
        byte_by_byte,
        error(400, "bad"),
        error(404, "model_not_found"),
        error(429, "slow_down", "retry-after: 3"),
        error(500, "broken"),
        error(503, "busy"),
    ],
)
async def test_requests_that_leave_it_end_as_on_the_slow_path(script: Any) -> None:
    seen = []
    for interface in ("slow", *INTERFACES):
        call, gateway, neuron = await end_of(script, interface, timeouts=Timeouts(first_byte_s=0.2, answer_s=0.2))
        counters = gateway.gateway.metrics
        samples = {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for counter in (counters.requests, counters.retries, counters.tokens_out)
            for metric in counter.collect()
            for sample in metric.samples
            if not sample.name.endswith("_created")
        }
        failures = {key: state.failures for key, state in gateway.gateway.service.dispatcher.breakers._states.items()}
        body = call.body.replace(str(neuron.port).encode(), b"PORT")
        seen.append((call.status, call.headers, body, len(neuron.requests), samples, failures))
    assert seen[0] == seen[1] == seen[2]


@by_each
async def test_a_connection_that_has_gone_stale_is_replaced_in_silence(
    monkeypatch: pytest.MonkeyPatch, interface: str
) -> None:
    neuron = FakeNode("a").ready("m")

    async def drop(received: Received, line: Line) -> None:
        neuron.script = answer
        line.reset()

    async with rig(neuron, interface=interface) as gateway:
        await warm(gateway)
        neuron.script = drop
        slow = SlowPath(gateway, monkeypatch)
        assert (await gateway.chat().end()).status == 200
        assert (slow.count, len(neuron.requests)) == (1, 3)
        assert gateway.metric("cortex_upstream_retries_total", node="a", reason="upstream_connection_lost") == 0
        assert gateway.in_flight == 0


@by_each
async def test_a_client_that_leaves_frees_its_node(caplog: pytest.LogCaptureFixture, interface: str) -> None:
    caplog.set_level(logging.INFO, "cortex")
    neuron = FakeNode("a").ready("m")
    async with rig(neuron, interface=interface) as gateway:
        call = await unanswered(gateway, neuron)
        call.leave()
        await call.end()
        await until(lambda: neuron.num_left == 1)
        assert gateway.in_flight == 0
        gateway.gateway.metrics.fold()
        left = [record.fields for record in caplog.records if record.name == "cortex.request"][-1]
        assert (left["status"], left["finish"], left["model"]) == (499, "disconnected", "m")


@by_each
async def test_one_that_is_cancelled_frees_its_node(interface: str) -> None:
    neuron = FakeNode("a").ready("m")
    async with rig(neuron, interface=interface) as gateway:
        call = await unanswered(gateway, neuron)
        call.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call.task
        await until(lambda: neuron.num_left == 1)
        assert gateway.in_flight == 0


@by_each
async def test_requests_in_flight_at_shutdown_get_an_error(interface: str) -> None:
    neuron = FakeNode("a").ready("m")
    async with rig(neuron, interface=interface) as gateway:
        call = await unanswered(gateway, neuron)
        gateway.gateway.end_requests()
        assert (await call.end()).status == 503
        assert call.json()["error"]["code"] == "gateway_stopped"


@by_each
async def test_keys_that_change_are_gone_by_at_once(interface: str) -> None:
    free, limited = Principal("k"), Principal("k", limits=Limits(requests_per_minute=1))
    other = Principal("k", ("n",))
    neuron = FakeNode("a").ready("m")
    async with rig(neuron, keys=ring((KEY, free)), interface=interface) as gateway:

        async def status(keys: KeyRing, header: str = "authorization") -> int:
            gateway.gateway.reconfigure(gateway.gateway.settings, gateway.gateway.offered, keys)
            given = {header: KEY if header == "x-api-key" else f"Bearer {KEY}"}
            return (await gateway.call("POST", "/v1/chat/completions", CHAT, given).end()).status

        assert [await status(ring((KEY, free))) for _ in range(3)] == [200] * 3
        assert await status(ring((KEY, free)), "x-api-key") == 200
        assert await status(ring(("sk-other", free))) == 401
        assert await status(ring((KEY, other))) == 403
        assert await status(ring((KEY, limited))) == 200
        assert await status(gateway.gateway.authenticator.keys) == 429
        assert await status(ring((KEY, free))) == 200
        # An unsupported scheme is ignored; the other header has the key.
        both = {"authorization": "Basic eDp5", "x-api-key": KEY}
        assert (await gateway.call("POST", "/v1/chat/completions", CHAT, both).end()).status == 200
        wrong = {"authorization": "Bearer sk-wrong", "x-api-key": KEY}
        assert (await gateway.call("POST", "/v1/chat/completions", CHAT, wrong).end()).status == 401


@by_each
async def test_bad_bodies_are_refused_as_ever(interface: str) -> None:
    neuron = FakeNode("a").ready("m")
    async with rig(neuron, interface=interface, max_body_bytes=1000) as gateway:
        await warm(gateway)
        for body, status in ((b"{", 400), (b'{"model":1}', 400), (b"{}", 400), (b'{"model":"none"}', 404)):
            assert (await gateway.call("POST", "/v1/chat/completions", body).end()).status == status
        assert (await gateway.chat(user="x" * 1000).end()).status == 413
        assert len(neuron.requests) == 1
