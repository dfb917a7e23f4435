"""WebSockets: which clients may open one, and keepalives in a silence. The dialect itself is tested with the SDKs."""

import asyncio
import json

import pytest
from fake_node import FakeNode, Line, Received
from gateway_rig import Rig, rig, until
from key_rig import KEY, ring

from cortex import event_stream
from cortex.access.keys import Principal

CREATED = {"type": "response.created", "sequence_number": 0, "response": {"id": "r", "status": "in_progress"}}
COMPLETED = {"type": "response.completed", "sequence_number": 1, "response": {"id": "r", "status": "completed"}}


def sse_event(event: dict[str, object]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (str(event["type"]).encode(), json.dumps(event).encode())


async def test_a_silence_has_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """A comment has no form there, and an event that is in no client's schema is an error to some."""
    monkeypatch.setattr(event_stream, "HOLD_HEADERS_S", 0.01)
    monkeypatch.setattr(event_stream, "HEARTBEAT_INTERVAL_S", 0.01)
    go = asyncio.Event()

    async def script(received: Received, line: Line) -> None:
        await line.start_stream()
        await line.chunk(sse_event(CREATED))
        await go.wait()
        await line.chunk(sse_event(COMPLETED))
        await line.end()

    sent: list[dict[str, object]] = []
    coming: asyncio.Queue[dict[str, object]] = asyncio.Queue()

    async def send(message: dict[str, object]) -> None:
        if message["type"] == "websocket.send":
            sent.append(json.loads(str(message["text"])))

    async with rig(FakeNode(script=script, dialects=("openai-responses",)).ready("m")) as gateway:
        ask: dict[str, object] = {"type": "response.create", "model": "m", "input": "Hi", "store": False}
        coming.put_nowait({"type": "websocket.connect"})
        coming.put_nowait({"type": "websocket.receive", "text": json.dumps(ask)})
        scope = {"type": "websocket", "path": "/v1/responses", "headers": [], "client": ("127.0.0.1", 1)}
        serving = asyncio.create_task(gateway.gateway.handle_socket(scope, coming.get, send))  # type: ignore[arg-type]
        await until(lambda: sent)
        await asyncio.sleep(0.1)  # ten heartbeats of a stream
        go.set()
        await until(lambda: len(sent) > 1)
        coming.put_nowait({"type": "websocket.disconnect"})
        await serving
    assert [event["type"] for event in sent] == ["response.created", "response.completed"]


PAGE = b"https://evil.example"


@pytest.mark.parametrize(
    ("headers", "with_keys", "status"),
    [
        ({}, False, 0),
        ({b"host": b"localhost:1", b"origin": b"http://localhost:1"}, False, 0),
        ({b"host": b"localhost:1", b"origin": b"https://chat.example"}, False, 0),  # which is allowed
        ({b"host": b"localhost:1", b"origin": PAGE}, False, 403),
        ({b"host": b"localhost:1", b"origin": b"null"}, False, 403),
        ({b"host": b"evil.example", b"origin": PAGE}, False, 403),  # a name that was made to resolve to here
        ({b"host": b"evil.example"}, False, 403),
        ({b"host": b"localhost:1", b"sec-fetch-site": b"cross-site"}, False, 403),
        ({}, True, 401),
        ({b"authorization": b"Bearer wrong"}, True, 401),
        ({b"authorization": b"Bearer " + KEY.encode()}, True, 0),
        ({b"x-api-key": KEY.encode()}, True, 0),
        ({b"authorization": b"Bearer " + KEY.encode(), b"origin": PAGE}, True, 403),
    ],
)
async def test_unauthorized_clients_are_refused_before_the_handshake(
    headers: dict[bytes, bytes], with_keys: bool, status: int
) -> None:
    sent: list[dict[str, object]] = []
    coming: asyncio.Queue[dict[str, object]] = asyncio.Queue()

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    keys = ring((KEY, Principal("alice"))) if with_keys else None
    async with rig(FakeNode().ready("m"), keys=keys, allowed_origins=("https://chat.example",)) as gateway:
        for extensions in ({}, {"websocket.http.response": {}}):
            sent.clear()
            coming.put_nowait({"type": "websocket.connect"})
            coming.put_nowait({"type": "websocket.disconnect"})
            scope = {
                "type": "websocket",
                "path": "/v1/responses",
                "headers": list(headers.items()),
                "client": ("127.0.0.1", 1),
                "extensions": extensions,
            }
            await gateway.gateway.handle_socket(scope, coming.get, send)  # type: ignore[arg-type]
            coming = asyncio.Queue()
            if not status:
                assert sent == [{"type": "websocket.accept"}]
            elif extensions:
                assert (sent[0]["type"], sent[0]["status"]) == ("websocket.http.response.start", status)
            else:
                assert sent == [{"type": "websocket.close"}]


async def test_a_key_that_is_revoked_asks_nothing_more_of_an_open_connection() -> None:
    sent: list[dict[str, object]] = []
    coming: asyncio.Queue[dict[str, object]] = asyncio.Queue()

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    neuron = FakeNode(dialects=("openai-responses",)).ready("m")
    async with rig(neuron, keys=ring((KEY, Principal("alice")))) as gateway:
        coming.put_nowait({"type": "websocket.connect"})
        headers = [(b"authorization", b"Bearer " + KEY.encode())]
        scope = {"type": "websocket", "path": "/v1/responses", "headers": headers, "client": ("127.0.0.1", 1)}
        serving = asyncio.create_task(gateway.gateway.handle_socket(scope, coming.get, send))  # type: ignore[arg-type]
        await until(lambda: sent == [{"type": "websocket.accept"}])
        gateway.gateway.authenticator.keys = ring(("another", Principal("bob")))
        ask = {"type": "response.create", "model": "m", "input": "Hi", "store": False}
        coming.put_nowait({"type": "websocket.receive", "text": json.dumps(ask)})
        await until(lambda: len(sent) > 1)
        coming.put_nowait({"type": "websocket.disconnect"})
        await serving
        assert "invalid_api_key" in str(sent[1])
        assert not neuron.requests


async def exchange(gateway: Rig, messages: list[dict[str, object]], num_answers: int) -> list[dict[str, object]]:
    """Return what a connection is sent for some messages."""
    sent: list[dict[str, object]] = []
    coming: asyncio.Queue[dict[str, object]] = asyncio.Queue()

    async def send(message: dict[str, object]) -> None:
        if message["type"] != "websocket.accept":
            sent.append(message)

    coming.put_nowait({"type": "websocket.connect"})
    for message in messages:
        coming.put_nowait({"type": "websocket.receive", "text": json.dumps(message)})
    scope = {"type": "websocket", "path": "/v1/responses", "headers": [], "client": ("127.0.0.1", 1)}
    serving = asyncio.create_task(gateway.gateway.handle_socket(scope, coming.get, send))  # type: ignore[arg-type]
    await until(lambda: len(sent) >= num_answers)
    coming.put_nowait({"type": "websocket.disconnect"})
    await serving
    return [json.loads(str(message["text"])) for message in sent if message["type"] == "websocket.send"]


@pytest.mark.parametrize(("with_keys", "status"), [(True, 0), (False, 403)])
async def test_any_origin_may_open_one_with_a_key(with_keys: bool, status: int) -> None:
    sent: list[dict[str, object]] = []
    coming: asyncio.Queue[dict[str, object]] = asyncio.Queue()

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    keys = ring((KEY, Principal("alice"))) if with_keys else None
    async with rig(FakeNode().ready("m"), keys=keys, allowed_origins=("*",)) as gateway:
        coming.put_nowait({"type": "websocket.connect"})
        coming.put_nowait({"type": "websocket.disconnect"})
        headers = [(b"host", b"localhost:1"), (b"origin", PAGE), (b"authorization", b"Bearer " + KEY.encode())]
        scope = {
            "type": "websocket",
            "path": "/v1/responses",
            "headers": headers,
            "client": ("127.0.0.1", 1),
            "extensions": {"websocket.http.response": {}},
        }
        await gateway.gateway.handle_socket(scope, coming.get, send)  # type: ignore[arg-type]
    assert sent[0].get("status", 0) == status


async def test_long_instructions_fit_in_an_event() -> None:
    long = "x" * 9_000_000
    async with rig(FakeNode().ready("m")) as gateway:
        message: dict[str, object] = {"type": "response.create", "model": "m", "input": "Hi", "instructions": long}
        events = await exchange(gateway, [{**message, "generate": False}], 2)
        assert [event["type"] for event in events][-1] == "response.completed"
        body = {"model": "m", "input": "Hi", "instructions": long, "background": True}
        call = await gateway.call("POST", "/v1/responses", body).end()
        assert (call.status, call.json()["status"]) == (200, "queued")


async def test_an_input_nested_too_deep_is_refused_and_the_connection_goes_on() -> None:
    neuron = FakeNode("a", dialects=("openai-responses",)).ready("m")
    deep: list[object] = []
    for _ in range(250):
        deep = [deep]
    message = {"type": "response.create", "model": "m", "input": "hi", "metadata": deep}
    async with rig(neuron) as gateway:
        for answer in await exchange(gateway, [message, message], 2):
            assert answer["type"] == "error"
            assert answer["status"] == 400
            assert "too_deep" in json.dumps(answer)
        assert not neuron.requests


async def test_messages_that_wait_are_counted_in_bytes() -> None:
    go = asyncio.Event()

    async def script(received: Received, line: Line) -> None:
        await go.wait()
        await line.start_stream()
        await line.chunk(sse_event(COMPLETED))
        await line.end()

    neuron = FakeNode(script=script, dialects=("openai-responses",)).ready("m")
    async with rig(neuron, max_body_bytes=10_000) as gateway:
        ask: dict[str, object] = {"type": "response.create", "model": "m", "input": "x" * 4_500, "store": False}
        asyncio.get_running_loop().call_later(0.2, go.set)
        events = await exchange(gateway, [ask] * 4, 4)
    assert [event["type"] for event in events].count("response.completed") == 2
    refused = [event for event in events if event["type"] == "error"]
    assert len(refused) == 2
    assert all("bytes" in str(event["error"]) for event in refused)
