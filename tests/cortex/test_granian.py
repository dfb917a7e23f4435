"""``granian cortex.asgi:app``, as typed: each interface of the server, each version of HTTP, and no configuration."""

import asyncio
import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import httpx
import psutil
import pytest
import websockets
from answers import CHAT_STREAM, chat_chunk
from asgi_call import Call
from daemons import free_port
from fake_node import FakeNode, Line, Received
from gateway_rig import until, write_config

from cortex.asgi import Application
from cortex.wire.node import ModelSpec, ModelState, ModelStatus

GRANIAN = str(pathlib.Path(sys.executable).with_name("granian"))
START_S = 30
CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
INTERFACES = pytest.mark.parametrize("interface", [None, "rsgi", "asgi", "asginl"])


class Server:
    """A running server and what it has written."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int, log: pathlib.Path) -> None:
        self.process, self.port, self.log = process, port, log

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def resident_bytes(self) -> int:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return sum(int(child.memory_info().rss) for child in children)


@contextlib.asynccontextmanager
async def granian(folder: pathlib.Path, *options: str, **environment: str) -> AsyncIterator[Server]:
    """Run Granian in ``folder`` until the block is left; it must then end by itself, with 0."""
    port, log = free_port(), folder / "log"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CORTEX_", "GRANIAN_"))}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [GRANIAN, *options, "cortex.asgi:app"],
            cwd=folder,
            stdout=output,
            stderr=output,
            env={**kept, "GRANIAN_PORT": str(port), "HOME": str(folder), **environment},
        )
    found = Server(process, port, log)
    try:
        async with (
            asyncio.timeout(START_S),
            httpx.AsyncClient(http1="2" not in options, http2="2" in options) as client,
        ):
            while True:
                assert process.poll() is None, log.read_text()
                with contextlib.suppress(httpx.HTTPError):
                    await client.get(found.url + "/health")
                    break
                await asyncio.sleep(0.02)
        yield found
    finally:
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, START_S) == 0, log.read_text()


async def is_listed(server: Server, model: str, *, http2: bool = False) -> None:
    """Wait until the gateway has seen its node."""
    async with asyncio.timeout(START_S), httpx.AsyncClient(http1=not http2, http2=http2) as client:
        while True:
            listed = (await client.get(server.url + "/v1/models")).json()
            if any(entry["id"] == model for entry in listed["data"]):
                return
            await asyncio.sleep(0.02)


QUALIFIED = "hf:org/Name-1.5@main+x:Q4_K_M"


def config(folder: pathlib.Path, neuron: FakeNode) -> str:
    return str(write_config(folder, neuron, gateway='metrics_listen = ""\n'))


@INTERFACES
@pytest.mark.parametrize("version", ["auto", "1", "2"])
async def test_every_interface_answers_over_every_version(
    tmp_path: pathlib.Path, interface: str | None, version: str
) -> None:
    neuron = FakeNode().ready("m", QUALIFIED)
    options = [] if interface is None else ["--interface", interface]
    options += [] if version == "auto" else ["--http", version]
    async with neuron.serving(), granian(tmp_path, *options, CORTEX_CONFIG=config(tmp_path, neuron)) as server:
        await is_listed(server, "m", http2=version == "2")
        for http2 in {"auto": (False, True), "1": (False,), "2": (True,)}[version]:
            async with httpx.AsyncClient(http1=not http2, http2=http2) as client:
                whole = await client.post(server.url + "/v1/chat/completions", json=CHAT)
                assert (whole.status_code, whole.http_version) == (200, "HTTP/2" if http2 else "HTTP/1.1")
                assert whole.json()["choices"][0]["message"]["content"] == "Hello"
                streamed = await client.post(server.url + "/v1/chat/completions", json={**CHAT, "stream": True})
                assert streamed.content.endswith(CHAT_STREAM[-1])
                assert (await client.get(server.url + "/v1/nothing")).status_code == 404
                for name in (QUALIFIED, quote(QUALIFIED), quote(QUALIFIED, safe=""), QUALIFIED.replace("@", "%40")):
                    assert (await client.get(f"{server.url}/v1/models/{name}?a=%2F")).json()["id"] == QUALIFIED
                twice = quote(quote(QUALIFIED, safe=""), safe="")
                assert (await client.get(f"{server.url}/v1/models/{twice}")).status_code == 404
                assert (await client.head(server.url + "/")).status_code == 200
        if version != "2":
            async with websockets.connect(f"ws://127.0.0.1:{server.port}/v1/responses", compression=None) as line:
                await line.send(json.dumps({"type": "response.create", "model": "m", "input": "Hi", "store": False}))
                kinds = [json.loads(await line.recv())["type"]]
                while kinds[-1] != "response.completed":
                    kinds.append(json.loads(await line.recv())["type"])
    assert "Traceback" not in server.log.read_text()


@INTERFACES
async def test_it_needs_no_configuration(tmp_path: pathlib.Path, interface: str | None) -> None:
    options = [] if interface is None else ["--interface", interface]
    # So that a gateway or a neuron of this machine is not used.
    elsewhere = {"CORTEX_GATEWAY__METRICS_LISTEN": "", "CORTEX_NEURONS": "[]"}
    async with granian(tmp_path, *options, **elsewhere) as server, httpx.AsyncClient() as client:
        assert (await client.get(server.url + "/health")).status_code == 200
        assert (await client.get(server.url + "/v1/models")).status_code == 200
        assert (await client.get(server.url + "/")).headers["content-type"].startswith("text/html")
        log = server.log.read_text()
    assert f"started version=0.1.0 at=http://127.0.0.1:{server.port} " in log
    assert 'config="no cortex.toml" nodes=local=http://127.0.0.1:13131 models=0 keys=off' in log
    assert f"the server listens at http://127.0.0.1:{server.port}, and gateway.listen is 127.0.0.1:31313" in log


async def test_several_workers_without_configuration(tmp_path: pathlib.Path) -> None:
    async with granian(tmp_path, "--workers", "2", CORTEX_GATEWAY__METRICS_LISTEN="") as server:
        await until(lambda: server.log.read_text().count("cortex started") == 2)


async def test_a_server_that_is_told_to_end_while_it_starts_ends(tmp_path: pathlib.Path) -> None:
    """The worker that imported the application kept the handler of its parent, which then waited for it forever."""

    async def end_after(delay_s: float) -> None:
        command = [GRANIAN, "--port", str(free_port()), "cortex.asgi:app"]
        process = await asyncio.create_subprocess_exec(
            *command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            assert process.stdout is not None
            async with asyncio.timeout(START_S):
                while b"Listening at" not in await process.stdout.readline():
                    pass
                await asyncio.sleep(delay_s)
                process.send_signal(signal.SIGTERM)
                await process.communicate()
        finally:
            if process.returncode is None:
                for child in psutil.Process(process.pid).children():
                    child.kill()
                process.kill()
                await process.wait()

    for delay_s in (0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6):
        await end_after(delay_s)


async def test_metrics_are_served_as_soon_as_their_port_is_free(tmp_path: pathlib.Path) -> None:
    """A gateway that could not at its start had none until it was started again."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        async with (
            granian(tmp_path, CORTEX_GATEWAY__METRICS_LISTEN=f"127.0.0.1:{port}") as server,
            httpx.AsyncClient() as client,
        ):
            assert (await client.get(server.url + "/health")).json()["degraded"] == ["metrics listener"]
            assert (await client.get(server.url + "/admin/fleet")).status_code in {200, 401, 403}
            warned = [line for line in server.log.read_text().splitlines() if "metrics are not served" in line]
            assert len(warned) == 1
            assert " WARNING " in warned[0]
            assert f"127.0.0.1:{port}: Address already in use" in warned[0]
            other.close()
            async with asyncio.timeout(START_S):
                while (await client.get(server.url + "/health")).json()["degraded"]:
                    await asyncio.sleep(0.1)
            assert "cortex_build_info" in (await client.get(f"http://127.0.0.1:{port}/metrics")).text


async def test_a_load_reports_its_progress_and_outcome(tmp_path: pathlib.Path) -> None:
    go = asyncio.Event()
    neuron = FakeNode(name="a")

    async def load(spec: ModelSpec) -> ModelStatus:
        neuron.models[spec.id] = ModelStatus(spec.id, ModelState.LOADING, progress=0.42)
        await go.wait()
        return neuron.ready(spec.id).models[spec.id]

    neuron.load = load
    catalogue = '[[models]]\nid = "m"\nsource = "/w"\n'
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(neuron.serving())
        path = write_config(tmp_path, neuron, models=catalogue, gateway='metrics_listen = ""\n')
        server = await stack.enter_async_context(granian(tmp_path, CORTEX_CONFIG=str(path)))
        await is_listed(server, "m")
        command = str(pathlib.Path(GRANIAN).with_name("cortex"))
        process = await asyncio.create_subprocess_exec(
            command, "load", "m", "--url", server.url, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "HOME": str(tmp_path)},
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        async with asyncio.timeout(START_S):
            assert await process.stderr.readline() == b"loading m\n"
            assert await process.stderr.readline() == b"loading m on a: 42%\n"
        go.set()
        out, _ = await process.communicate()
        assert (process.returncode, out) == (0, b"m on a: ready\n")


async def test_wsgi_is_refused(tmp_path: pathlib.Path) -> None:
    async with granian(tmp_path, "--interface", "wsgi") as server, httpx.AsyncClient() as client:
        reply = await client.get(server.url + "/v1/models")
    assert reply.status_code == 500
    assert "WSGI" in reply.text
    assert "--interface wsgi" in reply.text
    assert "Traceback" not in server.log.read_text()


async def test_without_a_lifespan_a_wrong_configuration_is_reported_until_mended(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "cortex.toml"
    path.write_text("[gateway]\nlissten = 'x'\n")
    async with granian(tmp_path, "--interface", "asginl") as server, httpx.AsyncClient() as client:
        refused = await client.get(server.url + "/v1/models")
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "not_started"
        assert "cortex.toml: gateway.lissten: unknown key" in server.log.read_text()
        path.write_text('[gateway]\nmetrics_listen = ""\n[[neurons]]\nname = "a"\nendpoint = "http://127.0.0.1:9"\n')
        (tmp_path / "models.toml").write_text("")
        assert (await client.get(server.url + "/v1/models")).status_code == 200


# ------------------------------------------------------------------ HTTP/2


class Http2:
    """HTTP/2 connection whose client reads chosen amounts, stream by stream."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
        self._reader, self._writer, self._port = reader, writer, port
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
        self.got: dict[int, int] = {}
        self.ended: set[int] = set()
        self.unread: set[int] = set()
        """Streams whose windows are left as they are."""
        self.h2.initiate_connection()
        self.h2.increment_flow_control_window(1 << 30)
        self._flush()

    def post(self, path: str, body: dict[str, Any]) -> int:
        """Send a request; return the number of its stream."""
        number = self.h2.get_next_available_stream_id()
        data = json.dumps(body).encode()
        head = {":method": "POST", ":path": path, ":scheme": "http", ":authority": f"127.0.0.1:{self._port}"}
        self.h2.send_headers(number, [*head.items(), ("content-length", str(len(data)))])
        self.h2.send_data(number, data, end_stream=True)
        self.got[number] = 0
        self._flush()
        return number

    def reset(self, number: int) -> None:
        self.h2.reset_stream(number)
        self._flush()

    async def read(self) -> None:
        """Read for ever."""
        while data := await self._reader.read(1 << 16):
            for event in self.h2.receive_data(data):
                if isinstance(event, h2.events.DataReceived):
                    self.got[event.stream_id] += len(event.data)
                    if event.stream_id not in self.unread and event.flow_controlled_length:
                        with contextlib.suppress(h2.exceptions.StreamClosedError):  # its end came with its data
                            self.h2.increment_flow_control_window(event.flow_controlled_length, event.stream_id)
                elif isinstance(event, h2.events.StreamEnded):
                    self.ended.add(event.stream_id)
            self._flush()

    def _flush(self) -> None:
        self._writer.write(self.h2.data_to_send())


@contextlib.asynccontextmanager
async def http2(server: Server) -> AsyncIterator[Http2]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    found = Http2(reader, writer, server.port)
    reading = asyncio.create_task(found.read())
    try:
        yield found
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        writer.transport.abort()


STREAM = {**CHAT, "stream": True}


async def test_over_http_2_a_client_that_leaves_is_seen(tmp_path: pathlib.Path) -> None:
    async def endless(received: Received, line: Line) -> None:
        await line.start_stream()
        await line.chunk(CHAT_STREAM[1])
        await asyncio.sleep(60)

    neuron = FakeNode(script=endless).ready("m")
    async with neuron.serving(), granian(tmp_path, CORTEX_CONFIG=config(tmp_path, neuron)) as server:
        await is_listed(server, "m")
        async with http2(server) as client:
            number = client.post("/v1/chat/completions", STREAM)
            await until(lambda: client.got[number])
            client.reset(number)
            await until(lambda: neuron.num_left == 1)
            number = client.post("/v1/chat/completions", STREAM)
            await until(lambda: client.got[number])
        await until(lambda: neuron.num_left == 2)


async def test_over_http_2_readers_that_stall_cost_a_bounded_amount(tmp_path: pathlib.Path) -> None:
    num_stalled = 8

    async def flood(received: Received, line: Line) -> None:
        await line.start_stream()
        while True:
            await line.chunk(chat_chunk({"content": "x" * 4000}))

    neuron = FakeNode(script=flood).ready("m")
    async with neuron.serving(), granian(tmp_path, CORTEX_CONFIG=config(tmp_path, neuron)) as server:
        await is_listed(server, "m")
        before = server.resident_bytes()
        async with http2(server) as client:
            for _ in range(num_stalled):
                client.unread.add(client.post("/v1/chat/completions", STREAM))
            await until(lambda: len(neuron.lines) == num_stalled)
            seen = -1
            while seen != (now := sum(line.written_bytes for line in neuron.lines)):
                seen = now
                await asyncio.sleep(0.3)
            # Socket buffers between node and gateway are most of it; without back-pressure this loop would not end.
            assert seen / num_stalled < 16 * 1024 * 1024
            assert (server.resident_bytes() - before) / num_stalled < 8 * 1024 * 1024
            # A short answer on the same connection is not held up.
            neuron.script = FakeNode().script
            number = client.post("/v1/chat/completions", STREAM)
            await until(lambda: number in client.ended)


async def test_over_http_2_a_reader_that_reads_gets_a_long_stream_whole(tmp_path: pathlib.Path) -> None:
    num_chunks = 2000

    async def long(received: Received, line: Line) -> None:
        await line.start_stream()
        for _ in range(num_chunks):
            await line.chunk(chat_chunk({"content": "x" * 4000}))
        await line.chunk(b"".join(CHAT_STREAM[3:]))
        await line.end()

    neuron = FakeNode(script=long).ready("m")
    async with neuron.serving(), granian(tmp_path, CORTEX_CONFIG=config(tmp_path, neuron)) as server:
        await is_listed(server, "m")
        async with http2(server) as client:
            numbers = [client.post("/v1/chat/completions", STREAM) for _ in range(3)]
            await until(lambda: client.ended.issuperset(numbers), 60)
            assert all(client.got[number] > num_chunks * 4000 for number in numbers)


async def test_without_a_lifespan_a_start_that_fails_in_any_way_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    app = Application({})
    tries = 0

    async def fail() -> None:
        nonlocal tries
        tries += 1
        raise OSError("no disk")

    monkeypatch.setattr(app, "_start_asgi", fail)
    for number in (1, 2):
        call = await Call(app, "GET", "/v1/models", b"", None, "127.0.0.1").end()
        assert (call.status, call.json()["error"]["code"]) == (503, "not_started")
        assert tries == number
