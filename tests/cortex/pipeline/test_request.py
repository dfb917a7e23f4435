"""A request is answered at once where nothing but its node has to be waited for, by steps else."""

import asyncio
import json
import logging
from typing import Any

import pytest
from answers import CHAT_ANSWER, CHAT_STREAM
from asgi_call import Call
from fake_node import FakeNode, Line, Received, answer, error
from gateway_rig import CHAT, Rig, rig, until
from key_rig import KEY, ring

from cortex.access.keys import KeyRing, Limits, Principal
from cortex.config import Timeouts
from cortex.fleet.node_request import NodeRequest, NodeResponse

LARGE = json.dumps({"choices": [{"message": {"content": "x" * 300_000}, "finish_reason": "stop"}]}).encode()
AUTHORIZED = {"authorization": f"Bearer {KEY}"}


INTERFACES = "asgi", "rsgi"

by_each = pytest.mark.parametrize("interface", INTERFACES)


class Steps:
    """Counts the requests of a gateway that are not answered at once."""

    def __init__(self, gateway: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        dispatcher = gateway.gateway.service.dispatcher
        ask = dispatcher.ask

        async def counted(request: NodeRequest) -> NodeResponse:
            self.count += 1
            return await ask(request)

        monkeypatch.setattr(dispatcher, "ask", counted)


async def warm(gateway: Rig, **fields: Any) -> None:
    """Have a connection that waits for a request."""
    assert (await gateway.chat(**fields).end()).status == 200


@by_each
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("alias", [False, True])
async def test_a_request_is_answered_at_once_and_recorded(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, interface: str, alias: bool, stream: bool
) -> None:
    caplog.set_level(logging.INFO, "cortex")
    keys = ring((KEY, Principal("k", ("*",), priority=3)), anonymous=Principal())
    neuron = FakeNode("a").ready("m")
    async with rig(neuron, keys=keys, aliases={"other": "m"}, interface=interface) as gateway:
        await warm(gateway)
        neuron.requests.clear()
        steps = Steps(gateway, monkeypatch)
        body = {**CHAT, "model": "other" if alias else "m", "stream": stream}
        headers = {"x-request-id": "r2", "traceparent": f"00-{'1' * 32}-{'2' * 16}-01", **AUTHORIZED}
        call = await gateway.call("POST", "/v1/chat/completions", body, headers).end()
        assert (call.status, steps.count, gateway.in_flight) == (200, 0, 0)
        assert call.headers["x-request-id"] == call.headers["request-id"] == "r2"
        assert call.body == (b"".join(CHAT_STREAM) if stream else CHAT_ANSWER)
        (received,) = neuron.requests
        assert json.loads(received.body) == {**body, "model": "m"}
        expected = {"x-request-id": "r2", "x-cortex-principal": "k", "x-cortex-priority": "3"}
        assert expected.items() <= received.headers.items()
        assert received.headers["traceparent"] == headers["traceparent"]
        assert received.headers.get("x-cortex-model-name") == ("other" if alias else None)
        gateway.gateway.metrics.fold()
        (line,) = (
            found.fields for found in caplog.records if found.name == "cortex.request" and found.fields["id"] == "r2"
        )
        shown = {name: line[name] for name in ("key", "model", "node", "status", "stream", "finish")}
        assert shown == {"key": "k", "model": "m", "node": "a", "status": 200, "stream": stream, "finish": "stop"}
        assert line["tokens_in"]
        assert line["trace"] == "1" * 32
        assert ("ttft_s" in line) == stream


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
async def test_which_requests_are_answered_at_once(
    monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], interface: str
) -> None:
    neuron = FakeNode("a").ready("m")
    async with rig(neuron, interface=interface) as gateway:
        await warm(gateway)
        steps = Steps(gateway, monkeypatch)
        for otherwise in ({}, {"content-length": ""}):
            assert (await gateway.call("POST", path, body, otherwise).end()).status == 200
        assert steps.count == 0
        assert (await gateway.call("POST", path, {**body, "unheard_of": 1}).end()).status == 200
        assert (await gateway.call("POST", "/v1/responses", {"model": "m", "input": "Hi"}).end()).status == 200
        assert steps.count == 2


@by_each
async def test_of_several_replicas_the_less_busy_is_chosen_at_once(
    monkeypatch: pytest.MonkeyPatch, interface: str
) -> None:
    go = asyncio.Event()

    async def held(received: Received, line: Line) -> None:
        await go.wait()
        await answer(received, line)

    neurons = [FakeNode(name, script=held).ready("m") for name in "ab"]
    async with rig(*neurons, interface=interface) as gateway:
        for _ in range(2):
            calls = [gateway.chat(user=f"{number}") for number in range(4)]
            await until(lambda: all(len(neuron.requests) >= 2 for neuron in neurons))
            assert gateway.gateway.fleet.in_flight.by_node == {"a": 2, "b": 2}
            go.set()
            assert [(await call.end()).status for call in calls] == [200] * 4
            go.clear()
            for neuron in neurons:
                neuron.requests.clear()
            steps = Steps(gateway, monkeypatch)
        calls = [gateway.chat(user=f"{number}") for number in range(4)]
        await until(lambda: gateway.in_flight == 4)
        go.set()
        assert [(await call.end()).status for call in calls] == [200] * 4
        assert steps.count == 0


@by_each
@pytest.mark.parametrize("stream", [False, True])
async def test_a_key_with_limits_is_served_at_once_and_settled(
    monkeypatch: pytest.MonkeyPatch, interface: str, stream: bool
) -> None:
    limits = Limits(requests_per_minute=3, max_concurrent=1, tokens_per_window=100_000)
    neuron = FakeNode("a").ready("m")
    async with rig(neuron, keys=ring((KEY, Principal("k", limits=limits))), interface=interface) as gateway:

        async def send() -> int:
            return (
                await gateway.call("POST", "/v1/chat/completions", {**CHAT, "stream": stream}, AUTHORIZED).end()
            ).status

        assert await send() == 200
        steps = Steps(gateway, monkeypatch)
        assert [await send() for _ in range(3)] == [200, 200, 429]
        assert steps.count == 0
        use = await gateway.gateway.authenticator.rate_limiter.usage("k", limits)
        assert (use.requests, use.running) == (3, 0)
        assert use.tokens > 0


@by_each
async def test_a_request_without_an_idle_connection_goes_by_steps(
    monkeypatch: pytest.MonkeyPatch, interface: str
) -> None:
    async def slow(received: Received, line: Line) -> None:
        await asyncio.sleep(0.05)
        await answer(received, line)

    async with rig(FakeNode("a", script=slow).ready("m"), interface=interface) as gateway:
        await warm(gateway)
        steps = Steps(gateway, monkeypatch)
        calls = [gateway.chat() for _ in range(4)]
        for call in calls:
            assert (await call.end()).status == 200
        assert steps.count == 3
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


@by_each
@pytest.mark.parametrize(
    ("script", "status", "num_sent"),
    [
        (cut_in_the_middle, 502, 2),
        (silence, 504, 2),
        (reset, 502, 3),
        (nonsense, 502, 2),
        (in_pieces, 200, 2),
        (large, 200, 2),
        (of_another_type, 200, 2),
        (byte_by_byte, 200, 2),
        (error(400, "bad"), 400, 2),
        (error(404, "model_not_found"), 503, 9),
        (error(429, "slow_down", "retry-after: 3"), 429, 2),
        (error(500, "broken"), 500, 2),
        (error(503, "busy"), 503, 2),
    ],
)
async def test_an_answer_that_is_none_is_judged_by_steps(
    script: Any, status: int, num_sent: int, interface: str
) -> None:
    call, _, neuron = await end_of(script, interface, timeouts=Timeouts(first_byte_s=0.2, answer_s=0.2))
    assert (call.status, len(neuron.requests)) == (status, num_sent)
    assert call.headers["x-request-id"] == "r"


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
        steps = Steps(gateway, monkeypatch)
        assert (await gateway.chat().end()).status == 200
        assert (steps.count, len(neuron.requests)) == (1, 3)
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
