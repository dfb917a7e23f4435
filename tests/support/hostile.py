"""Misbehaviour of nodes: scripts of a fake neuron, with the expected outcome.

``ERROR``: the client gets a typed error of its dialect. ``ANSWER``: the response is odd but valid, and is forwarded.
"""

import asyncio
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from answers import CHAT_ANSWER, CHAT_STREAM
from fake_node import Line, Received, Script

ERROR, ANSWER = "error", "answer"
STREAM = b"".join(CHAT_STREAM)
OK = b"HTTP/1.1 200 OK\r\n"
JSON = b"content-type: application/json\r\n"
EVENTS = b"content-type: text/event-stream\r\n"
CHUNKED = b"transfer-encoding: chunked\r\n"
DEEP = b"[" * 100_000 + b"]" * 100_000


@dataclass(frozen=True)
class Behaviour:
    """A misbehaviour. ``whole`` and ``stream`` are the outcomes of a whole and of a streamed request."""

    name: str
    script: Script
    whole: str | None = ERROR
    stream: str | None = ERROR


def chunk(data: bytes, extension: bytes = b"") -> bytes:
    """Return one HTTP chunk."""
    return b"%x%b\r\n%b\r\n" % (len(data), extension, data)


def sized(body: bytes, head: bytes = JSON, length: int | None = None) -> bytes:
    """Return an answer with a content length."""
    return OK + head + b"content-length: %d\r\n\r\n" % (len(body) if length is None else length) + body


def right(received: Received) -> tuple[bytes, bytes]:
    """Return the headers and the body that are asked for."""
    return (EVENTS, STREAM) if b'"stream":true' in received.body else (JSON, CHAT_ANSWER)


def raw(data: bytes, *, then_cut: bool = False) -> Script:
    """Return a script that sends some bytes, and then cuts the connection or sends no more."""

    async def script(received: Received, line: Line) -> None:
        await line.send(data)
        if then_cut:
            line.cut()

    return script


def flood(head: bytes, piece: bytes) -> Script:
    """Return a script that sends a piece repeatedly until the other side takes no more."""
    pieces = piece * max(1, 65536 // len(piece))

    async def script(received: Received, line: Line) -> None:
        await line.send(head)
        while True:
            await line.send(pieces)
            await asyncio.sleep(0)

    return script


def drip(head: bytes, piece: bytes) -> Script:
    """Return a script that sends a piece every now and then, often enough never to be silent."""

    async def script(received: Received, line: Line) -> None:
        await line.send(head)
        while True:
            await asyncio.sleep(0.02)
            await line.send(piece)

    return script


def framed(change: str) -> Script:
    """Return a script with the right answer and something odd about it."""

    async def script(received: Received, line: Line) -> None:
        head, body = right(received)
        ended = OK + head
        match change:
            case "one-byte chunks":
                wire = ended + CHUNKED + b"\r\n" + b"".join(chunk(body[i : i + 1]) for i in range(len(body)))
                wire += b"0\r\n\r\n"
            case "chunk extensions":
                wire = ended + CHUNKED + b"\r\n" + chunk(body, b";name=value") + b"0;last\r\n\r\n"
            case "trailers":
                wire = ended + CHUNKED + b"\r\n" + chunk(body) + b"0\r\nx-checksum: 1\r\n\r\n"
            case "interim":
                interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n"
                wire = interim + sized(body, head)
            case "no length":
                wire = ended + b"connection: close\r\n\r\n" + body
            case "HTTP/1.0":
                wire = sized(body, head).replace(b"HTTP/1.1", b"HTTP/1.0")
            case "identity":
                wire = sized(body, head + b"content-encoding: identity\r\n")
            case "odd case":
                wire = sized(body, head.upper().replace(b"JSON", b"json").replace(b"EVENT-STREAM", b"event-stream"))
            case "parameters":
                wire = sized(body, head.replace(b"\r\n", b"; charset=utf-8; x=y\r\n"))
            case "duplicate headers":
                wire = sized(body, head + head + b"x-a: 1\r\nx-a: 2\r\nretry-after: nan\r\n")
            case "two answers":
                wire = sized(body, head) * 2
            case "half an answer more":
                wire = sized(body, head) + sized(b'{"choices":[{"evil":1}]}')[:-5]
            case "nonsense after":
                wire = sized(body, head) + b"\x00\xff nonsense \r\n\r\n"
            case "injected":
                wire = sized(body, head + b"x-request-id: evil\r\nset-cookie: a=b\r\nx-cortex-ignored: a\tb, c=d\r\n")
            case "byte by byte":
                for byte in sized(body, head):
                    await line.send(bytes([byte]))
                return
            case _:
                raise AssertionError(change)
        await line.send(wire)
        if change in ("no length", "HTTP/1.0"):
            line.cut()

    return script


def behaviours() -> Iterator[Behaviour]:
    """Yield every behaviour."""
    body, gzip = CHAT_ANSWER, zlib.compress(CHAT_ANSWER, wbits=31)
    for change in (
        *(
            "one-byte chunks",
            "chunk extensions",
            "trailers",
            "interim",
            "no length",
            "HTTP/1.0",
            "identity",
            "odd case",
        ),
        *("parameters", "duplicate headers", "two answers", "half an answer more", "nonsense after", "injected"),
        "byte by byte",
    ):
        yield Behaviour(f"right: {change}", framed(change), ANSWER, ANSWER)

    # ---- bodies that are no answer
    whole = {
        "empty": sized(b""),
        "blank": sized(b" \n\t "),
        "HTML": sized(b"<!doctype html><h1>It works</h1>", b"content-type: text/html\r\n"),
        "HTML labelled as JSON": sized(b"<html></html>"),
        "half the JSON": sized(body[: len(body) // 2]),
        "JSON and more": sized(body + b"}"),
        "two JSON objects": sized(body + body),
        "a list": sized(b"[" + body + b"]"),
        "a number": sized(b"1"),
        "null": sized(b"null"),
        "a string": sized(b'"choices"'),
        "another object": sized(b'{"ok":true}'),
        "choices that are none": sized(b'{"choices":"x"}'),
        "choices of numbers": sized(b'{"choices":[1,2]}'),
        "deep": sized(b'{"choices":[],"x":' + DEEP + b"}"),
        "not UTF-8": sized(b'{"choices":[],"x":"\xff\xfe"}'),
        "lone surrogates": sized(b'{"choices":[],"x":"\\ud800"}'),
        "a NUL": sized(b"\x00" * 100),
        "NaN": sized(b'{"choices":[],"usage":{"prompt_tokens":NaN}}'),
        "gzip": sized(gzip, JSON + b"content-encoding: gzip\r\n"),
        "gzip unlabelled": sized(gzip),
        "an unknown encoding": sized(body, JSON + b"content-encoding: x-evil\r\n"),
        "an error as 200": sized(b'{"error":{"message":"no","type":"t","code":"their_code"}}'),
        "an error text as 200": sized(b'{"error":"no"}'),
        "a duplicate length": sized(body, JSON + b"content-length: 5\r\n"),
        "a negative length": sized(body, length=-1),
        "a huge length": OK + JSON + b"content-length: 99999999999999999999999999\r\n\r\n" + body,
        "length and chunked": OK + JSON + CHUNKED + b"content-length: 5\r\n\r\n" + chunk(body) + b"0\r\n\r\n",
        "a bad chunk size": OK + JSON + CHUNKED + b"\r\nzz\r\n" + body,
        "a negative chunk size": OK + JSON + CHUNKED + b"\r\n-5\r\n" + body,
        "a huge chunk size": OK + JSON + CHUNKED + b"\r\nffffffffffffffffffffffff\r\n" + body,
        "a chunk without its end": OK + JSON + CHUNKED + b"\r\n5\r\n{}    0\r\n\r\n",
        "no HTTP": b"SSH-2.0-OpenSSH_9.9\r\n",
        "TLS": b"\x15\x03\x01\x00\x02\x02\x28",
        "HTTP/2": b"\x00\x00\x12\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x80\x00\x04\x00\x01\x00\x00",
        "HTTP/0.9": b"<html>hello</html>",
        "a status of a thousand": b"HTTP/1.1 1000 X\r\n\r\n",
        "a status of zero": b"HTTP/1.1 000 X\r\ncontent-length: 0\r\n\r\n",
        "a status of 700": b"HTTP/1.1 700 X\r\ncontent-length: 0\r\n\r\n",
        "a line break in a header": OK + JSON + b"x-a: a\r\x00b\r\ncontent-length: 2\r\n\r\n{}",
        "a header without a name": OK + b": x\r\ncontent-length: 2\r\n\r\n{}",
        "switched protocols": b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n",
    }
    for name, wire in whole.items():
        yield Behaviour(name, raw(wire))
    for status in (201, 202, 204, 205, 206, 226, 300, 301, 302, 303, 304, 307, 308):
        head = b"HTTP/1.1 %d X\r\nlocation: http://127.0.0.1:1/\r\n" % status
        tail = b"\r\n" if status in (204, 304) else JSON + b"content-length: %d\r\n\r\n%b" % (len(body), body)
        yield Behaviour(f"status {status}", raw(head + tail))
    for name, wire in {
        "cut length": sized(body, length=len(body) + 10),
        "cut chunked": OK + JSON + CHUNKED + b"\r\n" + chunk(body),
        "cut in a chunk": OK + JSON + CHUNKED + b"\r\n" + chunk(body)[:-9],
        "cut in the head": OK + JSON[:10],
        "cut at once": b"",
        "cut after an interim answer": b"HTTP/1.1 100 Continue\r\n\r\n",
        "cut without a length": OK + JSON + b"connection: close\r\n\r\n" + body[:-4],
    }.items():
        yield Behaviour(name, raw(wire, then_cut=True))

    # ---- errors that are none
    for name, head, content in (
        ("an HTML error", b"content-type: text/html\r\n", b"<h1>Bad gateway</h1>"),
        ("an empty error", JSON, b""),
        ("an error that is no envelope", JSON, b'{"detail":"x"}'),
        ("a deep error", JSON, DEEP),
        ("an error of numbers", JSON, b'{"error":{"message":1,"code":2,"param":3}}'),
        ("an error with a code to log", JSON, b'{"error":{"message":"x","code":"a\\nlevel=fatal"}}'),
        ("an error in gzip", JSON + b"content-encoding: gzip\r\n", gzip),
    ):
        wire = b"HTTP/1.1 500 X\r\n" + head + b"content-length: %d\r\n\r\n" % len(content) + content
        yield Behaviour(name, raw(wire))
    forever = b"HTTP/1.1 503 X\r\nretry-after: %b\r\ncontent-length: 0\r\n\r\n" % (b"9" * 4000)
    yield Behaviour("an error to retry in 10^4000 seconds", raw(forever))
    yield Behaviour("a secret that it does not take", raw(b"HTTP/1.1 401 X\r\ncontent-length: 0\r\n\r\n"))
    yield Behaviour("an endless error", flood(b"HTTP/1.1 500 X\r\n" + CHUNKED + b"\r\n", chunk(b"x" * 1000)))
    yield Behaviour("an error that drips", drip(b"HTTP/1.1 500 X\r\n" + CHUNKED + b"\r\n", chunk(b"x")))

    # ---- without end
    yield Behaviour("silence", raw(b""))
    yield Behaviour("silence in the head", raw(OK))
    yield Behaviour("silence in the body", raw(OK + JSON + b"content-length: 99\r\n\r\n{"))
    yield Behaviour("a head that drips", drip(OK, b"x"))
    yield Behaviour("headers that drip", drip(OK, b"a: b\r\n"))
    yield Behaviour("a body that drips", drip(OK + JSON + CHUNKED + b"\r\n", chunk(b" ")))
    yield Behaviour("blanks that drip before JSON", drip(OK + JSON + b"content-length: 999999\r\n\r\n", b" "))
    yield Behaviour("an endless head", flood(OK, b"x-a: " + b"b" * 100 + b"\r\n"))
    yield Behaviour("an endless header name", flood(OK, b"x"))
    yield Behaviour("an endless status line", flood(b"HTTP/1.1 200 ", b"x"))
    yield Behaviour("endless interim answers", flood(b"", b"HTTP/1.1 100 Continue\r\n\r\n"))
    yield Behaviour("interim answers that drip", drip(b"", b"HTTP/1.1 102 Processing\r\n\r\n"))
    yield Behaviour("an endless body", flood(OK + JSON + CHUNKED + b"\r\n", chunk(b"x" * 60_000)))
    yield Behaviour("endless blank lines", flood(b"", b"\r\n"))
    yield Behaviour("an endless chunk extension", flood(OK + JSON + CHUNKED + b"\r\n1;", b"x"))
    yield Behaviour("endless chunk extensions", flood(OK + JSON + CHUNKED + b"\r\n", chunk(b" ", b";" + b"x" * 2000)))
    yield Behaviour("an endless chunk size", flood(OK + JSON + CHUNKED + b"\r\n", b"0"))
    yield Behaviour("endless one-byte chunks", flood(OK + JSON + CHUNKED + b"\r\n", chunk(b" ")))
    ended = OK + JSON + CHUNKED + b"\r\n" + chunk(body) + b"0\r\n"
    yield Behaviour("endless trailers", flood(ended, b"x-a: b\r\n"))
    yield Behaviour("an endless trailer name", flood(ended, b"x"))
    yield Behaviour("a length as a trailer", raw(ended + b"content-length: 5\r\n\r\n"))
    yield Behaviour("a control character in a header", raw(sized(body, JSON + b"x-cortex-ignored: a\x01b\r\n")))
    yield Behaviour("trailers that drip", drip(ended, b"a: b\r\n"))

    # ---- streams
    begun = OK + EVENTS + CHUNKED + b"\r\n"
    first, last = chunk(CHAT_STREAM[0]), b"0\r\n\r\n"
    for name, wire in {
        "no events": begun + last,
        "an event that is no JSON": begun + first + chunk(b"data: hello\n\n") + last,
        "half an event": begun + first + chunk(b'data: {"choices"') + last,
        "no terminator": begun + b"".join(map(chunk, CHAT_STREAM[:-3])) + last,
        "HTML in a stream": begun + chunk(b"<html></html>\n\n") + last,
        "JSON in a stream": begun + chunk(body) + last,
        "nonsense in a stream": begun + first + chunk(b"data: \xff\xfe\x00\n\n") + last,
        "an error in a stream": begun + first + chunk(b'data: {"error":{"message":"no","code":"x"}}\n\n') + last,
        "a stream in gzip": OK + EVENTS + b"content-encoding: gzip\r\n" + CHUNKED + b"\r\n" + chunk(gzip) + last,
        "a stream as JSON": OK + JSON + CHUNKED + b"\r\n" + chunk(STREAM) + last,
        "a stream of no type": OK + CHUNKED + b"\r\n" + chunk(STREAM) + last,
    }.items():
        yield Behaviour(name, raw(wire), None, ERROR)
    yield Behaviour("a cut stream", raw(begun + first, then_cut=True), None, ERROR)
    yield Behaviour("silence in a stream", raw(begun + first), None, ERROR)
    yield Behaviour("an event without end", flood(begun + b"ffffffff\r\ndata: ", b"x"), None, ERROR)
    yield Behaviour("an event of endless lines", flood(begun + b"ffffffff\r\n", b"data: x\n"), None, ERROR)
    yield Behaviour("absurd usage in a stream", raw(begun + first + chunk(
        b'data: {"choices":[],"usage":{"prompt_tokens":-7,"completion_tokens":1e308}}\n\ndata: [DONE]\n\n') + last),
        None, ANSWER)  # fmt: skip
    complete = begun + b"".join(map(chunk, CHAT_STREAM[:-1]))
    yield Behaviour("nothing after the terminator", raw(complete), None, ANSWER)
    yield Behaviour("a cut after the terminator", raw(complete, then_cut=True), None, ANSWER)
    yield Behaviour("comments after the terminator", drip(complete, chunk(b": still here\n\n")), None, ANSWER)
    yield Behaviour("events after the terminator", flood(complete, chunk(CHAT_STREAM[1])), None, ANSWER)
    yield Behaviour("an endless event after it", flood(complete + b"ffffffff\r\ndata: ", b"x"), None, ANSWER)
    yield Behaviour("endless trailers of a stream", flood(complete + b"0\r\n", b"x-a: b\r\n"), None, ANSWER)

    # ---- answers with numbers that cannot be added up
    for number in (b"-1", b"-9223372036854775809", b"1e308", b"99999999999999999999999999", b'"7"', b"[]", b"1.5"):
        usage = b'"usage":{"prompt_tokens":%b,"completion_tokens":%b,"total_tokens":1}' % (number, number)
        odd = b'{"choices":[{"index":0,"message":{"content":"x"},"finish_reason":"stop"}],%b}' % usage
        yield Behaviour(f"usage of {number.decode()}", raw(sized(odd)), ANSWER, None)
    finish = b'{"choices":[{"message":{"content":"x"},"finish_reason":"%b"}]}' % (b"a\\nlevel=fatal " * 1000)
    yield Behaviour("a finish to log", raw(sized(finish)), ANSWER, None)
