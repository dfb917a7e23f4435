"""A fake node: a control plane that answers, and inference that a script plays byte by byte.

Raw asyncio, so that a test can split, stall, cut and reset anywhere, and see when the other side leaves. As a program,
``fake_node.py NUMBER`` prints the ports of so many busy nodes as JSON and serves until it is ended.
"""

import asyncio
import contextlib
import json
import random
import socket
import ssl
import struct
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import orjson
import uvloop
from answers import CHAT_ANSWER, CHAT_STREAM, MESSAGES_STREAM, RESPONSES_STREAM, WHOLE_ANSWERS

from cortex.wire.node import (
    Capability,
    Device,
    DeviceKind,
    Discovery,
    DrainRequest,
    Fit,
    Health,
    LoadRequest,
    ModelList,
    ModelSpec,
    ModelState,
    ModelStatus,
    NodeState,
    PinRequest,
    UnloadRequest,
    WorkerHealth,
    WorkerState,
)

GIB = 1024**3


@dataclass
class Received:
    """Inference request as it arrived."""

    path: str
    headers: dict[str, str]
    body: bytes


class Line:
    """The writing end of one connection, and whether the other side is still there."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.left = asyncio.Event()
        self.written_bytes = 0

    async def send(self, data: bytes) -> None:
        """Send raw bytes, and wait while the other side does not take them."""
        if self.writer.is_closing():  # uvloop's transports raise a RuntimeError once they are closed
            raise ConnectionError
        self.written_bytes += len(data)
        self.writer.write(data)
        await self.writer.drain()

    async def head(self, status: int = 200, *headers: str) -> None:
        """Send a status line and headers; the script chooses the framing."""
        lines = [f"HTTP/1.1 {status} Status", *headers, "", ""]
        await self.send("\r\n".join(lines).encode())

    async def start_stream(self) -> None:
        """Send the head of a chunked event stream."""
        await self.head(200, "content-type: text/event-stream; charset=utf-8", "transfer-encoding: chunked")

    async def chunk(self, data: bytes) -> None:
        """Send one HTTP chunk."""
        await self.send(b"%x\r\n%s\r\n" % (len(data), data))

    async def end(self) -> None:
        """End a chunked body."""
        await self.send(b"0\r\n\r\n")

    async def reply(self, status: int, body: bytes, *headers: str, content_type: str = "application/json") -> None:
        """Send a whole answer."""
        await self.head(status, f"content-type: {content_type}", f"content-length: {len(body)}", *headers)
        await self.send(body)

    def cut(self) -> None:
        """Close the connection in the middle."""
        self.writer.close()

    def reset(self) -> None:
        """Reset the connection."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


Script = Callable[[Received, Line], Awaitable[None]]


async def answer(received: Received, line: Line) -> None:
    """The default script: a short answer in the dialect asked for, streamed or not."""
    streams = {"/v1/responses": RESPONSES_STREAM, "/v1/messages": MESSAGES_STREAM}
    if received.path == "/v1/messages/count_tokens":
        await line.reply(200, b'{"input_tokens":7}')
        return
    if not orjson.loads(received.body).get("stream"):
        await line.reply(200, WHOLE_ANSWERS.get(received.path, CHAT_ANSWER))
        return
    await line.start_stream()
    for sse_event in streams.get(received.path, CHAT_STREAM):
        await line.chunk(sse_event)
    await line.end()


def error(status: int, code: str, *headers: str) -> Script:
    """Return a script that answers with an error."""
    body = orjson.dumps({"error": {"message": f"error {code}", "type": "t", "param": None, "code": code}})

    async def script(received: Received, line: Line) -> None:
        await line.reply(status, body, *headers)

    return script


def answer_after(go: asyncio.Event) -> Script:
    """Return a script that answers once an event is set."""

    async def script(received: Received, line: Line) -> None:
        await go.wait()
        await answer(received, line)

    return script


async def never_answer(received: Received, line: Line) -> None:
    """Send nothing until the client has left."""
    await line.left.wait()


@dataclass
class FakeNode:
    """Fake node, whose fields a test changes as it goes."""

    name: str = "a"
    port: int = 0
    models: dict[str, ModelStatus] = field(default_factory=dict)
    state: NodeState = NodeState.READY
    script: Script = answer
    control: Script | None = None
    """Plays every control call in place of the answers here."""
    load: Callable[[ModelSpec], Awaitable[ModelStatus | Script]] | None = None
    fit: Fit | Script = field(default_factory=lambda: Fit(None))
    """Answer to a question for weights that fit."""
    pulls: list[ModelSpec] = field(default_factory=list)
    fit_specs: list[ModelSpec] = field(default_factory=list)
    free_bytes: int = 16 * GIB
    dialects: tuple[str, ...] = ("openai-chat", "openai-completions", "openai-responses", "anthropic-messages")
    requests: list[Received] = field(default_factory=list)
    loads: list[ModelSpec] = field(default_factory=list)
    load_requests: list[LoadRequest] = field(default_factory=list)
    pins: list[PinRequest] = field(default_factory=list)
    num_polls: int = 0
    lines: set[Line] = field(default_factory=set)
    num_connections: int = 0
    """Connections ever made for inference."""
    num_left: int = 0
    """Clients that went away while a script was playing."""
    max_requests_per_connection: int = 10**9
    tls: ssl.SSLContext | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ready(self, *models: str, **fields: Any) -> "FakeNode":
        """Have these models loaded."""
        for model in models:
            self.models[model] = ModelStatus(
                model,
                ModelState.READY,
                source="/weights",
                devices=("cpu:0",),
                capabilities=(Capability.CHAT,),
                **{"context_tokens": 4096, "weights_bytes": GIB, "kv_cache_bytes": GIB, **fields},
            )
        return self

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator["FakeNode"]:
        """Listen on 127.0.0.1, on the same port each time."""
        tasks: set[asyncio.Task[None]] = set()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        server = await asyncio.start_server(accept, "127.0.0.1", self.port, ssl=self.tls)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for task in tuple(tasks):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = Line(writer)
        num_inferences = 0
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                request, *header_lines = head.decode("latin-1").split("\r\n")[:-2]
                headers = dict(row.split(": ", 1) for row in header_lines)
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                _, path, _ = request.split(" ")
                received = Received(path, headers, body)
                if path.startswith("/v1/"):
                    num_inferences += 1
                    self.num_connections += num_inferences == 1
                    self.requests.append(received)
                    self.lines.add(line)
                    await self._play(self.script, received, line, reader)
                    if num_inferences >= self.max_requests_per_connection:
                        return
                else:
                    await self._play(self.control or self._control, received, line, reader)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.lines.discard(line)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _play(self, script: Script, received: Received, line: Line, reader: asyncio.StreamReader) -> None:
        """Play a script until it ends or the other side leaves. A byte meanwhile is an error: no client pipelines."""
        playing = asyncio.ensure_future(script(received, line))
        watching = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait({playing, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not playing.done():
                assert watching.exception() or watching.result() == b"", "a second request before the first answer"
                self.num_left += received.path.startswith("/v1/")
                line.left.set()
                raise ConnectionError
            if isinstance(playing.exception(), ConnectionError):
                self.num_left += received.path.startswith("/v1/")
            playing.result()
            if watching.done():
                raise ConnectionError
        finally:
            for task in (playing, watching):
                task.cancel()
            await asyncio.gather(playing, watching, return_exceptions=True)

    async def _control(self, received: Received, line: Line) -> None:
        answers: dict[str, Callable[[], Any]] = {
            "/discovery": self.discovery,
            "/health": self.health,
            "/models": lambda: ModelList(tuple(self.models.values())),
        }
        if received.path in answers:
            self.num_polls += received.path == "/health"
            await line.reply(200, msgspec.json.encode(answers[received.path]()))
        elif received.path == "/models/load":
            request = msgspec.json.decode(received.body, type=LoadRequest)
            self.load_requests.append(request)
            spec = request.spec()
            self.loads.append(spec)
            result = await self.load(spec) if self.load else self.ready(spec.id).models[spec.id]
            if isinstance(result, ModelStatus):
                self.models[spec.id] = result
                await line.reply(200, msgspec.json.encode(result))
            else:
                await result(received, line)
        elif received.path == "/models/fit":
            self.fit_specs.append(msgspec.json.decode(received.body, type=ModelSpec))
            if isinstance(self.fit, Fit):
                await line.reply(200, msgspec.json.encode(self.fit))
            else:
                await self.fit(received, line)
        elif received.path == "/models/pull":
            spec = msgspec.json.decode(received.body, type=ModelSpec)
            self.pulls.append(spec)
            self.models[spec.id] = ModelStatus(spec.id, ModelState.AVAILABLE, source=spec.source)
            await line.reply(200, msgspec.json.encode(self.models[spec.id]))
        elif received.path == "/models/pin":
            pin = msgspec.json.decode(received.body, type=PinRequest)
            self.pins.append(pin)
            if pin.id not in self.models:
                await error(404, "model_not_found")(received, line)
                return
            self.models[pin.id] = msgspec.structs.replace(self.models[pin.id], pinned=bool(pin.pinned))
            await line.reply(200, msgspec.json.encode(self.models[pin.id]))
        elif received.path == "/models/forget":
            await line.reply(200, msgspec.json.encode(self.models.pop(msgspec.json.decode(received.body)["id"])))
        elif received.path == "/models/unload":
            unload = msgspec.json.decode(received.body, type=UnloadRequest)
            self.models[unload.id] = msgspec.structs.replace(self.models[unload.id], state=ModelState.AVAILABLE)
            await line.reply(200, msgspec.json.encode(self.models[unload.id]))
        elif received.path == "/drain":
            drain = msgspec.json.decode(received.body, type=DrainRequest)
            self.state = NodeState.DRAINING if drain.draining else NodeState.READY
            await line.reply(200, msgspec.json.encode(self.health()))
        else:
            await line.reply(404, b'{"error":{"message":"no","type":"t","param":null,"code":"unknown_url"}}')

    def discovery(self) -> Discovery:
        """Return what the node is."""
        device = Device("cpu:0", DeviceKind.CPU, "a CPU", 32 * GIB, self.free_bytes, num_cores=2)
        device = msgspec.structs.replace(device, worker=WorkerState.READY)
        return Discovery(self.name, "0", "host", "linux", None, None, (device,), ("torch",), self.dialects)

    def health(self) -> Health:
        """Return how the node is."""
        return Health(self.state, 1.0, (WorkerHealth("cpu:0", WorkerState.READY, 0),))


def chat_only(name: str = "a") -> FakeNode:
    """Return a node of the chat dialect alone: the gateway translates for it."""
    return FakeNode(name, dialects=("openai-chat",)).ready("m")


NUM_DEVICES = 8
NUM_MODELS = 5
dice = random.Random(4)
began = time.monotonic()


class BusyNode(FakeNode):
    """Node with eight GPUs and five models."""

    def discovery(self) -> Discovery:
        devices = tuple(
            Device(
                f"cuda:{i}", DeviceKind.CUDA, "NVIDIA H100 80GB HBM3", 80 * GIB, dice.randrange(8 * GIB, 30 * GIB),
                "9.0", worker=WorkerState.READY,
            )
            for i in range(NUM_DEVICES)
        )  # fmt: skip
        return msgspec.structs.replace(super().discovery(), devices=devices)

    def health(self) -> Health:
        uptime_s = time.monotonic() - began
        for name, status in self.models.items():
            self.models[name] = msgspec.structs.replace(
                status, running=dice.randrange(40), last_used_at=time.time(), devices=("cuda:0",)
            )
        workers = tuple(
            WorkerHealth(f"cuda:{i}", WorkerState.READY, 0, 9, dice.randrange(3), generated=int(800 * uptime_s))
            for i in range(NUM_DEVICES)
        )
        return Health(self.state, uptime_s, workers)


async def _run(number: int) -> None:
    async with contextlib.AsyncExitStack() as stack:
        nodes = [BusyNode(f"gpu-{i:03}").ready(*(f"model-{m}" for m in range(NUM_MODELS))) for i in range(number)]
        for node in nodes:
            await stack.enter_async_context(node.serving())
        print(json.dumps({node.name: node.url for node in nodes}), flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(_run(int(sys.argv[1])))
