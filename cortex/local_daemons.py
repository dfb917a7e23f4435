"""A neuron and a gateway of one command, on this machine: started by their usual commands, ended with it.

Their files are in a folder that the command gives. Ports that are in use are replaced by free ones.
"""

import contextlib
import http.client
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from cortex.extras import INSTALL, missing_for_neuron
from cortex.gateway_client import GatewayError

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 20.0
CHECK_S = 0.1
GATEWAY_PORT, METRICS_PORT, NEURON_PORT = 31313, 31314, 13131


class StartError(GatewayError):
    """The daemons do not start; the message has the reason and the logs."""


class LocalDaemons:
    """Both daemons while they run."""

    def __init__(self, folder: pathlib.Path, url: str, processes: Sequence["subprocess.Popen[bytes]"]) -> None:
        self._folder, self.url, self._processes = folder, url, processes

    def check(self) -> None:
        """Raise :class:`StartError` if a daemon has ended by itself."""
        for process in self._processes:
            if process.poll() is not None:
                name = pathlib.Path(str(process.args[0])).name  # type: ignore[index]
                log = self._folder / f"{name}.log"
                raise StartError(f"{name} ended with status {process.returncode}: {_last_line(log)} (all of it: {log})")


@contextlib.contextmanager
def local_daemons(
    folder: pathlib.Path, *, devices: str = "auto", models: str = "", settings: str = "", uses_neuron: bool = False
) -> Iterator[LocalDaemons]:
    """Run both daemons for the block, and yield them once a model can be loaded.

    ``models`` is the catalogue as TOML, ``settings`` are tables of ``cortex.toml``. With ``uses_neuron``, a neuron that
    runs at the default port is the node, and none is started. SIGTERM is a
    :class:`KeyboardInterrupt` in the block, so that the daemons end with the command.

    Raises:
        StartError: a program or a package is missing, or a daemon ends by itself.
    """
    _check_commands()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    is_there = uses_neuron and (_get(NEURON_PORT, "/version") or {}).get("name") == "neuron"
    gateway, metrics, neuron = _ports()
    neuron = NEURON_PORT if is_there else neuron
    (folder / "cortex.toml").write_text(
        f'gateway.listen = "127.0.0.1:{gateway}"\ngateway.metrics_listen = "127.0.0.1:{metrics}"\n'
        f'neurons = [{{ name = "local", endpoint = "http://127.0.0.1:{neuron}" }}]\n\n{settings}'
    )
    (folder / "models.toml").write_text(models)
    (folder / "neuron.toml").write_text(f'[daemon]\nname = "local"\nlisten = "127.0.0.1:{neuron}"\n')
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ValueError):  # of a thread that is not the main one
            stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, _interrupt))
        node = _process(folder, "neuron", "--devices", devices, "--config", f"{folder}/neuron.toml")
        server = _process(folder, "cortex", "serve", "--config", f"{folder}/cortex.toml")
        processes = [stack.enter_context(each) for each in ([server] if is_there else [node, server])]
        daemons = LocalDaemons(folder, f"http://127.0.0.1:{gateway}", processes)
        _wait_until_ready(daemons, gateway, neuron)
        yield daemons


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _check_commands() -> None:
    for program in map(_program, ("neuron", "cortex")):
        if not program.exists():
            raise StartError(f"{program} is not there: both daemons run from one environment: {INSTALL}")
    if missing := missing_for_neuron():
        raise StartError(f"a model needs {', '.join(missing)}, not installed here: {INSTALL}")


def _program(command: str) -> pathlib.Path:
    return pathlib.Path(sys.executable).with_name(command)


def _ports() -> tuple[int, int, int]:
    """Return the default ports, or free ports in place of ports in use."""
    with contextlib.ExitStack() as stack:
        return tuple(_free_port(stack, port) for port in (GATEWAY_PORT, METRICS_PORT, NEURON_PORT))  # type: ignore[return-value]


def _free_port(stack: contextlib.ExitStack, wanted: int) -> int:
    """Return ``wanted`` or a free port, which is held until ``stack`` closes so that no two are the same."""
    for port in (wanted, 0):
        trial = stack.enter_context(socket.socket())
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            trial.bind(("127.0.0.1", port))
            return int(trial.getsockname()[1])
    raise StartError("no free port on 127.0.0.1")


@contextlib.contextmanager
def _process(folder: pathlib.Path, command: str, *arguments: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a command, logging into the folder; at the end of the context it is terminated, then killed."""
    with (folder / f"{command}.log").open("wb") as log:
        process = subprocess.Popen(
            [str(_program(command)), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={k: v for k, v in os.environ.items() if not k.startswith(("CORTEX_", "NEURON_DAEMON"))},
            start_new_session=True,  # Ctrl-C is for the command, which then sends SIGTERM to the daemons in order
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(daemons: LocalDaemons, gateway: int, neuron: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        daemons.check()
        node, server = _get(neuron, "/health") or {}, _get(gateway, "/health") or {}
        if node.get("state") == "ready" and server.get("nodes_up"):
            return
        time.sleep(CHECK_S)
    raise StartError(f"the daemons are not ready after {START_TIMEOUT_S:.0f} s")


def _last_line(path: pathlib.Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it logged nothing"


def _get(port: int, path: str) -> dict[str, Any] | None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        reply = connection.getresponse()
        found: dict[str, Any] = json.loads(reply.read())
        return found if reply.status == 200 else None
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        connection.close()
