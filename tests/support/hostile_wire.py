"""Random bytes of nodes, and a check of every reader of the gateway against them."""

import asyncio
import itertools
import random
import zlib
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

from answers import CHAT_ANSWER, CHAT_STREAM, MESSAGES_ANSWER, MESSAGES_STREAM, RESPONSES_STREAM

from cortex._fast.http_client import Connection
from cortex._fast.record import Record
from cortex._fast.sse import SseEventTooLarge
from cortex.dialects.registry import CHAT, COMPLETIONS, COUNT_TOKENS, EMBEDDINGS, INPUT_TOKENS, MESSAGES, RESPONSES
from cortex.dialects.renamed import RenamedStream, rename
from cortex.dialects.translate import to_chat
from cortex.fleet.refusals import find_error, read_error, wrong_head
from cortex.pipeline.node_stream import NodeStream
from cortex.responses.background import Run
from cortex.responses.stored import StoredResponses
from cortex.wire.errors import ApiError

DIALECTS = (CHAT, COMPLETIONS, RESPONSES, MESSAGES, EMBEDDINGS, COUNT_TOKENS, INPUT_TOKENS)
ASKED = {
    MESSAGES: b'{"model":"m","max_tokens":5,"messages":[{"role":"user","content":"x"}]%b}',
    RESPONSES: b'{"model":"m","input":"x"%b}',
    COUNT_TOKENS: b'{"model":"m","messages":[{"role":"user","content":"x"}]%b}',
}
MAX_BYTES = 1 << 20
LONG = 32 * 1024
"""Beyond this size a limit may strike in one cut of some bytes and not in another."""

HEADS = [
    *[b"HTTP/1.1 200 OK\r\n"] * 6,
    *[
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 204 X\r\n",
        b"HTTP/1.1 302 X\r\nlocation: /\r\n",
        b"HTTP/1.0 200 X\r\n",
    ],
    *[b"HTTP/1.1 500 X\r\n", b"HTTP/1.1 503 X\r\nretry-after: 99999999999\r\n", b"HTTP/9.9 200\r\n", b"\r\n", b"x"],
]
HEADERS = [
    *[b"content-type: application/json\r\n", b"content-type: text/event-stream\r\n", b"connection: close\r\n"],
    *[b"content-encoding: gzip\r\n", b"content-length: 5\r\n", b"transfer-encoding: gzip, chunked\r\n", b": x\r\n"],
    *[
        b"x-a: " + b"y" * 300 + b"\r\n",
        b"upgrade: x\r\nconnection: upgrade\r\n",
        b"retry-after: \xff\r\n",
        b"a:\x00b\r\n",
    ],
]
VALUES = [
    *[b"0", b"-1", b"1e308", b"-1e400", b"9" * 30, b"1.5", b"null", b"true", b'""', b"[]", b"{}", b"[[[[]]]]", b'"x"'],
    *[
        b'"\\ud800"',
        b'"\xff"',
        b'"' + b"y" * 200 + b'"',
        b"[" * 2000,
        b'{"a":' * 500,
        b"NaN",
        b'"a\\nb"',
        b"[1]",
        b"[{}]",
    ],
]
BODIES = [
    CHAT_ANSWER,
    MESSAGES_ANSWER,
    b'{"object":"list","data":[{"embedding":[1]}],"usage":{"prompt_tokens":1}}',
    b'{"input_tokens":7}',
    b'{"error":{"message":"no","type":"t","param":null,"code":"c"}}',
]
ENDS = [b"0\r\n\r\n", b"0\r\n\r\n", b"0\r\nx: y\r\n\r\n", b"", b"-1\r\n", b"0\r\n\r\nHTTP/1.1 200 OK\r\n"]
EVENTS = [b"data: x\n\n", b": c\n\n", b"event: error\n\n", b"data: [DONE]\n\n", b"\r\r"]
STREAMS = [CHAT_STREAM, MESSAGES_STREAM, RESPONSES_STREAM]
T = TypeVar("T")


def wire(chance: random.Random) -> bytes:
    """Return an answer, or what may be taken for one."""
    body = b"".join(stream(chance)) if chance.random() < 0.5 else document(chance)
    head = chance.choice(HEADS) + b"".join(chance.choices(HEADERS, k=chance.randrange(3)))
    match chance.randrange(4):
        case 0:
            return head + b"content-length: %d\r\n\r\n%b" % (max(0, len(body) + chance.choice([0, 0, 0, 5, -5])), body)
        case 1:
            return head + b"\r\n" + body
        case _:
            chunks = b"".join(
                b"%x%b\r\n%b\r\n" % (len(piece), chance.choice([b"", b"", b";a=b", b";" * 50]), piece)
                for piece in cut(body, chance, chance.choice([1, 2, 10]))
                if piece
            )
            end = chance.choice(
                [b"0\r\n\r\n", b"0\r\n\r\n", b"0\r\nx: y\r\n\r\n", b"", b"-1\r\n", b"0\r\n\r\nHTTP/1.1 200 OK\r\n"]
            )
            return head + b"transfer-encoding: chunked\r\n\r\n" + chunks + end


def document(chance: random.Random) -> bytes:
    """Return a JSON answer with some values replaced."""
    return altered(chance.choice(BODIES), chance)


def stream(chance: random.Random) -> list[bytes]:
    """Return the events of a stream, some of them replaced, left out or sent twice."""
    events = list(chance.choice(STREAMS))
    for _ in range(chance.randrange(4)):
        at = chance.randrange(len(events))
        match chance.randrange(5):
            case 0:
                events[at] = altered(events[at], chance)
            case 1:
                del events[at]
            case 2:
                events.insert(at, events[chance.randrange(len(events))])
            case 3:
                events.insert(
                    at, chance.choice([b"data: x\n\n", b": c\n\n", b"event: error\n\n", b"data: [DONE]\n\n", b"\r\r"])
                )
            case _:
                events[at] = events[at].replace(b"\n", chance.choice([b"\r", b"\r\n", b""]))
        if not events:
            break
    return events


def altered(text: bytes, chance: random.Random) -> bytes:
    """Return some JSON with one value replaced."""
    places = [at + 1 for at, byte in enumerate(text) if byte == ord(":")]
    if not places:
        return text
    at = chance.choice(places)
    end = next((i for i in range(at, len(text)) if text[i] in b",}"), len(text))
    return text[:at] + chance.choice(VALUES) + text[end:]


def cut(data: bytes, chance: random.Random, num_cuts: int) -> list[bytes]:
    """Return some bytes in pieces."""
    edges = sorted({0, len(data), *(chance.randrange(len(data) + 1) for _ in range(num_cuts))})
    return [data[start:end] for start, end in itertools.pairwise(edges)]


class _Transport:
    """A transport that only records whether it is closed."""

    def __init__(self) -> None:
        self.is_closed = False

    def get_extra_info(self, name: str) -> "_Transport":
        return self

    def setsockopt(self, *arguments: object) -> None:
        pass

    def is_closing(self) -> bool:
        return self.is_closed

    def abort(self) -> None:
        self.is_closed = True

    def write(self, data: bytes) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


class _Pool:
    name = "node"

    def __init__(self) -> None:
        self.kept: list[Connection] = []

    def keep(self, connection: Connection) -> None:
        self.kept.append(connection)

    def forget(self, connection: Connection) -> None:
        pass


class Checker:
    """Reads answers as the gateway does, without a network."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()

    def close(self) -> None:
        """Let go of the loop."""
        self._loop.close()

    def check(self, data: bytes) -> None:
        """Fail if anything but a typed error comes of an answer, or cuts make a difference."""
        chance = random.Random(zlib.crc32(data))
        pieces = cut(data, chance, 8)
        whole, cut_up = self._receive([data]), self._receive(pieces)
        if len(data) < LONG:
            assert whole == cut_up, (data, pieces)
        if cut_up is not None:
            self._read(*cut_up, pieces=cut(cut_up[1], chance, 6))

    def _receive(self, pieces: list[bytes]) -> tuple[int, bytes] | None:
        pool, transport = _Pool(), _Transport()
        connection = Connection(pool, self._loop)
        connection.connection_made(transport)  # type: ignore[arg-type]
        response = connection.ask(b"GET / HTTP/1.1\r\n", b"", 60, 60, 60)
        for piece in pieces:
            if transport.is_closed:
                break
            connection.data_received(piece)
        connection.connection_lost(None)
        try:
            _finish(response.begin())
            wrong_head(response, is_stream=True)
            found = response.status, _finish(response.read_all(MAX_BYTES))
        except ApiError as error:
            assert error.message
            found = None
        response.close()
        return found

    def _read(self, status: int, body: bytes, pieces: list[bytes]) -> None:
        error, _ = read_error(status, body, b"9" * 400)
        assert error.message is not None
        find_error(body)
        rename(body, "other")
        for dialect in DIALECTS:
            read = dialect.read(body)
            if read is not None and read[0] is not None:
                assert min(read[0].counts()) >= 0
            self._forward(Record("r", dialect.name), pieces, dialect)
            if dialect in ASKED:
                _refusable(lambda dialect=dialect: self._translate(dialect, body, pieces))  # type: ignore[misc]
        _refusable(lambda: [RenamedStream("x").sse_events(piece) for piece in pieces])
        run = Run("resp_1", b'{"id":"resp_1","status":"queued"}', StoredResponses(None))
        _refusable(lambda: [run.add_all(piece) for piece in pieces])
        if run.ended:
            assert isinstance(run.is_answer, bool)

    def _forward(self, record: Record, pieces: list[bytes], dialect: Any) -> None:
        node_stream = NodeStream(record)
        passed = b""

        def take() -> None:
            nonlocal passed
            for piece in pieces:
                passed += node_stream.take(piece)
                node_stream.check()

        _refusable(take)
        assert b"".join(pieces).startswith(passed)
        node_stream.record_end(dialect)
        assert min(record.counts()) >= 0
        assert "\n" not in record.finish
        dialect.failure(error_info(), node_stream.first, node_stream.last)

    def _translate(self, dialect: Any, body: bytes, pieces: list[bytes]) -> None:
        asked = to_chat(dialect, ASKED[dialect] % b"")
        assert asked is not None
        asked.begin().whole(body)
        streamed = to_chat(dialect, ASKED[dialect] % b',"stream":true')
        assert streamed is not None
        answer = streamed.begin()
        for piece in pieces:
            answer.sse_events(piece)
        answer.end()


def error_info() -> Any:
    """Return an error to end a stream with."""
    return ApiError("x").info()


def _refusable(read: Any) -> None:
    """Call something that may refuse what it reads, by a typed error."""
    try:
        read()
    except (ApiError, SseEventTooLarge):
        pass


def _finish(coroutine: Coroutine[Any, Any, T]) -> T:
    """Return the result of a coroutine that has nothing to wait for."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        found: T = stop.value
        return found
    coroutine.close()
    raise AssertionError("the answer has ended and somebody still waits for it")


def samples(num: int, seed: int) -> Iterator[bytes]:
    """Yield some answers."""
    for i in range(num):
        yield wire(random.Random(f"{seed} {i}"))
