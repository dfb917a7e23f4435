"""Reading of request bodies: bounded in bytes, in pieces and in time.

A body has a base time plus time for each byte received, so that a large body on a slow line arrives and a dripping one
does not: a limit on silence alone would allow a byte a second for ever. The body is returned in one piece.
"""

import asyncio
from collections.abc import AsyncIterator

from cortex.wire.errors import BodyTooLargeError, SlowBodyError

BODY_TIMEOUT_S = 60.0
BYTES_A_SECOND = 64 * 1024
"""Received bytes that give a body another second."""

FREE_PIECES = 10_000
MIN_PIECE_BYTES = 64
"""Number of pieces beyond which they need a minimum average size: each one wakes the event loop."""

WHOLE_BYTES = 1024 * 1024
"""Length up to which the server assembles a body, where that costs less."""

GRACE_S = 0.5
"""Delay between the deadline of a piece and the cancellation of the wait for it. Granian loses a cancellation that
meets a piece over ASGI, and the request then hangs; so only silent clients are cancelled.
"""

HEAD_TIMEOUT_S = 30
"""Timeout of a request's head; the server also closes a kept connection after so long without one."""


async def read_at_most(limit_bytes: int, pieces: AsyncIterator[bytes], timeout_s: float = BODY_TIMEOUT_S) -> bytes:
    """Return a body that arrives in pieces.

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


def slow_body(size_bytes: int | None, timeout_s: float) -> SlowBodyError:
    """Return the error of a body that took too long, of which so much has come."""
    come = "" if size_bytes is None else f" ({size_bytes} bytes of it have come)"
    return SlowBodyError(
        f"The request body took longer than {timeout_s:g} s and a second for each {BYTES_A_SECOND} bytes{come}."
    )
