"""Bodies that arrive a byte at a time or in a million pieces: cut in bounded time, without delaying other requests."""

import asyncio
import pathlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from daemons import Daemon, daemon, free_port
from fake_node import FakeNode
from gateway_rig import CHAT, write_config
from slow_client import drip, many_pieces

from cortex import request_body
from cortex.request_body import read_at_most
from cortex.wire.errors import BodyTooLargeError, SlowBodyError

NUM_CLIENTS = 200
PATHS = ("/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/conversations")


@asynccontextmanager
async def server(folder: pathlib.Path, neuron: FakeNode, interface: str, gateway: str = "") -> AsyncIterator[Daemon]:
    """Run the real server in one of its interfaces, over a fake neuron with a model."""
    port = free_port()
    listen = f'listen = "127.0.0.1:{port}"\nmetrics_listen = ""\n'
    config = write_config(folder, neuron, gateway=listen + gateway)
    command = ["granian", "--interface", interface, "--http", "1", "--port", str(port), "cortex.asgi:app"]
    if interface == "cortex serve":
        command = ["cortex", "serve", "--config", str(config)]
    with daemon(*command, port=port, log=folder / "log", CORTEX_CONFIG=str(config)) as found:
        async with httpx.AsyncClient() as client, asyncio.timeout(20):
            while not (await client.get(f"{found.url}/v1/models")).json()["data"]:
                await asyncio.sleep(0.02)
        yield found


INTERFACES = pytest.mark.parametrize("interface", ["cortex serve", "rsgi", "asgi"])


@INTERFACES
async def test_clients_that_send_a_byte_at_a_time_are_cut_while_others_are_served(
    tmp_path: pathlib.Path, interface: str
) -> None:
    neuron = FakeNode().ready("m")
    async with neuron.serving(), server(tmp_path, neuron, interface, "body_timeout_s = 3\n") as gateway:
        slow = [
            asyncio.ensure_future(drip(gateway.port, PATHS[i % len(PATHS)], chunked=i % 8 >= 4))
            for i in range(NUM_CLIENTS)
        ]
        async with httpx.AsyncClient() as client:
            while not all(each.done() for each in slow):
                answer = await client.post(f"{gateway.url}/v1/chat/completions", json=CHAT)
                assert answer.status_code == 200
        for i, (status, body) in enumerate(await asyncio.gather(*slow)):
            assert status == 408
            error = body["error"]
            assert (error.get("code") or error["details"]["error_code"]) == "request_timeout", PATHS[i % len(PATHS)]


@INTERFACES
async def test_a_body_in_a_million_pieces_is_refused_early(tmp_path: pathlib.Path, interface: str) -> None:
    neuron = FakeNode().ready("m")
    async with neuron.serving(), server(tmp_path, neuron, interface) as gateway:
        status, body = await many_pieces(gateway.port, "/v1/chat/completions", 1_000_000)
        assert (status, body["error"]["code"]) == (413, "request_too_large")
        async with httpx.AsyncClient() as client:
            assert (await client.post(f"{gateway.url}/v1/chat/completions", json=CHAT)).status_code == 200


async def pieces(count: int, size: int, pause_s: float = 0) -> AsyncIterator[bytes]:
    for _ in range(count):
        await asyncio.sleep(pause_s)
        yield b"x" * size


async def test_a_body_has_time_for_each_byte_that_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_body, "BYTES_A_SECOND", 1000)
    assert await read_at_most(10**6, pieces(8, 1000, 0.05), timeout_s=0.2) == b"x" * 8000
    with pytest.raises(SlowBodyError, match=r"0\.2 s"):
        await read_at_most(10**6, pieces(100, 1, 0.05), timeout_s=0.2)


async def test_a_body_is_read_in_one_go_whatever_its_pieces_are() -> None:
    assert await read_at_most(10, pieces(0, 0)) == b""
    assert await read_at_most(10, pieces(1, 10)) == b"x" * 10
    assert await read_at_most(10**6, pieces(9_000, 3)) == b"x" * 27_000
    assert len(await read_at_most(10**7, pieces(20_000, 64))) == 20_000 * 64
    with pytest.raises(BodyTooLargeError):
        await read_at_most(9, pieces(1, 10))
    with pytest.raises(BodyTooLargeError, match="pieces"):
        await read_at_most(10**6, pieces(20_000, 3))
