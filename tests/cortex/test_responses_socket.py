"""What a WebSocket is told while its answer is silent. The dialect itself is tested with the SDKs."""

import asyncio
import json

import pytest
from fake_neuron import Asked, FakeNeuron, Line
from gateway_rig import rig, until

from cortex import http_io

CREATED = {"type": "response.created", "sequence_number": 0, "response": {"id": "r", "status": "in_progress"}}
COMPLETED = {"type": "response.completed", "sequence_number": 1, "response": {"id": "r", "status": "completed"}}


def frame(event: dict[str, object]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (str(event["type"]).encode(), json.dumps(event).encode())


@pytest.mark.parametrize("lane", [None, "a"])
async def test_a_silence_is_filled_before_and_within_an_answer(
    lane: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the message that OpenAI's servers fill theirs with: a comment has no form there."""
    monkeypatch.setattr(http_io, "HOLD_HEADERS_S", 0.01)
    monkeypatch.setattr(http_io, "HEARTBEAT_INTERVAL_S", 0.02)
    heard = [asyncio.Event(), asyncio.Event()]

    async def script(asked: Asked, line: Line) -> None:
        await heard[0].wait()
        await line.start_stream()
        await line.chunk(frame(CREATED))
        await heard[1].wait()
        await line.chunk(frame(COMPLETED))
        await line.end()

    said: list[dict[str, object]] = []
    coming: asyncio.Queue[dict[str, object]] = asyncio.Queue()

    async def send(message: dict[str, object]) -> None:
        if message["type"] == "websocket.send":
            said.append(json.loads(str(message["text"])))

    def num_told(kind: str) -> int:
        return sum(event["type"] == kind for event in said)

    async with rig(FakeNeuron(script=script, dialects=("openai-responses",)).ready("m")) as gateway:
        ask: dict[str, object] = {"type": "response.create", "model": "m", "input": "Hi", "store": False}
        if lane is not None:
            ask["stream_id"] = lane
        coming.put_nowait({"type": "websocket.connect"})
        coming.put_nowait({"type": "websocket.receive", "text": json.dumps(ask)})
        scope = {"type": "websocket", "path": "/v1/responses", "headers": [], "client": ("127.0.0.1", 1)}
        serving = asyncio.create_task(gateway.gateway.handle_socket(scope, coming.get, send))  # type: ignore[arg-type]
        await until(lambda: num_told("keepalive") >= 2)
        heard[0].set()
        await until(lambda: num_told("response.created"))
        before = num_told("keepalive")
        await until(lambda: num_told("keepalive") >= before + 2)
        heard[1].set()
        await until(lambda: num_told("response.completed"))
        coming.put_nowait({"type": "websocket.disconnect"})
        await serving
    expected = {"type": "keepalive"} if lane is None else {"type": "keepalive", "stream_id": lane}
    assert all(event == expected for event in said if event["type"] == "keepalive")
    assert [event["type"] for event in said if event["type"] != "keepalive"] == [
        "response.created",
        "response.completed",
    ]
