"""What does the gateway cost? The same requests straight to a mock node and through cortex, in the same run.

The node is a bare uvloop protocol in a process of its own, far cheaper than any gateway; cortex runs as its users run
it (``granian --interface asgi cortex.asgi:app``, one worker, metrics and log on). The load generator keeps a number of
connections busy, one request at a time on each. On a machine with few cores the three share them, so that throughput
is a lower bound; the ratio to the direct figure of the same run is what to compare.
"""

import argparse
import asyncio
import contextlib
import os
import pathlib
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import report
import uvloop

from cortex.wire.node import (
    Device,
    DeviceKind,
    Discovery,
    Health,
    ModelList,
    ModelState,
    ModelStatus,
    NodeState,
    WorkerState,
)

WARM_UP_S = 0.5
NUM_FRAMES = 200
NUM_STREAMS = 64
FRAMES_PER_WRITE = 8
"""Frames that the mock node has ready at a time, as an engine's step has for its sequences."""

GIB = 1024**3
DEVICE = Device("cpu:0", DeviceKind.CPU, "mock", GIB, GIB, worker=WorkerState.READY)
CONTROL = {
    b"/discovery": Discovery("mock", "0", "mock", "linux", None, None, (DEVICE,), ("torch",), ("openai-chat",)),
    b"/health": Health(NodeState.READY, 0.0, ()),
    b"/models": ModelList((ModelStatus("m", ModelState.READY, source="/w", context_tokens=4096),)),
}


def with_head(body: bytes, content_type: bytes = b"application/json") -> bytes:
    """Return a whole answer."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\ncontent-length: %d\r\n\r\n" % (content_type, len(body))
    return head + body


ANSWER = with_head(
    b'{"id":"c","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,"message":{"role":"assistant",'
    b'"content":"%s"},"finish_reason":"stop"}],"usage":{"prompt_tokens":10,"completion_tokens":50,"total_tokens":60}}'
    % (b"word " * 50)
)
FRAME = (
    b'data: {"id":"chatcmpl-0123456789abcdef","object":"chat.completion.chunk","created":1,"model":"m",'
    b'"choices":[{"index":0,"delta":{"content":" word"},"finish_reason":null}]}\n\n'
)
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
STREAM_END = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
FRAME_CHUNK = b"%x\r\n%s\r\n" % (len(FRAME), FRAME)


class MockNode(asyncio.Protocol):
    """A node that answers at once with canned bytes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        self._held = b""

    def data_received(self, data: bytes) -> None:
        """Answer every whole request."""
        data = self._held + data
        while (end := data.find(b"\r\n\r\n")) >= 0:
            head = data[:end].lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(data) < end + 4 + length:
                break
            body, data = data[end + 4 : end + 4 + length], data[end + 4 + length :]
            path = head.split(b" ", 2)[1]
            if path in CONTROL:
                self._transport.write(with_head(msgspec.json.encode(CONTROL[path])))
            elif b'"stream":true' in body:
                self._transport.write(STREAM_HEAD)
                self._frames(NUM_FRAMES)
            else:
                self._transport.write(ANSWER)
        self._held = data

    def _frames(self, left: int) -> None:
        now = min(left, FRAMES_PER_WRITE)
        for _ in range(now):
            self._transport.write(FRAME_CHUNK)
        if left > now:
            asyncio.get_running_loop().call_soon(self._frames, left - now)
        else:
            self._transport.write(STREAM_END)


async def serve_mock(port: int) -> None:
    """Serve until killed."""
    server = await asyncio.get_running_loop().create_server(MockNode, "127.0.0.1", port)
    await server.serve_forever()


@dataclass
class Load:
    """What a client asks again and again, and where an answer ends."""

    port: int
    body: bytes
    ending: bytes

    @property
    def request(self) -> bytes:
        """The bytes of one request."""
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        return head + b"content-length: %d\r\n\r\n" % len(self.body) + self.body


class Client(asyncio.Protocol):
    """One busy connection. ``latencies_s`` are from request to end, ``first_s`` to the first byte of a body."""

    def __init__(self, load: Load, deadline: float) -> None:
        self._load = load
        self._request = load.request
        self._deadline = deadline
        self.latencies_s: list[float] = []
        self.first_s: list[float] = []
        self.num_frames = 0
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first request."""
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        self._ask()

    def _ask(self) -> None:
        self._tail = b""
        self._has_first = False
        self._asked_at = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Look for the end of the answer."""
        if not self._has_first and b"choices" in data:
            self._has_first = True
            self.first_s.append(time.perf_counter() - self._asked_at)
        self.num_frames += data.count(b"data: {")
        self._tail = (self._tail + data)[-len(self._load.ending) :]
        if self._tail != self._load.ending:
            return
        now = time.perf_counter()
        self.latencies_s.append(now - self._asked_at)
        if now < self._deadline:
            self._ask()
        else:
            self._transport.close()
            self.done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail the run if an answer was cut."""
        if not self.done.done():
            self.done.set_exception(exc or ConnectionError("closed in the middle of an answer"))


@dataclass
class Figures:
    """Of one run: per second, and in milliseconds."""

    requests_per_s: float
    frames_per_s: float
    p50_ms: float
    p99_ms: float
    first_p50_ms: float


async def measure(load: Load, num_connections: int, seconds: float) -> Figures:
    """Keep ``num_connections`` busy for ``seconds``."""
    loop = asyncio.get_running_loop()
    started = time.perf_counter()
    clients = []
    for _ in range(num_connections):
        _, client = await loop.create_connection(lambda: Client(load, started + seconds), "127.0.0.1", load.port)
        clients.append(client)
    async with asyncio.timeout(seconds * 4 + 30):
        await asyncio.gather(*(client.done for client in clients))
    elapsed = time.perf_counter() - started
    latencies = sorted(latency for client in clients for latency in client.latencies_s)
    firsts = [first for client in clients for first in client.first_s]
    return Figures(
        len(latencies) / elapsed,
        sum(client.num_frames for client in clients) / elapsed,
        statistics.median(latencies) * 1e3,
        latencies[int(len(latencies) * 0.99)] * 1e3,
        statistics.median(firsts) * 1e3,
    )


def free_port() -> int:
    """Return a free port of 127.0.0.1."""
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


@contextlib.contextmanager
def process(*arguments: str, port: int, path: str, **environment: str) -> Iterator[None]:
    """Run a server until the block is left, and wait until ``path`` answers."""
    running = subprocess.Popen(
        arguments, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=2) as reply:
                    if b'"nodes_up":0' not in reply.read():
                        break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                pass
            if running.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{arguments[0]} does not answer at {path}")
            time.sleep(0.05)
        yield
    finally:
        running.send_signal(signal.SIGTERM)
        running.wait(20)


def main() -> None:
    """Measure and print."""
    parser = report.arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of each run")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind, direct and through cortex in turn")
    parser.add_argument("--mock", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.mock:
        uvloop.run(serve_mock(options.mock))
        return
    node_port, port, metrics_port = free_port(), free_port(), free_port()
    with tempfile.TemporaryDirectory() as folder:
        config = pathlib.Path(folder, "cortex.toml")
        config.write_text(
            f'[gateway]\nmetrics_listen = "127.0.0.1:{metrics_port}"\n'
            f'[[neurons]]\nname = "mock"\nendpoint = "http://127.0.0.1:{node_port}"\n'
        )
        pathlib.Path(folder, "models.toml").write_text("")
        granian = str(pathlib.Path(sys.executable).with_name("granian"))
        serve = ("--interface", "asgi", "--loop", "uvloop", "--port", str(port), "cortex.asgi:app")
        with (
            process(sys.executable, __file__, "--mock", str(node_port), port=node_port, path="/health"),
            process(granian, *serve, port=port, path="/health", CORTEX_CONFIG=str(config)),
        ):
            uvloop.run(story(node_port, port, options.seconds, options.rounds, options.keep))


async def story(node_port: int, port: int, seconds: float, rounds: int, keep: bool) -> None:
    """Run all runs, direct and through cortex in turn, and write the table of medians."""
    plain = b'{"model":"m","messages":[{"role":"user","content":"%s"}]}' % (b"word " * 40)
    large = b'{"model":"m","messages":[{"role":"user","content":"%s"}]}' % (b"word " * 12_000)
    streamed = b'{"model":"m","stream":true,"messages":[{"role":"user","content":"%s"}]}' % (b"word " * 40)
    kinds = (
        ("answer", plain, 1, ANSWER[-16:]),
        ("answer", plain, 16, ANSWER[-16:]),
        ("answer", plain, 64, ANSWER[-16:]),
        ("answer, 60 KB asked", large, 16, ANSWER[-16:]),
        ("stream of 200 frames", streamed, 1, b"0\r\n\r\n"),
        ("stream of 200 frames", streamed, NUM_STREAMS, b"0\r\n\r\n"),
    )
    rows, ratios = [], {}
    for name, body, num_connections, ending in kinds:
        figures: dict[int, list[Figures]] = {node_port: [], port: []}
        for where in figures:
            await measure(Load(where, body, ending), num_connections, WARM_UP_S)
        for _ in range(rounds):
            for where, found in figures.items():
                found.append(await measure(Load(where, body, ending), num_connections, seconds))
        direct, through = (median(figures[where]) for where in (node_port, port))
        is_stream = body is streamed
        rate = "frames_per_s" if is_stream else "requests_per_s"
        ratio = getattr(through, rate) / getattr(direct, rate)
        rows.append(
            {
                "asked": name,
                "connections": num_connections,
                "unit": "frames/s" if is_stream else "requests/s",
                "direct": getattr(direct, rate),
                "cortex": getattr(through, rate),
                "ratio": ratio,
                "added p50 ms": through.p50_ms - direct.p50_ms,
                "added p99 ms": through.p99_ms - direct.p99_ms,
                "added first p50 ms": through.first_p50_ms - direct.first_p50_ms if is_stream else None,
            }
        )
        key = "sse" if is_stream else "rps_60k" if body is large else "rps"
        ratios[f"{key}_{num_connections}"] = ratio
    report.write(
        "gateway_overhead",
        rows,
        question="What does cortex (Granian, ASGI, one worker) cost over asking the node directly?",
        packages=["granian", "uvloop", "httptools"],
        ratios=ratios,
        keep=keep,
    )


def median(runs: list[Figures]) -> Figures:
    """Return the median of each figure."""
    return Figures(*(statistics.median(getattr(run, field) for run in runs) for field in Figures.__dataclass_fields__))


if __name__ == "__main__":
    main()
