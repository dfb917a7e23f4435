"""Decoding of compressed request bodies: gzip and deflate, within the size limit of a body; others are refused.

Memory never exceeds the limit, whatever a few bytes would expand to. zlib releases the interpreter's lock, so that
large bodies are decoded in a thread without delaying other requests.
"""

import asyncio
import zlib

from cortex.wire.errors import BodyTooLargeError, InvalidRequestError, UnsupportedEncodingError

TAKEN = "gzip, deflate"
INLINE_BYTES = 64 * 1024
"""Size, compressed or not, above which a body is decoded in a thread."""

MAX_MEMBERS = 64
"""Maximum number of members of a gzip body: concatenated files have a few, and each costs a start."""


async def decoded(body: bytes, encoding: str, limit_bytes: int) -> bytes:
    """Return a body without its content encoding.

    Raises:
        UnsupportedEncodingError: the encoding is neither gzip nor deflate, or there are several.
        BodyTooLargeError: it is longer than ``limit_bytes``.
        InvalidRequestError: it is not encoded as its header says.
    """
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return body
    if name not in ("gzip", "x-gzip", "deflate"):
        shown = "".join(c if c.isascii() and c.isprintable() else "?" for c in encoding[:40])
        raise UnsupportedEncodingError(
            f"A body with content-encoding '{shown}' is not read: send it plain, or by one of {TAKEN}."
        )
    if len(body) <= INLINE_BYTES and limit_bytes <= INLINE_BYTES * 64:
        return inflate(body, name, limit_bytes)
    return await asyncio.to_thread(inflate, body, name, limit_bytes)


def inflate(body: bytes, name: str, limit_bytes: int) -> bytes:
    """Return a gzip or deflate body decompressed; see :func:`decoded`."""
    pieces: list[bytes] = []
    left_bytes = limit_bytes
    for _ in range(MAX_MEMBERS):
        # RFC 9110 has deflate in zlib's frame; some clients leave that out.
        raw = name == "deflate" and (len(body) < 2 or body[0] & 0x0F != 8 or (body[0] << 8 | body[1]) % 31)
        reader = zlib.decompressobj(31 if name != "deflate" else -15 if raw else 15)
        try:
            piece = reader.decompress(body, left_bytes + 1)
        except zlib.error:
            raise InvalidRequestError(f"The request body is not {name}, as its content-encoding says.") from None
        if len(piece) > left_bytes:
            raise BodyTooLargeError(f"The request body is longer than the {limit_bytes} bytes that are read, decoded.")
        pieces.append(piece)
        left_bytes -= len(piece)
        if not reader.eof:
            raise InvalidRequestError(f"The request body ends before its {name} does.")
        body = reader.unused_data
        if not body:
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)
        if name == "deflate":
            break
    raise InvalidRequestError(f"Something follows the {name} in the request body.")
