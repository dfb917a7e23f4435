"""How a request's body is read: no more of it than a limit, in no more pieces than it needs, and in bounded time.

A body has a time to begin with and more of it for each byte that has come, so that a large one on a slow line arrives
and one that drips does not: silence alone would let a byte a second pass for ever. Whoever reads gets it in one piece.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable

from cortex.wire.errors import BodyTooLargeError, SlowBodyError

BODY_TIMEOUT_S = 60.0
BYTES_A_SECOND = 64 * 1024
"""Each so many bytes of a body that have come give it another second."""

FREE_PIECES = 10_000
MIN_PIECE_BYTES = 64
"""Beyond so many pieces they must be as large on average: each one wakes the event loop."""

WHOLE_BYTES = 1024 * 1024
"""Up to this length a body may be left to the server to put together, where that takes less."""

GRACE_S = 0.5
"""How much later a wait for a piece is cancelled than a piece that comes is too late. Granian loses a cancellation that
meets a piece over ASGI, and the request then hangs; so only those who send nothing are cancelled."""

HEAD_TIMEOUT_S = 30
"""For a request's head; the server closes a kept connection on which none has begun for so long, too."""


async def read_at_most(limit_bytes: int, pieces: AsyncIterator[bytes], timeout_s: float = BODY_TIMEOUT_S) -> bytes:
    """Return a body that comes in pieces.

    Raises:
        BodyTooLargeError: it is longer than ``limit_bytes`` (no more was kept), or comes in too many pieces.
        SlowBodyError: it takes too long.
    """
    first, rest = b"", bytearray()
    size_bytes = num_pieces = granted_bytes = 0
    clock = asyncio.get_running_loop().time
    due = clock() + timeout_s
    try:
        async with asyncio.timeout_at(due + GRACE_S) as limit:
            async for piece in pieces:
                num_pieces += 1
                size_bytes += len(piece)
                if size_bytes > limit_bytes:
                    raise BodyTooLargeError(f"The request body is longer than the {limit_bytes} bytes that are read.")
                if num_pieces > FREE_PIECES and size_bytes < num_pieces * MIN_PIECE_BYTES:
                    raise BodyTooLargeError(f"The request body comes in over {FREE_PIECES} pieces; send larger ones.")
                if num_pieces == 1:
                    first = piece
                    continue
                if num_pieces == 2:
                    rest += first
                rest += piece
                if size_bytes - granted_bytes >= BYTES_A_SECOND:
                    due += (size_bytes - granted_bytes) / BYTES_A_SECOND
                    limit.reschedule(due + GRACE_S)
                    granted_bytes = size_bytes
                elif clock() >= due:
                    raise TimeoutError
    except TimeoutError:
        raise slow_body(size_bytes, timeout_s) from None
    return first if num_pieces <= 1 else bytes(rest)


async def read_whole(size_bytes: int, body: Awaitable[bytes], timeout_s: float = BODY_TIMEOUT_S) -> bytes:
    """Return a body of a known size that the server puts together. Raises :class:`SlowBodyError`."""
    try:
        async with asyncio.timeout(timeout_s + size_bytes / BYTES_A_SECOND):
            return await body
    except TimeoutError:
        raise slow_body(None, timeout_s) from None


def slow_body(size_bytes: int | None, timeout_s: float) -> SlowBodyError:
    """Return the error of a body that took too long, of which so much has come."""
    come = "" if size_bytes is None else f" ({size_bytes} bytes of it have come)"
    return SlowBodyError(
        f"The request body took longer than {timeout_s:g} s and a second for each {BYTES_A_SECOND} bytes{come}."
    )
