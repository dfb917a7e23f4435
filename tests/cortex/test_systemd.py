"""Notifications of the service manager and socket activation, by the real commands."""

import asyncio
import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import daemons
import httpx
import pytest
from fake_node import FakeNode
from gateway_rig import write_config

from cortex import systemd

BIN = pathlib.Path(sys.executable).parent


class Manager:
    """The receiving end of ``$NOTIFY_SOCKET``."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address.replace("@", "\0", 1))
        self._socket.setblocking(False)
        self.messages: list[str] = []

    def count(self, message: str) -> int:
        """Return the number of such messages so far."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.messages.append(self._socket.recv(4096).decode())
        return self.messages.count(message)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def short_path() -> Iterator[pathlib.Path]:
    """A folder for sockets, whose names may have 107 bytes, however long the path of temporary files is."""
    with tempfile.TemporaryDirectory(prefix="helexa-", dir="/tmp") as folder:
        yield pathlib.Path(folder)


@pytest.fixture
def manager(short_path: pathlib.Path) -> Iterator[Manager]:
    found = Manager(str(short_path / "notify"))
    yield found
    found.close()


def test_a_message_goes_to_a_path_or_an_abstract_name_and_is_dropped_without_a_manager(
    short_path: pathlib.Path,
) -> None:
    for address in (str(short_path / "n"), f"@helexa-test-{os.getpid()}"):
        manager = Manager(address)
        assert systemd.notify("X=1", {"NOTIFY_SOCKET": address})
        assert manager.count("X=1") == 1
        manager.close()
    assert not systemd.notify("X=1", {})
    for missing in (str(short_path / "missing"), f"/tmp/{'long/' * 60}missing"):
        assert not systemd.notify("X=1", {"NOTIFY_SOCKET": missing})


@pytest.mark.parametrize(("given", "limit_s"), [("3000000", 3.0), ("", 0.0), ("x", 0.0), ("0", 0.0)])
def test_the_timeout_of_the_watchdog(given: str, limit_s: float) -> None:
    assert systemd.watchdog_s({"WATCHDOG_USEC": given}) == limit_s


def test_only_sockets_of_this_process_are_taken() -> None:
    mine = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2"}
    assert systemd.listen_fds(mine) == (3, 4)
    assert systemd.listen_fds(mine | {"LISTEN_PID": "1"}) == ()
    assert systemd.listen_fds({}) == ()


async def test_a_loop_that_hangs_falls_silent(manager: Manager) -> None:
    environment = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "30000"}
    pulse = asyncio.create_task(systemd.stay_alive(environment))
    try:
        async with asyncio.timeout(5):
            while manager.count(systemd.ALIVE) < 3:
                await asyncio.sleep(0.005)
        before = manager.count(systemd.ALIVE)
        __import__("time").sleep(0.2)
        assert manager.count(systemd.ALIVE) == before
    finally:
        pulse.cancel()
    await asyncio.wait_for(systemd.stay_alive({}), 1)


@pytest.mark.parametrize("workers", [1, 2])
async def test_the_gateway_notifies_ready_alive_and_stopping(
    tmp_path: pathlib.Path, manager: Manager, workers: int
) -> None:
    neuron = FakeNode()
    port = daemons.free_port()
    async with neuron.serving():
        config = write_config(tmp_path, neuron, gateway=f'listen = "127.0.0.1:{port}"\nmetrics_listen = ""\n')
        process = subprocess.Popen(
            [str(BIN / "cortex"), "serve", "--config", str(config), "--workers", str(workers)],
            env={**os.environ, "NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "600000"},
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        try:
            await asyncio.to_thread(daemons.until, lambda: manager.count(systemd.READY) == workers)
            await asyncio.to_thread(daemons.until, lambda: manager.count(systemd.ALIVE) > 2 * workers)
            assert manager.count(systemd.STOPPING) == 0
        finally:
            process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(process.wait, 15) == 0
        assert manager.count(systemd.STOPPING) == 1


def test_the_neuron_notifies_ready_alive_and_stopping(tmp_path: pathlib.Path, manager: Manager) -> None:
    port = daemons.free_port()
    arguments = ("--devices", "cpu", "--listen", f"127.0.0.1:{port}")
    environment = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "600000"}
    with daemons.daemon("neuron", *arguments, port=port, log=tmp_path / "log", **environment) as node:
        daemons.until(lambda: manager.count(systemd.READY) == 1)
        assert node.get("/version")["name"] == "neuron"
        daemons.until(lambda: manager.count(systemd.ALIVE) > 2)
        assert manager.count(systemd.STOPPING) == 0
    assert manager.count(systemd.STOPPING) == 1


async def test_the_gateway_takes_the_socket_that_it_is_handed(tmp_path: pathlib.Path) -> None:
    neuron = FakeNode().ready("m")
    async with neuron.serving():
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(64)
            port = listener.getsockname()[1]
            config = write_config(tmp_path, neuron, gateway=f'listen = "127.0.0.1:{port}"\nmetrics_listen = ""\n')
            process = daemons.with_socket(listener, str(BIN / "cortex"), "serve", "--config", str(config))
            # A client that comes before the gateway does is served when that is there.
            try:
                async with httpx.AsyncClient(timeout=30) as client:
                    reply = await client.get(f"http://127.0.0.1:{port}/health")
                assert reply.status_code == 200
            finally:
                process.send_signal(signal.SIGTERM)
                assert await asyncio.to_thread(process.wait, 15) == 0


def test_a_socket_elsewhere_stops_the_start(tmp_path: pathlib.Path) -> None:
    config = write_config(tmp_path, FakeNode(port=1), gateway='listen = "127.0.0.1:1"\nmetrics_listen = ""\n')
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        process = daemons.with_socket(listener, str(BIN / "cortex"), "serve", "--config", str(config))
        assert process.wait(20) == 2
