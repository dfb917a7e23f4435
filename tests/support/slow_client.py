"""Clients that send a request's body a byte at a time, or in a great many pieces, over real sockets."""

import asyncio
import contextlib
import json
from typing import Any

ANSWER_LIMIT_S = 20.0


async def drip(port: int, path: str, *, chunked: bool, pause_s: float = 0.05) -> tuple[int, dict[str, Any]]:
    """Send a body a byte at a time until there is an answer and the connection is closed; return that answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    framing = "transfer-encoding: chunked" if chunked else "content-length: 100000"
    writer.write(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{framing}\r\n\r\n".encode())

    async def send() -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(b"1\r\n \r\n" if chunked else b" ")
                await writer.drain()
                await asyncio.sleep(pause_s)

    sending = asyncio.ensure_future(send())
    try:
        async with asyncio.timeout(ANSWER_LIMIT_S):
            return parsed(await read_to_end(reader))
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        writer.close()


async def many_pieces(port: int, path: str, num_pieces: int) -> tuple[int, dict[str, Any]]:
    """Send a body of blanks in chunks of a byte; return the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    writer.write(head.encode())

    async def send() -> None:
        with contextlib.suppress(ConnectionError):
            for _ in range(num_pieces // 1000):
                writer.write(b"1\r\n \r\n" * 1000)
                await writer.drain()
            writer.write(b"0\r\n\r\n")

    sending = asyncio.ensure_future(send())
    try:
        async with asyncio.timeout(ANSWER_LIMIT_S):
            return parsed(await read_to_end(reader))
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        writer.close()


async def read_to_end(reader: asyncio.StreamReader) -> bytes:
    """Return all that comes until the other side closes; what it reset instead still counts."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while piece := await reader.read(65536):
            data += piece
    return data


def parsed(data: bytes) -> tuple[int, dict[str, Any]]:
    """Return the status and the JSON body of an answer."""
    head, _, body = data.partition(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1])
    found: dict[str, Any] = json.loads(body)
    return status, found
