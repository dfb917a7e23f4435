"""A fleet on loopback ports: four neurons with fake GPUs, two with the real model, two gateways of two workers.

One of the pretended ones is reached through a proxy, so that its network can be cut. Every process is a real daemon.
"""

import asyncio
import contextlib
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, TypeVar

import daemons
import httpx
import psutil

from cortex.access import local

T = TypeVar("T")

GPUS = {"a": {"cuda:0": 40}, "b": {"cuda:0": 24}, "c": {"cuda:0": 24}, "d": {"cuda:0": 12, "cuda:1": 12}}
TIMEOUTS = "connect_s = 1.0\nfirst_byte_s = 4.0\nanswer_s = 20.0\nstall_s = 3.0\nload_stall_s = 20.0\n"

# Name, GiB, seconds to load, and more of its profile.
MODELS: tuple[tuple[str, float, float, str], ...] = (
    ("slow", 2, 2.0, ""),
    ("cold", 2, 0.5, ""),
    ("x", 30, 0.05, ""),  # x and y fit on a alone, and not together
    ("y", 30, 0.05, ""),
    ("kill", 4, 0.05, 'preferred_nodes = ["b"]'),
    ("freeze", 4, 0.05, 'preferred_nodes = ["b"]'),
    ("cut", 4, 0.05, 'preferred_nodes = ["c"]'),
    ("wide", 20, 0.05, 'tensor_parallel = 2\npreferred_nodes = ["d"]'),
    ("many", 2, 0.05, 'preferred_nodes = ["b"]'),
    ("huge", 500, 0.05, ""),
    ("broken", 2, 0.05, ""),
    *((f"s{i}", 12, 0.01, "tensor_parallel = 2") for i in range(8)),  # two of them fit on d, and none elsewhere
    *((f"p{i}", 12, 0.01, f"tensor_parallel = 2\npriority = {i}") for i in range(3)),  # nor of these
)


class Proxy:
    """Passes connections on to a port until it is cut, each piece of an answer ``delay_s`` late."""

    def __init__(self, target: int) -> None:
        self.port = daemons.free_port()
        self.delay_s = 0.0
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.heal()

    def heal(self) -> None:
        self._do(self._listen())

    def cut(self) -> None:
        self._do(self._drop())

    def close(self) -> None:
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._pass, "127.0.0.1", self.port)

    async def _drop(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in tuple(self._writers):
            writer.transport.abort()
        while self._writers:
            await asyncio.sleep(0.01)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            there = await asyncio.open_connection("127.0.0.1", self._target)
            await asyncio.gather(self._copy(reader, there[1]), self._copy(there[0], writer, is_answer=True))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, is_answer: bool = False) -> None:
        self._writers.add(writer)
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                arrived = time.monotonic()
                while is_answer and time.monotonic() < arrived + self.delay_s and not writer.is_closing():
                    await asyncio.sleep(0.01)
                writer.write(data)
                await writer.drain()
        self._writers.discard(writer)
        writer.close()


class Node:
    """A pretended neuron, which can be killed, frozen and started again at the same port."""

    def __init__(self, folder: pathlib.Path, name: str, port: int) -> None:
        self.name = name
        self.port = port
        self.log = folder / f"{name}.log"
        self.start()

    def start(self) -> None:
        settings = json.dumps({"port": self.port, "name": self.name, "devices": GPUS[self.name]})
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, daemons.SCRIPTED_NODE, settings],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        daemons.until(lambda: self.get("/health"), 30, f"{self.name} serves")

    def get(self, path: str) -> Any:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}{path}", timeout=2).json()
        except httpx.HTTPError:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            return None

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.send(signal.SIGCONT)
            self.send(signal.SIGTERM)
            try:
                assert self.process.wait(15) == 0, self.log.read_text()[-3000:]
            except subprocess.TimeoutExpired:
                self.kill()
                raise


StartGateway = Callable[[str, str], contextlib.AbstractContextManager[daemons.Daemon]]

NO_STORE = '[store]\nkind = "none"\n'


class Fleet:
    """Everything that runs."""

    def __init__(
        self, nodes: dict[str, Node], gateways: list[daemons.Daemon], proxy: Proxy, start_gateway: "StartGateway"
    ) -> None:
        self.nodes = nodes
        self.gateways = gateways
        self.proxy = proxy
        self._start_gateway = start_gateway

    @contextlib.contextmanager
    def with_gateway(self, name: str, more: str = NO_STORE) -> Iterator["Fleet"]:
        """Have this fleet behind one more gateway, and be asked through that alone, while the block runs."""
        with self._start_gateway(name, more) as running:
            daemons.until(lambda: (running.get("/health") or {}).get("nodes_up") == 6, 30, "all are up")
            yield Fleet(self.nodes, [running], self.proxy, self._start_gateway)

    def without(self, name: str) -> "Fleet":
        """Return this fleet but for a node."""
        rest = {other: node for other, node in self.nodes.items() if other != name}
        return Fleet(rest, self.gateways, self.proxy, self._start_gateway)

    def loads(self, model: str) -> int:
        """Return how often any node has loaded a model."""
        pattern = re.compile(rf"loaded model={re.escape(model)} ")
        return sum(len(pattern.findall(node.log.read_text())) for node in self.nodes.values())

    def where(self, model: str) -> list[str]:
        """Return the nodes that have a model ready."""
        return [
            name
            for name, node in self.nodes.items()
            for known in (node.get("/models") or {"models": ()})["models"]
            if known["id"] == model and known["state"] == "ready"
        ]

    def run(self, story: Callable[["Client"], Awaitable[T]]) -> T:
        """Run a story with a client of both gateways."""

        async def bounded() -> T:
            async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None)) as http:
                return await story(Client(http, [gateway.url for gateway in self.gateways]))

        return asyncio.run(bounded())

    def assert_idle(self) -> None:
        """Wait until nobody counts a request any more, on either side."""
        for gateway in self.gateways:
            # Each look may reach another worker.
            daemons.until(
                lambda gateway=gateway: all((gateway.get("/health") or {}).get("in_flight") == 0 for _ in range(6)),
                20,
                "no gateway counts a request",
            )
        for node in self.nodes.values():
            daemons.until(
                lambda node=node: sum(model["running"] for model in node.get("/models")["models"]) == 0,
                20,
                f"{node.name} runs nothing",
            )


class Client:
    """Asks the gateways in turn."""

    def __init__(self, http: httpx.AsyncClient, urls: list[str]) -> None:
        self.http = http
        self.urls = urls
        self._num_asked = 0

    def url(self, gateway: int | None = None) -> str:
        self._num_asked += 1
        return self.urls[(self._num_asked if gateway is None else gateway) % len(self.urls)]

    async def chat(self, model: str, say: str = "tokens=3", gateway: int | None = None) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": say}], "max_tokens": 8}
        return await self.http.post(f"{self.url(gateway)}/v1/chat/completions", json=body)

    async def stream(self, model: str, say: str = "tokens=3", gateway: int | None = None) -> AsyncIterator[str]:
        """Yield the lines of a stream."""
        body = {"model": model, "messages": [{"role": "user", "content": say}], "stream": True}
        async with self.http.stream("POST", f"{self.url(gateway)}/v1/chat/completions", json=body) as reply:
            if reply.status_code != 200:
                yield f"status {reply.status_code} {(await reply.aread()).decode()}"
                return
            async for line in reply.aiter_lines():
                if line:
                    yield line

    async def act(self, path: str, **body: Any) -> httpx.Response:
        token = local.find(int(self.urls[0].rpartition(":")[2]), os.environ)
        headers = {"authorization": f"Bearer {token}"}
        return await self.http.post(f"{self.urls[0]}/admin/{path}", json=body, headers=headers)


@contextlib.contextmanager
def gateway(
    folder: pathlib.Path, endpoints: dict[str, str], models: str, name: str, more: str = NO_STORE
) -> Iterator[daemons.Daemon]:
    """A gateway of two workers over ``endpoints``; ``more`` ends its ``cortex.toml``."""
    port = daemons.free_port()
    own = folder / name
    own.mkdir()
    nodes = "".join(f'[[neurons]]\nname = "{node}"\nendpoint = "{url}"\n' for node, url in endpoints.items())
    (own / "models.toml").write_text(models)
    (own / "cortex.toml").write_text(
        f'[gateway]\nlisten = "127.0.0.1:{port}"\nmetrics_listen = ""\nworkers = 2\ndrain_timeout_s = 5\n'
        "max_connections_per_node = 4096\n"
        f"[gateway.timeouts]\n{TIMEOUTS}"
        "[gateway.polling]\ninterval_s = 0.2\ntimeout_s = 1.0\nmax_backoff_s = 0.5\n"
        "[gateway.breaker]\nopen_s = 0.5\nmax_open_s = 1.0\n"
        f"{nodes}{more}"
    )
    with daemons.daemon(
        "cortex", "serve", "--config", str(own / "cortex.toml"), port=port, log=own / "cortex.log"
    ) as found:
        yield found


def workers_of(running: daemons.Daemon) -> list[psutil.Process]:
    """Return a gateway's worker processes."""
    return [child for child in psutil.Process(running.process.pid).children() if child.is_running()]


def hang_up(running: daemons.Daemon) -> None:
    os.kill(running.process.pid, signal.SIGHUP)


async def swap_at_random(client: Client, total: int, callers: int = 6) -> dict[str, int]:
    """Ask for the models ``s0`` to ``s7`` in random order; return how many answers were right, typed errors, wrong."""
    dice = random.Random(5)
    counts = {"right": 0, "typed": 0, "wrong": 0}
    left = total

    async def caller() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            name = f"s{dice.randrange(8)}"
            reply = await client.chat(name)
            if reply.status_code == 200 and reply.json()["choices"][0]["message"]["content"].startswith(f"{name}:0"):
                counts["right"] += 1
            elif reply.status_code in {429, 503}:
                counts["typed"] += 1
            else:
                counts["wrong"] += 1

    await asyncio.gather(*(caller() for _ in range(callers)))
    return counts
