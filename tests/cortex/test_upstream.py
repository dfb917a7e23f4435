"""Connections to a node, over a real socket and a scripted server."""

import asyncio
import contextlib
import pathlib
import socket
import threading
from collections.abc import AsyncIterator

import pytest
from daemons import free_port
from fake_node import FakeNode, Line, Received, Script
from gateway_rig import until
from hypothesis import given, settings
from hypothesis import strategies as st

from cortex._fast.http_client import BUFFER_BYTES, MAX_HEAD_BYTES
from cortex.config import Timeouts
from cortex.errors import ConnectError, ConnectionLostError, PoolFullError
from cortex.upstream import Pool
from cortex.wire.errors import UpstreamError, UpstreamTimeoutError

PATIENT = Timeouts()
FDS = pathlib.Path("/proc/self/fd")


@contextlib.asynccontextmanager
async def pool_to(
    script: Script, timeouts: Timeouts = PATIENT, max_connections: int = 8, prefix: str = ""
) -> AsyncIterator[tuple[Pool, FakeNode]]:
    neuron = FakeNode(script=script)
    async with neuron.serving():
        pool = Pool("a", neuron.url + prefix, timeouts, max_connections)
        try:
            yield pool, neuron
        finally:
            pool.close()
            await until(lambda: pool.num_connections == 0)


async def echo(received: Received, line: Line) -> None:
    await line.reply(200, received.body)


def raw(data: bytes, then_cut: bool = False) -> Script:
    async def script(received: Received, line: Line) -> None:
        await line.send(data)
        if then_cut:
            line.cut()

    return script


async def test_connections_are_kept_and_used_again() -> None:
    async with pool_to(echo) as (pool, neuron):
        for i in range(5):
            body = b"%d" % i
            response = await pool.request(b"POST", b"/v1/x", body=body)
            assert (response.status, await response.read_all(100)) == (200, body)
        assert neuron.num_connections == 1
        both = [await pool.request(b"POST", b"/v1/x", body=b"x" * 10) for _ in range(3)]
        assert neuron.num_connections <= 3
        for response in both:
            assert await response.read_all(100) == b"x" * 10


async def test_an_answer_is_measured_by_itself_and_not_by_the_one_before() -> None:
    """Also where all of its beginning is read at once, as by a gateway that was busy meanwhile."""
    sent = threading.Event()

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            for size in (200_000, 150_000):
                connection.recv(10_000)
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size + b"x" * size)
                sent.set()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=serve, args=(listener,))
        server.start()
        pool = Pool("a", f"http://127.0.0.1:{listener.getsockname()[1]}", PATIENT, 1)
        try:
            for size in (200_000, 150_000):
                sent.clear()
                asking = asyncio.ensure_future(pool.request(b"POST", b"/v1/x", body=b"x"))
                while not asking.done() and not sent.wait(0.01):
                    await asyncio.sleep(0)
                response = await asking
                assert len(await response.read_all(500_000)) == size
        finally:
            pool.close()
            server.join()


async def test_host_and_prefix_are_the_nodes_own() -> None:
    async with pool_to(echo, prefix="/v1/base") as (pool, neuron):
        response = await pool.request(b"POST", b"/models", [(b"x-a", b"1")], b"{}")
        await response.read_all(10)
        assert neuron.requests[0].path == "/v1/base/models"
        assert neuron.requests[0].headers["host"] == f"127.0.0.1:{neuron.port}"
        assert neuron.requests[0].headers["x-a"] == "1"


async def test_a_line_break_cannot_get_into_a_header() -> None:
    async with pool_to(echo) as (pool, _):
        with pytest.raises(ValueError, match="line break"):
            await pool.request(b"POST", b"/v1/x", [(b"x-a", b"1\r\nx-b: 2")])


async def test_a_stale_connection_is_replaced_once_in_silence() -> None:
    async with pool_to(echo) as (pool, neuron):
        await (await pool.request(b"POST", b"/v1/x", body=b"1")).read_all(10)

        async def drop(received: Received, line: Line) -> None:
            neuron.script = echo
            line.reset()

        neuron.script = drop  # the kept connection dies as the next request reaches it
        response = await pool.request(b"POST", b"/v1/x", body=b"2")
        assert await response.read_all(10) == b"2"
        assert [received.body for received in neuron.requests] == [b"1", b"2", b"2"]


async def test_a_fresh_connection_that_dies_is_an_error() -> None:
    async def drop(received: Received, line: Line) -> None:
        line.reset()

    async with pool_to(drop) as (pool, neuron):
        with pytest.raises(ConnectionLostError):
            await pool.request(b"POST", b"/v1/x")
        assert len(neuron.requests) == 1


async def test_a_connection_that_the_node_closed_while_idle_is_not_used() -> None:
    async with pool_to(echo) as (pool, neuron):
        neuron.max_requests_per_connection = 1
        for i in range(4):
            response = await pool.request(b"POST", b"/v1/x", body=b"%d" % i)
            assert await response.read_all(10) == b"%d" % i
            await until(lambda: pool.num_connections == 0)
        assert len(neuron.requests) == 4


HEAD = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("data", "body"),
    [
        (HEAD + b"content-length: 5\r\n\r\nhello", b"hello"),
        (HEAD + b"Content-Length: 0\r\n\r\n", b""),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n3\r\nhel\r\n2;x=y\r\nlo\r\n0\r\n\r\n", b"hello"),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nx-trailer: 1\r\n\r\n", b"hello"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello", b"hello"),
        (b"HTTP/1.1 103 Early\r\nlink: x\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello", b"hello"),
        (HEAD + b"connection: close\r\n\r\nhello", b"hello"),
        (b"HTTP/1.0 200 OK\r\n\r\nhello", b"hello"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
async def test_every_framing_over_every_split(data: bytes, body: bytes, size: int) -> None:
    async def script(received: Received, line: Line) -> None:
        for at in range(0, len(data), size):
            await line.send(data[at : at + size])
            await asyncio.sleep(0)
        if b"content-length" not in data.lower() and b"chunked" not in data and b"204" not in data:
            line.cut()

    async with pool_to(script) as (pool, _):
        response = await pool.request(b"POST", b"/v1/x")
        assert await response.read_all(1000) == body
        assert await response.read() == b""


@pytest.mark.parametrize(
    "data",
    [
        HEAD + b"content-length: 6\r\n\r\nhello",
        HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\n9\r\nhello",
        HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n",
    ],
)
async def test_a_body_that_is_cut_short_is_an_error(data: bytes) -> None:
    async with pool_to(raw(data, then_cut=True)) as (pool, _):
        response = await pool.request(b"POST", b"/v1/x")
        with pytest.raises(UpstreamError, match="in the middle"):
            await response.read_all(1000)
        with pytest.raises(UpstreamError):
            await response.read()


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH_9\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\nhello",
        b"HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"x-long: " + b"y" * MAX_HEAD_BYTES + b"\r\n",
        b"HTTP/1.1 200 OK\r\nx: 1\r\n",
    ],
)
async def test_a_response_that_is_not_http_is_an_error(data: bytes) -> None:
    async with pool_to(raw(data, then_cut=True)) as (pool, _):
        with pytest.raises(UpstreamError):
            await pool.request(b"POST", b"/v1/x")


async def test_bytes_after_an_answer_spoil_only_the_connection() -> None:
    async with pool_to(raw(HEAD + b"content-length: 2\r\n\r\nhiEXTRA")) as (pool, neuron):
        for _ in range(2):
            response = await pool.request(b"POST", b"/v1/x")
            assert await response.read_all(10) == b"hi"
        assert neuron.num_connections == 2


async def test_silence_is_timed_before_and_within_an_answer_but_not_its_length() -> None:
    async def silent(received: Received, line: Line) -> None:
        await asyncio.sleep(60)

    async def stalls(received: Received, line: Line) -> None:
        await line.start_stream()
        await line.chunk(b"x")
        await asyncio.sleep(60)

    async def long(received: Received, line: Line) -> None:
        await line.start_stream()
        for _ in range(12):
            await asyncio.sleep(0.05)
            await line.chunk(b"x")
        await line.end()

    limits = Timeouts(first_byte_s=0.2, stall_s=0.2)
    async with pool_to(silent, limits) as (pool, neuron):
        with pytest.raises(UpstreamTimeoutError, match="did not answer"):
            await pool.request(b"POST", b"/v1/x")
        neuron.script = stalls
        response = await pool.request(b"POST", b"/v1/x")
        assert await response.read() == b"x"
        with pytest.raises(UpstreamTimeoutError, match="in the middle"):
            await response.read()
        neuron.script = long
        assert await (await pool.request(b"POST", b"/v1/x")).read_all(100) == b"x" * 12


async def test_a_reader_that_waits_is_not_the_nodes_silence() -> None:
    size = 4 * 1024 * 1024

    async def script(received: Received, line: Line) -> None:
        await line.reply(200, b"x" * size)

    async with pool_to(script, Timeouts(stall_s=0.1)) as (pool, _):
        response = await pool.request(b"POST", b"/v1/x")
        await asyncio.sleep(0.5)  # longer than the stall limit: the passing of time is what is tested
        assert len(await response.read_all(size)) == size


async def test_a_slow_reader_pauses_the_node_within_a_bound() -> None:
    piece = b"x" * 65536

    async def flood(received: Received, line: Line) -> None:
        await line.start_stream()
        while True:
            await line.chunk(piece)

    async with pool_to(flood) as (pool, neuron):
        response = await pool.request(b"POST", b"/v1/x")
        (line,) = neuron.lines
        written = -1
        while written != line.written_bytes:  # until the kernel's buffers are full too
            written = line.written_bytes
            await asyncio.sleep(0.2)
        assert response.unread_bytes <= BUFFER_BYTES + 256 * 1024
        async with asyncio.timeout(10):
            while line.written_bytes == written:  # reading lets the node go on
                assert len(await response.read()) <= BUFFER_BYTES + 256 * 1024
        response.close()


@pytest.mark.parametrize("when", ["before the head", "in the body", "unread"])
async def test_giving_up_reaches_the_node_at_once(when: str) -> None:
    async def script(received: Received, line: Line) -> None:
        if when != "before the head":
            await line.start_stream()
            await line.chunk(b"x")
        await asyncio.sleep(60)

    async with pool_to(script) as (pool, neuron):
        task = asyncio.ensure_future(pool.request(b"POST", b"/v1/x"))
        await until(lambda: neuron.requests)
        if when == "before the head":
            task.cancel()
        else:
            response = await task
            if when == "in the body":
                await response.read()
            response.close()
            with pytest.raises(UpstreamError):
                await response.read_all(10)
        started = asyncio.get_running_loop().time()
        await until(lambda: neuron.num_left == 1)
        assert asyncio.get_running_loop().time() - started < 1
        await until(lambda: pool.num_connections == 0)


async def test_a_fresh_connection_takes_the_place_of_an_idle_one() -> None:
    async with pool_to(echo, max_connections=2) as (pool, neuron):
        for _ in range(5):
            response = await pool.request(b"POST", b"/v1/chat/completions", body=b"{}", is_fresh=True)
            assert await response.read_all(10_000)
        assert neuron.num_connections == 5
        assert pool.num_connections == 2


async def test_a_full_pool_is_an_error() -> None:
    async def never(received: Received, line: Line) -> None:
        await asyncio.sleep(60)

    async with pool_to(never, max_connections=2) as (pool, neuron):
        tasks = [asyncio.ensure_future(pool.request(b"POST", b"/v1/x")) for _ in range(2)]
        await until(lambda: len(neuron.requests) == 2)
        with pytest.raises(PoolFullError):
            await pool.request(b"POST", b"/v1/x")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await until(lambda: pool.num_connections == 0)
        neuron.script = echo
        assert (await pool.request(b"POST", b"/v1/x")).status == 200


async def test_the_error_of_an_absent_node_has_its_address() -> None:
    port = free_port()
    pool = Pool("gone", f"http://127.0.0.1:{port}", PATIENT, 2)
    with pytest.raises(ConnectError, match=f"gone cannot be reached at 127.0.0.1:{port}: Connection refused"):
        await pool.request(b"GET", b"/health")
    assert pool.num_connections == 0


async def test_closing_a_pool_ends_its_requests() -> None:
    async def never(received: Received, line: Line) -> None:
        await asyncio.sleep(60)

    async with pool_to(never) as (pool, neuron):
        task = asyncio.ensure_future(pool.request(b"POST", b"/v1/x"))
        await until(lambda: neuron.requests)
        pool.close()
        with pytest.raises(UpstreamError, match="was closed"):
            await task


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(["answer", "give up early", "give up late", "cut", "reset"]), max_size=30))
def test_no_history_leaks_a_connection(history: list[str]) -> None:
    """Whatever happened on them before, open connections are those in use or kept, and the next request works."""

    async def script(received: Received, line: Line) -> None:
        what = received.body.decode()
        if what == "give up early":
            await asyncio.sleep(60)
        await line.start_stream()
        await line.chunk(b"x")
        match what:
            case "give up late":
                await asyncio.sleep(60)
            case "cut":
                line.cut()
            case "reset":
                line.reset()
            case _:
                await line.end()

    async def one(pool: Pool, what: str) -> None:
        if what == "give up early":
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.005):
                    await pool.request(b"POST", b"/v1/x", body=what.encode())
            return
        try:
            response = await pool.request(b"POST", b"/v1/x", body=what.encode())
            if what == "give up late":
                response.close()
            else:
                await response.read_all(10)
        except UpstreamError:
            assert what in {"cut", "reset"}

    async def story() -> None:
        before = len(list(FDS.iterdir()))
        async with pool_to(script, max_connections=64) as (pool, _):
            await asyncio.gather(*(one(pool, what) for what in history))
            assert pool.num_connections - len(pool._idle) >= 0
            await until(lambda: pool.num_connections == len(pool._idle))
            await one(pool, "answer")
        await until(lambda: len(list(FDS.iterdir())) <= before)

    asyncio.run(story())


async def test_a_connection_that_was_idle_for_too_long_gives_its_place_to_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with pool_to(echo, max_connections=3) as (pool, _):
        for response in [await pool.request(b"POST", b"/v1/x", body=b"x") for _ in range(3)]:
            await response.read_all(100)
        monkeypatch.setattr("cortex.upstream.MAX_IDLE_S", 0.0)
        assert await (await pool.request(b"POST", b"/v1/x", body=b"y")).read_all(100) == b"y"
