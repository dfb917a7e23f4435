"""SSE events, over every split of the bytes."""

import itertools
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cortex._fast import sse
from cortex._fast.sse import SseDecoder, SseEvent, SseEventTooLarge

# Streams made of the bytes that mean something to a parser.
STREAM = st.lists(
    st.sampled_from(
        [
            b"\n",
            b"\r",
            b"\r\n",
            b"data",
            b"event",
            b"id",
            b":",
            b" ",
            b"x",
            b"data: y",
            b"\n\n",
            b"\xef\xbb\xbf",
            b"\x00",
        ]
    ),
    max_size=24,
).map(b"".join)


def reference(stream: bytes) -> list[SseEvent]:
    """The standard's algorithm, word by word."""
    stream = stream.removeprefix(b"\xef\xbb\xbf")
    *lines, _unfinished = re.split(rb"\r\n|\n|\r", stream)
    sse_events = []
    data: list[bytes] = []
    event = b""
    for line in lines:
        if not line:
            if data:
                sse_events.append(SseEvent(event or None, b"\n".join(data)))
            data, event = [], b""
            continue
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            data.append(value)
        elif field == b"event":
            event = value
    return sse_events


def decode_with(decoder: SseDecoder, *pieces: bytes) -> list[SseEvent]:
    return [sse_event for piece in pieces for sse_event in decoder.feed(piece)]


def decode(*pieces: bytes) -> list[SseEvent]:
    return decode_with(SseDecoder(), *pieces)


@pytest.mark.parametrize(
    ("stream", "sse_events"),
    [
        (b"data: a\n\n", [SseEvent(None, b"a")]),
        (b"event: e\r\ndata: a\r\n\r\n", [SseEvent(b"e", b"a")]),
        (b"data: a\r\rdata: b\r\r", [SseEvent(None, b"a"), SseEvent(None, b"b")]),
        (b"data: YHOO\ndata: +2\ndata: 10\n\n", [SseEvent(None, b"YHOO\n+2\n10")]),
        (b": comment\n\n", []),
        (b"event: ping\n\n", []),
        (b"data\n\ndata\ndata\n\ndata:", [SseEvent(None, b""), SseEvent(None, b"\n")]),
        (b"data:test\n\ndata:  test\n\n", [SseEvent(None, b"test"), SseEvent(None, b" test")]),
        (b"\xef\xbb\xbfdata: a\n\n\xef\xbb\xbfdata: b\n\n", [SseEvent(None, b"a")]),
        (b"id: 1\nretry: 5\ndata: a\nevent\n\n", [SseEvent(None, b"a")]),
        (b"data: a\n", []),
    ],
)
def test_examples_of_the_standard(stream: bytes, sse_events: list[SseEvent]) -> None:
    assert decode(stream) == sse_events == reference(stream)
    assert decode(*[stream[i : i + 1] for i in range(len(stream))]) == sse_events


@given(STREAM)
@example(b"data: x\r\r")
@example(b"\xef\xbb\xbf\ndata: x\n\n")
def test_every_split_gives_the_same_sse_events(stream: bytes) -> None:
    expected = reference(stream)
    for i in range(len(stream) + 1):
        assert decode(stream[:i], stream[i:]) == expected
    assert decode(*[stream[i : i + 1] for i in range(len(stream))]) == expected


@given(STREAM, st.lists(st.integers(0, 200), max_size=6))
def test_any_cuts(stream: bytes, cuts: list[int]) -> None:
    edges = sorted({0, len(stream), *(min(c, len(stream)) for c in cuts)})
    assert decode(*[stream[a:b] for a, b in itertools.pairwise(edges)]) == reference(stream)


@given(st.binary(), st.one_of(st.none(), st.binary(min_size=1)))
def test_encoded_events_are_decoded(data: bytes, event: bytes | None) -> None:
    if event is not None and re.search(rb"[\r\n]", event):
        with pytest.raises(ValueError, match="one line"):
            sse.encode(data, event)
        return
    [sse_event] = decode(sse.encode(data, event))
    assert sse_event.data == re.sub(rb"\r\n|\r", b"\n", data)
    # One space after the colon is part of the syntax.
    assert sse_event.event == event


def test_encoded_bytes() -> None:
    assert sse.encode(b"{}") == b"data: {}\n\n"
    assert sse.encode(b"{}", b"ping") == b"event: ping\ndata: {}\n\n"
    assert sse.encode(b"a\nb", b"e") == b"event: e\ndata: a\ndata: b\n\n"
    assert sse.comment(b"keep-alive") == b": keep-alive\n\n"
    assert sse.comment(b"a\r\nb") == b": a\n: b\n\n"


@given(st.binary())
def test_a_comment_is_no_event(text: bytes) -> None:
    assert decode(sse.comment(text) + b"data: x\n\n") == [SseEvent(None, b"x")]


def test_close_distinguishes_a_cut_from_an_end() -> None:
    decoder = SseDecoder()
    assert decoder.feed(b"data: a\n\ndata: b\n") == [SseEvent(None, b"a")]
    assert decoder.close() == b"data: b\n"
    assert decoder.feed(b"data: c\r\n\r\n") == [SseEvent(None, b"c")]
    assert decoder.close() == b""


def test_an_sse_event_has_a_limit_whole_or_not() -> None:
    sse_event = b"data: " + b"x" * 92 + b"\n\n"
    assert len(SseDecoder(max_event_bytes=100).feed(sse_event * 3)) == 3
    for pieces in ([sse_event], [sse_event[:50], sse_event[50:]], [sse_event[:-1], sse_event[-1:]]):
        decoder = SseDecoder(max_event_bytes=99)
        with pytest.raises(SseEventTooLarge, match="99 bytes") as caught:
            decode_with(decoder, *pieces)
        assert caught.value.max_event_bytes == 99


def test_sse_events_compare_by_value() -> None:
    assert SseEvent(b"a", b"b") == SseEvent(b"a", b"b") != SseEvent(None, b"b")
    assert len({SseEvent(None, b"b"), SseEvent(None, b"b")}) == 1
    assert repr(SseEvent(None, b"b")) == "SseEvent(event=None, data=b'b')"
