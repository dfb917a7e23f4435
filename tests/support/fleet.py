"""Fleets on loopback ports, of any number of neurons and gateways; every process is a real daemon.

Neurons have the real small model on the CPU, or scripted models on fake GPUs.
"""

import asyncio
import contextlib
import os
import pathlib
import random
import re
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import Any, TypeVar

import daemons
import httpx
import psutil
from daemons import Command, Daemon
from scripted_model import describe

from cortex.access import local

T = TypeVar("T")

GPUS = {"a": {"cuda:0": 40}, "b": {"cuda:0": 24}, "c": {"cuda:0": 24}, "d": {"cuda:0": 12, "cuda:1": 12}}
HOSTS: Mapping[str, Mapping[str, float]] = {
    "gpu-1": {"cuda:0": 80, "cuda:1": 80},
    "gpu-2": {"cuda:0": 48},
    "gpu-3": {"cuda:0": 24},
}
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

REAL = daemons.MODEL
# Name, GiB, seconds to load, devices.
PRETENDED: tuple[tuple[str, float, float, int], ...] = (
    ("Qwen3-32B", 30, 4.0, 1),
    ("Qwen3-235B-A22B", 140, 3.0, 2),
    ("Llama-3.3-70B", 60, 2.0, 1),
    ("Gemma-3-27B", 24, 6.0, 1),
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


NO_STORE = '[store]\nkind = "none"\n'
TWO_WORKERS = (
    "workers = 2\ndrain_timeout_s = 5\nmax_connections_per_node = 4096\n"
    f"[gateway.timeouts]\n{TIMEOUTS}"
    "[gateway.polling]\ninterval_s = 0.2\ntimeout_s = 1.0\nmax_backoff_s = 0.5\n"
    "[gateway.breaker]\nopen_s = 0.5\nmax_open_s = 1.0\n"
)


def polled(interval_s: float = 0.2) -> str:
    """Return settings of a gateway that polls its nodes so often."""
    return (
        f"drain_timeout_s = 15\n[gateway.polling]\ninterval_s = {interval_s}\nmax_backoff_s = {max(0.5, interval_s)}\n"
    )


class Gateway(Command):
    """``cortex serve`` over ``nodes``; ``settings`` follow its addresses in ``cortex.toml``, ``more`` ends it."""

    def __init__(
        self,
        folder: pathlib.Path,
        nodes: Mapping[str, str],
        models: str,
        keys: str = "",
        settings: str = polled(),
        more: str = NO_STORE,
    ) -> None:
        folder.mkdir(exist_ok=True)
        config, port = folder / "cortex.toml", daemons.free_port()
        super().__init__("cortex", "serve", "--config", str(config), port=port, log=folder / "cortex.log")
        self.metrics_port = daemons.free_port()
        self.nodes = dict(nodes)
        endpoints = "".join(f'[[neurons]]\nname = "{name}"\nendpoint = "{url}"\n' for name, url in nodes.items())
        metrics = "" if "workers" in settings else f"127.0.0.1:{self.metrics_port}"
        (folder / "models.toml").write_text(models)
        (folder / "keys.toml").write_text(keys)
        config.write_text(
            f'[gateway]\nlisten = "127.0.0.1:{port}"\nmetrics_listen = "{metrics}"\n{settings}'
            + (f'[access]\nkeys = "{folder / "keys.toml"}"\n' if keys else "")
            + endpoints
            + more
        )

    def start(self) -> None:
        """Serve, and return when every node is up."""
        super().start()
        daemons.until(lambda: (h := self.get("/health")) and h["nodes_up"] == h["nodes"], 30, "all nodes are up")

    @property
    def link(self) -> str:
        """The address of the page with the local administrator's key, which exists from the first start on."""
        return f"{self.url}/#key={self.token()}"


@contextlib.contextmanager
def neurons(
    folder: pathlib.Path, gpus: Mapping[str, Mapping[str, float]] = HOSTS, *, scripted: bool = True
) -> Iterator[dict[str, str]]:
    """Run two neurons on the CPU and some with fake GPUs; return their addresses.

    Without ``scripted`` none of them plays the scenarios of tests.
    """
    commands = {name: daemons.scripted_node(folder, name, devices) for name, devices in gpus.items()}
    for name in ("cpu-1", "cpu-2"):
        port, config = daemons.free_port(), folder / f"{name}.toml"
        config.write_text(f'[daemon]\nname = "{name}"\nlisten = "127.0.0.1:{port}"\ndevices = "cpu"\n')
        commands[name] = Command("neuron", "--config", str(config), port=port, log=folder / f"{name}.log")
    with contextlib.ExitStack() as stack:
        found = {name: stack.enter_context(commands[name].running()).url for name in sorted(commands)}
        if scripted:
            found["scripted"] = stack.enter_context(daemons.scripted_neuron(folder)).url
        yield found


def profile(
    folder: pathlib.Path, name: str, gib: float, load_s: float, devices: int = 1, more: str = "", fails: str = ""
) -> str:
    """Write a scripted model's file; return its part of ``models.toml``."""
    path = describe(folder, name, gib, load_s, devices, fails)
    wide = f"tensor_parallel = {devices}\n" if devices > 1 and "tensor_parallel" not in more else ""
    return f'[[models]]\nid = "{name}"\nsource = "{path}"\n{wide}{more}\n'


def catalogue(folder: pathlib.Path, weights: pathlib.Path) -> str:
    """Return a ``models.toml``: the real model for the two CPUs, and the pretended ones."""
    real = f'[[models]]\nid = "{REAL}"\nsource = "{weights}"\naliases = ["small"]\npreferred_nodes = ["cpu-1"]\n'
    more = 'preferred_nodes = ["gpu-1"]\nprice = { input = 1.0, output = 4.0 }'
    return real + "".join(profile(folder, *model, more=more) for model in PRETENDED)


class Fleet:
    """Neurons and gateways of two workers; ``make_gateway`` returns one more by its name and the end of its file."""

    def __init__(
        self,
        nodes: dict[str, Command],
        gateways: list[Gateway],
        proxy: Proxy,
        make_gateway: Callable[[str, str], Gateway],
    ) -> None:
        self.nodes = nodes
        self.gateways = gateways
        self.proxy = proxy
        self._make_gateway = make_gateway

    @contextlib.contextmanager
    def with_gateway(self, name: str, more: str = NO_STORE) -> Iterator["Fleet"]:
        """Yield this fleet behind one more gateway alone."""
        gateway = self._make_gateway(name, more)
        with gateway.running():
            yield Fleet(self.nodes, [gateway], self.proxy, self._make_gateway)

    def without(self, name: str) -> "Fleet":
        """Return this fleet but for a node."""
        rest = {other: node for other, node in self.nodes.items() if other != name}
        return Fleet(rest, self.gateways, self.proxy, self._make_gateway)

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
        """Wait until no gateway and no node counts a request."""
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
                f"{node.log.stem} runs nothing",
            )


class Client:
    """Client that asks the gateways round-robin."""

    def __init__(self, http: httpx.AsyncClient, urls: list[str]) -> None:
        self.http = http
        self.urls = urls
        self._num_asked = 0

    def url(self, gateway: int | None = None) -> str:
        self._num_asked += 1
        return self.urls[(self._num_asked if gateway is None else gateway) % len(self.urls)]

    async def chat(self, model: str, prompt: str = "tokens=3", gateway: int | None = None) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": 8}
        return await self.http.post(f"{self.url(gateway)}/v1/chat/completions", json=body)

    async def stream(self, model: str, prompt: str = "tokens=3", gateway: int | None = None) -> AsyncIterator[str]:
        """Yield the lines of a stream."""
        body = {"model": model, "messages": [{"role": "user", "content": prompt}], "stream": True}
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


def workers_of(running: Daemon) -> list[psutil.Process]:
    """Return a gateway's worker processes."""
    return [child for child in psutil.Process(running.process.pid).children() if child.is_running()]


def hang_up(running: Daemon) -> None:
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
