"""SIGTERM under load, and gateways that restart one after another: requests that reached them are answered."""

import asyncio
import contextlib
import json
import pathlib
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import daemons
import httpx
import pytest
import uvloop
from answers import CHAT_STREAM
from fake_node import FakeNode, Line, Received, answer
from gateway_rig import until, write_config

from cortex.server import ending
from cortex.wire.node import ModelSpec, ModelStatus

BIN = pathlib.Path(sys.executable).parent


async def slowly(received: Received, line: Line) -> None:
    """Answer after a few milliseconds, or SSE event by SSE event."""
    if not json.loads(received.body).get("stream"):
        await asyncio.sleep(0.005)
        await answer(received, line)
        return
    await line.start_stream()
    for sse_event in CHAT_STREAM:
        await asyncio.sleep(0.01)
        await line.chunk(sse_event)
    await line.end()


class Client:
    """A client that retries a request only if its connection was refused: any other failure is a lost request."""

    def __init__(self, port: int, *, stream: bool, keeps_alive: bool) -> None:
        self._port = port
        self._stream = stream
        self._keeps_alive = keeps_alive

    async def run(self, results: Counter[str], stop: asyncio.Event) -> None:
        """Ask again and again; count answers and what went wrong."""
        connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        while not stop.is_set():
            try:
                if connection is None:
                    connection = await asyncio.open_connection("127.0.0.1", self._port)
                    results["connections"] += 1
                is_last = await self._ask(*connection)
                results["answers"] += 1
                if is_last or not self._keeps_alive:
                    connection[1].close()
                    connection = None
            except ConnectionRefusedError:
                results["refused"] += 1
                await asyncio.sleep(0.01)
            except (asyncio.IncompleteReadError, ConnectionError) as error:
                results[f"lost: {type(error).__name__}"] += 1
                connection = None
        if connection is not None:
            connection[1].close()

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Send one request, read its answer, and return whether it is the last on its connection."""
        body = json.dumps({"model": "m", "messages": [], "stream": self._stream}).encode()
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%s" % (len(body), body)
        )
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        assert head.startswith("http/1.1 200 "), head
        headers = dict(row.split(": ", 1) for row in head.split("\r\n")[1:-2])
        if "content-length" in headers:
            await reader.readexactly(int(headers["content-length"]))
        else:
            while size := int(await reader.readuntil(b"\r\n"), 16):
                await reader.readexactly(size + 2)
            await reader.readexactly(2)
        return headers.get("connection") == "close"


@contextlib.asynccontextmanager
async def gateways(
    folder: pathlib.Path, neuron: FakeNode, listener: socket.socket
) -> AsyncIterator[Callable[[int], Awaitable[None]]]:
    """Two gateways on one listening socket; yields what restarts one of them and returns when it serves."""
    running: dict[int, subprocess.Popen[bytes]] = {}
    metrics = {index: daemons.free_port() for index in (0, 1)}
    port = listener.getsockname()[1]

    async def start(index: int) -> None:
        where = folder / str(index)
        where.mkdir(exist_ok=True)
        addresses = f'listen = "127.0.0.1:{port}"\nmetrics_listen = "127.0.0.1:{metrics[index]}"\n'
        config = write_config(where, neuron, gateway=addresses)
        running[index] = daemons.with_socket(listener, str(BIN / "cortex"), "serve", "--config", str(config))

        async def sees_its_node() -> bool:
            with contextlib.suppress(httpx.HTTPError):
                return "cortex_nodes_up 1.0" in (await client.get(f"http://127.0.0.1:{metrics[index]}/metrics")).text
            return False

        async with asyncio.timeout(30), httpx.AsyncClient() as client:
            while not await sees_its_node():
                await asyncio.sleep(0.02)

    async def restart(index: int) -> None:
        running[index].send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(running[index].wait, 15) == 0
        await start(index)

    try:
        await asyncio.gather(start(0), start(1))
        yield restart
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            assert await asyncio.to_thread(process.wait, 20) == 0


@contextlib.contextmanager
def listening() -> Iterator[socket.socket]:
    """A socket for gateways to be handed, which goes on listening while they restart."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1024)
        yield listener


@pytest.mark.parametrize("keeps_alive", [False, True], ids=["fresh", "kept"])
async def test_a_rolling_restart_loses_no_request(tmp_path: pathlib.Path, keeps_alive: bool) -> None:
    neuron = FakeNode(script=slowly).ready("m")
    results: Counter[str] = Counter()
    stop = asyncio.Event()
    with listening() as listener:
        port = listener.getsockname()[1]
        async with neuron.serving(), gateways(tmp_path, neuron, listener) as restart:
            clients = [Client(port, stream=i % 2 == 0, keeps_alive=keeps_alive) for i in range(16)]
            running = [asyncio.create_task(client.run(results, stop)) for client in clients]
            for index in (0, 1):
                before = results["answers"]
                await restart(index)
                assert results["answers"] > before, "the other one serves meanwhile"
            stop.set()
            await asyncio.gather(*running)
    assert not [what for what in results if what.startswith("lost")], results
    assert results["answers"] > 100
    assert len(neuron.requests) == results["answers"], "and none was asked twice"


async def test_one_gateway_that_restarts_behind_a_socket_unit_keeps_its_clients_waiting(tmp_path: pathlib.Path) -> None:
    """Hold the socket between two gateways, as systemd does with cortex.socket."""
    neuron = FakeNode(script=slowly).ready("m")
    results: Counter[str] = Counter()
    stop = asyncio.Event()
    with listening() as listener:
        port = listener.getsockname()[1]
        async with neuron.serving():
            config = write_config(tmp_path, neuron, gateway=f'listen = "127.0.0.1:{port}"\nmetrics_listen = ""\n')
            clients = [Client(port, stream=i % 2 == 0, keeps_alive=True) for i in range(8)]
            running = [asyncio.create_task(client.run(results, stop)) for client in clients]
            for _ in range(2):
                before = results["answers"]
                process = daemons.with_socket(listener, str(BIN / "cortex"), "serve", "--config", str(config))
                await until(lambda before=before: results["answers"] > before + 40)  # type: ignore[misc]
                process.send_signal(signal.SIGTERM)
                assert await asyncio.to_thread(process.wait, 15) == 0
            process = daemons.with_socket(listener, str(BIN / "cortex"), "serve", "--config", str(config))
            stop.set()
            await asyncio.gather(*running)
            process.terminate()
            assert await asyncio.to_thread(process.wait, 15) == 0
    assert set(results) == {"connections", "answers"}, results


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("waits_for", ["an answer", "a load"])
async def test_an_answer_beyond_the_limit_ends_in_its_dialect_and_the_exit_is_in_time(
    tmp_path: pathlib.Path, waits_for: str, stream: bool
) -> None:
    async def never(received: Received, line: Line) -> None:
        await asyncio.sleep(60)

    async def load(spec: ModelSpec) -> ModelStatus:
        await asyncio.sleep(60)
        raise AssertionError

    neuron = FakeNode(script=never, load=load).ready("m")
    port = daemons.free_port()
    async with neuron.serving(), httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        config = write_config(
            tmp_path,
            neuron,
            models='[[models]]\nid = "cold"\nsource = "/w"\n',
            gateway=f'listen = "127.0.0.1:{port}"\nmetrics_listen = ""\ndrain_timeout_s = 1\n',
        )
        process = subprocess.Popen([str(BIN / "cortex"), "serve", "--config", str(config)])
        try:

            async def serves() -> bool:
                with contextlib.suppress(httpx.HTTPError):
                    return bool((await client.get("/health")).json()["nodes_up"])
                return False

            async with asyncio.timeout(20):
                while not await serves():
                    await asyncio.sleep(0.02)
            body = {"model": "cold" if waits_for == "a load" else "m", "stream": stream}
            asking = asyncio.create_task(client.post("/v1/chat/completions", json=body))
            await until(lambda: neuron.requests or neuron.loads)
            await asyncio.sleep(0.5)  # beyond the moment for which headers are held back
            process.send_signal(signal.SIGTERM)
            sent_at = asyncio.get_running_loop().time()
            reply = await asking
            if stream:
                *_, last, rest = reply.content.split(b"\n\n")
                assert rest == b""
                error = json.loads(last.removeprefix(b"data: "))["error"]
            else:
                assert reply.status_code == 503
                assert reply.headers["retry-after"]
                error = reply.json()["error"]
            assert error["code"] == "gateway_stopped"
            with pytest.raises(httpx.ConnectError):
                async with httpx.AsyncClient() as late:
                    await late.get(f"http://127.0.0.1:{port}/health")
            assert await asyncio.to_thread(process.wait, 15) == 0
            assert asyncio.get_running_loop().time() - sent_at < 6
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


async def test_the_last_answer_on_a_kept_alive_connection_closes_it(tmp_path: pathlib.Path) -> None:
    neuron = FakeNode(script=slowly).ready("m")
    port = daemons.free_port()
    async with neuron.serving():
        config = write_config(tmp_path, neuron, gateway=f'listen = "127.0.0.1:{port}"\nmetrics_listen = ""\n')
        process = subprocess.Popen([str(BIN / "cortex"), "serve", "--config", str(config)])
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
                async with asyncio.timeout(20):
                    while True:
                        with contextlib.suppress(httpx.HTTPError):
                            before = await client.get("/version")
                            break
                        await asyncio.sleep(0.02)
                assert "connection" not in before.headers
                process.send_signal(signal.SIGTERM)
                await asyncio.sleep(0.3)  # within the second for which it still answers
                assert (await client.get("/version")).headers["connection"] == "close"
        finally:
            process.terminate()
            assert await asyncio.to_thread(process.wait, 15) == 0


@pytest.mark.parametrize("new_loop", [uvloop.new_event_loop, asyncio.new_event_loop])
def test_a_signal_between_the_start_and_the_first_request_is_not_forgotten(
    monkeypatch: pytest.MonkeyPatch, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """The server runs its loop once to start the gateway and once to serve: SIGTERM in between left it running."""
    begun: list[bool] = []
    monkeypatch.setattr(ending.Ending, "begin", lambda _: begun.append(True))

    async def start() -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: None)  # as the server has
        ending.Ending(1, [], lambda: None).listen_to_signals()

    before, loop = signal.getsignal(signal.SIGTERM), new_loop()
    try:
        loop.run_until_complete(start())
        signal.raise_signal(signal.SIGTERM)
        loop.run_until_complete(asyncio.sleep(0.01))
        assert begun == [True]
        loop.call_later(0.01, signal.raise_signal, signal.SIGTERM)
        loop.run_until_complete(asyncio.sleep(0.1))
        assert begun == [True, True]
    finally:
        signal.signal(signal.SIGTERM, before)
        loop.close()


def test_only_sockets_that_listen_for_clients_are_taken_away() -> None:
    code = """
import socket
from cortex.server import ending
clients, metrics = socket.create_server(("127.0.0.1", 0)), socket.create_server(("127.0.0.1", 0))
ports = [one.getsockname()[1] for one in (clients, metrics)]
caller = socket.create_connection(("127.0.0.1", ports[0]))
served, _ = clients.accept()
assert ending.stop_accepting(frozenset({ports[1]})) == {ports[0]}
assert ending.num_connections(frozenset({ports[0]})) == 1
served.sendall(b"still here")
assert caller.recv(20) == b"still here"
try:
    socket.create_connection(("127.0.0.1", ports[0]))
    raise SystemExit("it still listens")
except ConnectionRefusedError:
    pass
socket.create_connection(("127.0.0.1", ports[1])).close()
clients.setblocking(False)
try:
    clients.accept()
    raise SystemExit("somebody called")
except BlockingIOError:
    pass
served.close()
assert ending.num_connections(frozenset({ports[0]})) == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20)
    assert ending.num_connections(frozenset()) == 0


def test_to_look_for_its_sockets_leaves_no_descriptor_behind() -> None:
    before = len(list(pathlib.Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        ending.server_addresses()
    assert len(list(pathlib.Path("/proc/self/fd").iterdir())) == before
