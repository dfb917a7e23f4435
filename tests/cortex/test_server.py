"""The real server: Granian and the shipped application in processes of their own, over a fake neuron."""

import asyncio
import contextlib
import itertools
import json
import os
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import psutil
import pytest
from answers import CHAT_STREAM, chat_chunk
from daemons import free_port
from fake_node import FakeNode, Line, Received, answer
from gateway_rig import until, write_config
from prometheus_client.parser import text_string_to_metric_families

BIN = pathlib.Path(sys.executable).parent
STOP_TIMEOUT_S = 15
LEAVING_BOUND_S = 0.2
"""From a client's FIN to the node's: two hops of a loaded test machine."""


@dataclass
class Server:
    """A running gateway."""

    process: "subprocess.Popen[bytes]"
    port: int
    metrics_port: int
    log: pathlib.Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def num_fds(self) -> int:
        main = psutil.Process(self.process.pid)
        return sum(process.num_fds() for process in main.children(recursive=True))

    def resident_bytes(self) -> int:
        main = psutil.Process(self.process.pid)
        return sum(int(process.memory_info().rss) for process in main.children(recursive=True))

    async def metrics(self) -> dict[str, float]:
        """Return the sum of each metric's samples."""
        async with httpx.AsyncClient() as client:
            text = (await client.get(f"http://127.0.0.1:{self.metrics_port}/metrics")).text
        sums: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                sums[sample.name] = sums.get(sample.name, 0) + sample.value
        return sums


def granian(interface: str) -> list[str]:
    """Return what serves the gateway in one of its interfaces."""
    return ["granian", "--interface", interface, "--http", "1", "--loop", "uvloop", "cortex.asgi:app"]


INTERFACES = pytest.mark.parametrize("interface", ["asgi", "rsgi"])


@contextlib.asynccontextmanager
async def server(
    folder: pathlib.Path, *neurons: FakeNode, command: str = "asgi", workers: int = 1, gateway: str = ""
) -> AsyncIterator[Server]:
    """Run a gateway as its users do, until the block is left; it must then end by itself on SIGTERM, with 0."""
    port, metrics_port, log = free_port(), free_port(), folder / "log"
    addresses = f'listen = "127.0.0.1:{port}"\nmetrics_listen = "127.0.0.1:{metrics_port}"\n'
    config = write_config(
        folder, *neurons, models='[[models]]\nid = "cold"\nsource = "/w"\n', gateway=addresses + gateway
    )
    arguments = {
        "cortex": ["cortex", "serve", "--config", str(config), "--workers", str(workers)],
    }.get(command, [*granian(command), "--port", str(port), "--workers", str(workers)])
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(BIN / arguments[0]), *arguments[1:]],
            stdout=output,
            stderr=output,
            env={**os.environ, "CORTEX_CONFIG": str(config)},
        )
    found = Server(process, port, metrics_port, log)
    try:
        async with httpx.AsyncClient() as client:
            async with asyncio.timeout(20):
                while True:
                    assert process.poll() is None, log.read_text()
                    with contextlib.suppress(httpx.HTTPError):
                        health = (await client.get(found.url + "/health")).json()
                        if health["nodes_up"] == len(neurons):
                            break
                    await asyncio.sleep(0.02)
        yield found
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            status = await asyncio.to_thread(process.wait, STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.wait()
            raise AssertionError(f"did not end on SIGTERM:\n{log.read_text()}") from error
        assert status == 0, log.read_text()


@INTERFACES
async def test_the_official_sdk_is_content(tmp_path: pathlib.Path, interface: str) -> None:
    neuron = FakeNode().ready("m")
    async with neuron.serving(), server(tmp_path, neuron, command=interface) as gateway:
        sdk = openai.AsyncOpenAI(base_url=gateway.url + "/v1", api_key="none", max_retries=0)
        async with sdk as client:
            messages = [{"role": "user", "content": "Hi"}]
            reply = await client.chat.completions.create(model="m", messages=messages)  # type: ignore[arg-type]
            assert reply.choices[0].message.content == "Hello"
            stream = await client.chat.completions.create(model="m", messages=messages, stream=True)  # type: ignore[arg-type]
            assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "Hello"  # type: ignore[union-attr]
            events = [event async for event in await client.responses.create(model="m", input="Hi", stream=True)]
            assert [event.sequence_number for event in events] == [0, 1, 2, 3]
            assert events[-1].type == "response.completed"
            assert {model.id async for model in client.models.list()} == {"cold", "m"}
            assert (await client.models.retrieve("m")).id == "m"
            with pytest.raises(openai.NotFoundError) as missing:
                await client.chat.completions.create(model="none", messages=messages)  # type: ignore[arg-type]
            assert missing.value.code == "model_not_found"
            assert missing.value.request_id
            with pytest.raises(openai.BadRequestError) as refused:
                await client.chat.completions.create(model=5, messages=messages)  # type: ignore[arg-type]
            assert refused.value.param == "model"

            async def cut(received: Received, line: Line) -> None:
                await line.start_stream()
                await line.chunk(CHAT_STREAM[1])
                line.cut()

            neuron.script = cut
            with pytest.raises(openai.APIError, match="in the middle of its answer"):
                async for _ in await client.chat.completions.create(model="m", messages=messages, stream=True):  # type: ignore[arg-type]
                    pass


@INTERFACES
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
async def test_leaving_reaches_the_node_through_the_server(tmp_path: pathlib.Path, path: str, interface: str) -> None:
    begun = asyncio.Event()
    stream, after_first_byte = False, False

    async def script(received: Received, line: Line) -> None:
        if after_first_byte and stream:
            await line.start_stream()
            await line.chunk(CHAT_STREAM[1])
        elif after_first_byte:
            await line.head(200, "content-type: application/json", "content-length: 10")
            await line.send(b"{")
        begun.set()
        await asyncio.sleep(60)

    neuron = FakeNode(script=script).ready("m")
    async with neuron.serving(), server(tmp_path, neuron, command=interface) as gateway:
        for stream, after_first_byte in itertools.product((True, False), (True, False)):
            begun.clear()
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            writer.write(http_post(path, {"model": "m", "stream": stream}))
            await begun.wait()
            if after_first_byte and stream:
                await reader.readuntil(b"Hel")
            num_left = neuron.num_left
            left_at = asyncio.get_running_loop().time()
            writer.close()
            await writer.wait_closed()
            await until(lambda: neuron.num_left > num_left)  # noqa: B023
            assert asyncio.get_running_loop().time() - left_at < LEAVING_BOUND_S, (stream, after_first_byte)
        await in_flight_is(gateway, 0)


def http_post(path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    return b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (path.encode(), len(data), data)


async def in_flight_is(gateway: Server, count: int) -> None:
    async with httpx.AsyncClient() as client, asyncio.timeout(10):
        while (await client.get(gateway.url + "/health")).json()["in_flight"] != count:
            await asyncio.sleep(0.01)


@INTERFACES
async def test_a_small_sse_event_goes_out_at_once(tmp_path: pathlib.Path, interface: str) -> None:
    """Waiting for a fuller packet or an acknowledgement costs 40 ms an SSE event on either side of the gateway."""
    loop = asyncio.get_running_loop()
    got = asyncio.Event()
    delays: list[float] = []

    async def script(received: Received, line: Line) -> None:
        await line.start_stream()
        for _ in range(60):
            got.clear()
            sent_at = loop.time()
            await line.chunk(CHAT_STREAM[1])
            await got.wait()
            delays.append(loop.time() - sent_at)
        await line.chunk(b"".join(CHAT_STREAM[3:]))
        await line.end()

    neuron = FakeNode(script=script).ready("m")
    async with neuron.serving(), server(tmp_path, neuron, command=interface) as gateway:
        for _ in range(3):  # a busy machine may hold one up
            delays.clear()
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            writer.write(http_post("/v1/chat/completions", {"model": "m", "stream": True}))
            for _ in range(60):
                await reader.readuntil(b'"Hel"')
                got.set()
            await reader.readuntil(b"[DONE]")
            writer.close()
            # The kernel acknowledges the first few packets of a connection at once, whatever is asked of it.
            if statistics.median(delays[30:]) < 0.02:
                break
        else:
            pytest.fail(f"median {statistics.median(delays[30:]):.3f} s")


@INTERFACES
async def test_two_hundred_clients_that_leave_at_random_leave_nothing(tmp_path: pathlib.Path, interface: str) -> None:
    dice = random.Random(3)

    async def script(received: Received, line: Line) -> None:
        await asyncio.sleep(dice.random() * 0.05)
        await line.start_stream()
        for _ in range(30):
            await line.chunk(CHAT_STREAM[1])
            await asyncio.sleep(dice.random() * 0.02)
        for sse_event in CHAT_STREAM[3:]:
            await line.chunk(sse_event)
        await line.end()

    neuron = FakeNode(script=script).ready("m")
    async with neuron.serving(), server(tmp_path, neuron, command=interface) as gateway:
        request = http_post("/v1/chat/completions", {"model": "m", "stream": True})

        async def one(patience_s: float) -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            writer.write(request)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience_s):
                    while await reader.read(65536):
                        pass
            writer.close()
            await writer.wait_closed()

        await one(1)
        await in_flight_is(gateway, 0)
        baseline = gateway.num_fds()
        await asyncio.gather(*(one(dice.random() * 0.5) for _ in range(200)))
        await in_flight_is(gateway, 0)
        # What remains beyond the baseline are kept-alive connections to the node, and they still work.
        connections = len(neuron.lines)
        await until(lambda: gateway.num_fds() <= baseline + connections, what="file descriptors come back")
        neuron.script = answer
        async with httpx.AsyncClient() as client:
            assert (await client.post(gateway.url + "/v1/chat/completions", json={"model": "m"})).status_code == 200


@INTERFACES
async def test_a_client_that_leaves_in_the_middle_of_a_large_answer_is_seen(
    tmp_path: pathlib.Path, interface: str
) -> None:
    """Also where the pipeline has been asking for a while whether it is there, and had to hand it to a step."""

    async def large_and_slow(received: Received, line: Line) -> None:
        await asyncio.sleep(0.1)
        await line.head(200, "content-type: application/json", "content-length: 1000000")
        await line.send(bytes(200_000))
        await line.left.wait()

    neuron = FakeNode().ready("m")
    async with neuron.serving(), server(tmp_path, neuron, command=interface) as gateway:
        async with httpx.AsyncClient() as client:
            assert (await client.post(gateway.url + "/v1/chat/completions", json={"model": "m"})).status_code == 200
        neuron.script = large_and_slow
        _, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(http_post("/v1/chat/completions", {"model": "m"}))
        await until(lambda: sum(line.written_bytes for line in neuron.lines) > 200_000)
        await asyncio.sleep(0.1)
        writer.transport.abort()
        await until(lambda: neuron.num_left == 1)
        await in_flight_is(gateway, 0)


@INTERFACES
async def test_readers_that_stall_cost_a_bounded_amount(tmp_path: pathlib.Path, interface: str) -> None:
    num_readers = 8

    async def flood(received: Received, line: Line) -> None:
        await line.start_stream()
        while True:
            await line.chunk(chat_chunk({"content": "x" * 4000}))

    neuron = FakeNode(script=flood).ready("m")
    async with neuron.serving(), server(tmp_path, neuron, command=interface) as gateway:
        before = gateway.resident_bytes()
        request = http_post("/v1/chat/completions", {"model": "m", "stream": True})
        writers = []
        for _ in range(num_readers):
            _, writer = await asyncio.open_connection("127.0.0.1", gateway.port, limit=1024)
            writer.write(request)
            writers.append(writer)
        await until(lambda: len(neuron.lines) == num_readers)
        seen = -1
        while seen != (now := sum(line.written_bytes for line in neuron.lines)):
            seen = now
            await asyncio.sleep(0.3)
        # Socket buffers and the server's own queue are most of it; without back-pressure this loop would not end.
        assert seen / num_readers < 16 * 1024 * 1024
        assert (gateway.resident_bytes() - before) / num_readers < 8 * 1024 * 1024
        for writer in writers:
            writer.transport.abort()
        await until(lambda: neuron.num_left == num_readers)
        await in_flight_is(gateway, 0)


async def test_several_workers_share_their_metrics_under_cortex_serve(tmp_path: pathlib.Path) -> None:
    neuron = FakeNode().ready("m")
    async with neuron.serving(), server(tmp_path, neuron, command="cortex", workers=2) as gateway:
        num_requests = 40
        for _ in range(num_requests):
            async with httpx.AsyncClient() as client:  # a connection each, so that both workers get some
                reply = await client.post(gateway.url + "/v1/chat/completions", json={"model": "m"})
                assert reply.status_code == 200
        sums = await gateway.metrics()
        deadline = time.monotonic() + 10  # what other workers have counted comes a moment late
        while sums["cortex_requests_total"] < num_requests and time.monotonic() < deadline:
            sums = await gateway.metrics()
        assert sums["cortex_requests_total"] == num_requests
        assert sums["cortex_completion_tokens_total"] == 2 * num_requests
        assert sums["cortex_in_flight_requests"] == 0
        assert sums["cortex_nodes_up"] == 1


@INTERFACES
async def test_several_workers_under_bare_granian(tmp_path: pathlib.Path, interface: str) -> None:
    neuron = FakeNode().ready("m")
    async with neuron.serving(), server(tmp_path, neuron, command=interface, workers=2) as gateway:
        async with httpx.AsyncClient() as client:
            for _ in range(4):
                reply = await client.post(gateway.url + "/v1/chat/completions", json={"model": "m"})
                assert reply.status_code == 200
        assert (await gateway.metrics())["cortex_nodes_up"] == 1
        await until(lambda: gateway.log.read_text().count("metrics are not served by this worker") == 1)


@pytest.mark.parametrize("command", ["asgi", "rsgi", "cortex"])
async def test_sigterm_lets_a_stream_finish(tmp_path: pathlib.Path, command: str) -> None:
    go = asyncio.Event()

    async def script(received: Received, line: Line) -> None:
        await line.start_stream()
        await line.chunk(CHAT_STREAM[1])
        await go.wait()
        for sse_event in CHAT_STREAM[2:]:
            await line.chunk(sse_event)
        await line.end()

    neuron = FakeNode(script=script).ready("m")
    async with neuron.serving(), server(tmp_path, neuron, command=command) as gateway, httpx.AsyncClient() as client:
        request = client.build_request(
            "POST", gateway.url + "/v1/chat/completions", json={"model": "m", "stream": True}
        )
        reply = await client.send(request, stream=True)
        gateway.process.send_signal(signal.SIGTERM)
        await until(lambda: b"cortex ending running=1" in gateway.log.read_bytes())
        go.set()
        assert (await reply.aread()).endswith(CHAT_STREAM[-1])


async def test_a_stream_gets_an_error_after_the_drain_timeout(tmp_path: pathlib.Path) -> None:
    async def script(received: Received, line: Line) -> None:
        await line.start_stream()
        while True:
            await line.chunk(CHAT_STREAM[1])
            await asyncio.sleep(0.05)

    neuron = FakeNode(script=script).ready("m")
    async with (
        neuron.serving(),
        server(tmp_path, neuron, command="cortex", gateway="drain_timeout_s = 1\n") as gateway,
        httpx.AsyncClient() as client,
    ):
        request = client.build_request(
            "POST", gateway.url + "/v1/chat/completions", json={"model": "m", "stream": True}
        )
        reply = await client.send(request, stream=True)
        sent_at = asyncio.get_running_loop().time()
        gateway.process.send_signal(signal.SIGTERM)
        *_, last, rest = (await reply.aread()).split(b"\n\n")
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "gateway_stopped"
        assert not rest
        await asyncio.to_thread(gateway.process.wait, STOP_TIMEOUT_S)
        assert 1 <= asyncio.get_running_loop().time() - sent_at < 5
        await until(lambda: neuron.num_left == 1)


@pytest.mark.parametrize("command", ["asgi", "rsgi", "cortex"])
def test_a_wrong_configuration_ends_the_server_with_its_reason(tmp_path: pathlib.Path, command: str) -> None:
    path = tmp_path / "cortex.toml"
    path.write_text("[gateway]\nlissten = 'x'\n")
    arguments = ["cortex", "serve"] if command == "cortex" else [*granian(command), "--port", str(free_port())]
    done = subprocess.run(
        [str(BIN / arguments[0]), *arguments[1:]],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={**os.environ, "CORTEX_CONFIG": str(path)},
    )
    assert done.returncode == (2 if command == "cortex" else 1)
    assert f"cortex: {path}: gateway.lissten: unknown key" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


async def test_an_address_in_use_is_reported_and_ends_the_start(tmp_path: pathlib.Path) -> None:
    neuron = FakeNode()
    async with neuron.serving():
        config = write_config(tmp_path, neuron, gateway=f'listen = "127.0.0.1:{neuron.port}"\nmetrics_listen = ""\n')
        done = await asyncio.to_thread(
            subprocess.run,
            [str(BIN / "cortex"), "serve", "--config", str(config)],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    assert done.returncode == 2
    assert f"cortex: cannot listen at 127.0.0.1:{neuron.port}: " in done.stderr


@pytest.mark.parametrize(
    ("command", "words"), [("status", ("gpu-box", "cpu:0", "ready", "m")), ("models", ("m", "cold", "4096"))]
)
async def test_the_commands_show_a_running_gateway(
    tmp_path: pathlib.Path, command: str, words: tuple[str, ...]
) -> None:
    async def run(*arguments: str) -> str:
        process = await asyncio.create_subprocess_exec(str(BIN / "cortex"), command, *arguments, stdout=subprocess.PIPE)
        output, _ = await process.communicate()
        assert process.returncode == 0
        return output.decode()

    neuron = FakeNode("gpu-box").ready("m")
    async with neuron.serving(), server(tmp_path, neuron) as gateway:
        for where in (["--url", gateway.url], ["--config", str(tmp_path / "cortex.toml")]):
            shown = await run(*where)
            assert all(word in shown for word in words), shown
            assert max(map(len, shown.splitlines())) <= 80
            assert json.loads(await run(*where, "--json"))
