"""Fuzz the event-stream readers over splits: ``python tests/fuzz/fuzz_sse.py -runs=200000``.

Every stream is made here, of the pieces that a reader parses, and cut at random. The oracle of the decoder
is the standard's algorithm over the whole stream; that of the usage scanner is its result for the whole stream, and
the bytes.
"""

import itertools
import random
import re
import sys
import zlib

import atheris

from cortex._fast.sse import SseDecoder
from cortex._fast.usage_scanner import UsageScanner

PIECES = [
    *[bytes([c]) for c in b'\n\n\n\r\r: {}[]",x\\\x00\xff'],
    *[
        b"data",
        b"event",
        b"data: ",
        b"event: ",
        b": usage {",
        b"[DONE]",
        b"\n\n",
        b"\n\n",
        b"\r\n\r\n",
        b"\xef\xbb\xbf",
    ],
    *[b'data: {"choices":[{"index":0,"delta":{"content":"', b'"}}]}\n\n', b'"usage":{"a":1}', b'"error":', b"error\n"],
    *[b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n', b"event: response.output_text.delta\n"],
    *[b"event: response.completed\n", b"event: message_delta\n", b'data: {"type":"', b'"response":{', b"y" * 17],
]


def reference(stream: bytes) -> list[tuple[bytes | None, bytes]]:
    """Return the SSE events by the standard's algorithm."""
    sse_events = []
    data: list[bytes] = []
    event = b""
    for line in re.split(rb"\r\n|\n|\r", stream.removeprefix(b"\xef\xbb\xbf"))[:-1]:
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if not line:
            if data:
                sse_events.append((event or None, b"\n".join(data)))
            data, event = [], b""
        elif field == b"data":
            data.append(value)
        elif field == b"event":
            event = value
    return sse_events


def findings(scanner: UsageScanner) -> tuple[object, ...]:
    """Return everything that a usage scanner found."""
    return scanner.first_token, scanner.num_token_events, scanner.usage, scanner.terminated, scanner.failed


def mutate(_data: bytes, max_size: int, seed: int) -> bytes:
    """Return a new stream."""
    chance = random.Random(seed)
    return b"".join(chance.choices(PIECES, k=chance.randrange(40)))[:max_size]


def check(stream: bytes) -> None:
    """Fail unless cuts make no difference."""
    chance = random.Random(zlib.crc32(stream))
    edges = sorted({0, len(stream), *(chance.randrange(len(stream) + 1) for _ in range(chance.randrange(8)))})
    pieces = [stream[start:end] for start, end in itertools.pairwise(edges)]
    decoder, scanner, whole = SseDecoder(), UsageScanner(), UsageScanner()
    sse_events = [(sse_event.event, sse_event.data) for piece in pieces for sse_event in decoder.feed(piece)]
    assert sse_events == reference(stream), (stream, edges)
    passed = b"".join([scanner.feed(piece) for piece in pieces])
    assert passed + scanner.tail == stream, (stream, edges)
    assert passed == whole.feed(stream), (stream, edges)
    assert findings(scanner) == findings(whole), (stream, edges)


@atheris.instrument_func  # type: ignore[untyped-decorator]
def one_input(data: bytes) -> None:
    """Check one stream."""
    check(data)


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input, custom_mutator=mutate)
    atheris.Fuzz()
