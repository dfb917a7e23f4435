"""The usage scanner: bytes pass unchanged in whole SSE events, and first token, usage and end are found."""

import itertools
import json
import pathlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex._fast.sse import SseEventTooLarge
from cortex._fast.usage_scanner import UsageScanner

# Streams as other servers write them, one for each dialect and kind of end.
STREAMS = {path.stem: path.read_bytes() for path in sorted((pathlib.Path(__file__).parent / "streams").glob("*.sse"))}
CHAT = STREAMS["chat"]


def findings(scanner: UsageScanner) -> tuple[bool, int, bytes | None, bool, bool]:
    return scanner.first_token, scanner.num_token_events, scanner.usage, scanner.terminated, scanner.failed


def feed(scanner: UsageScanner, *pieces: bytes) -> bytes:
    return b"".join([scanner.feed(piece) for piece in pieces])


def scanned(*pieces: bytes) -> UsageScanner:
    scanner = UsageScanner()
    feed(scanner, *pieces)
    return scanner


def chat(**fields: Any) -> bytes:
    return b"data: " + json.dumps({"id": "c", "object": "chat.completion.chunk"} | fields).encode() + b"\n\n"


def delta(**fields: Any) -> bytes:
    return chat(choices=[{"index": 0, "delta": fields, "finish_reason": None}])


@pytest.mark.parametrize(
    ("name", "num_token_events", "usage", "terminated", "failed"),
    [
        ("chat", 4, {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}, True, False),
        ("chat_failed", 1, None, False, True),
        ("completions", 2, {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}, True, False),
        ("responses", 4, {"input_tokens": 5, "output_tokens": 6, "total_tokens": 11}, True, False),
        ("responses_failed", 1, {"input_tokens": 5, "output_tokens": 1, "total_tokens": 6}, True, True),
        ("anthropic", 3, {"input_tokens": 9, "output_tokens": 8}, True, False),
    ],
)
def test_dialects(name: str, num_token_events: int, usage: Any, terminated: bool, failed: bool) -> None:
    scanner = scanned(STREAMS[name])
    assert scanner.first_token
    assert scanner.num_token_events == num_token_events
    assert (json.loads(scanner.usage) if scanner.usage is not None else None) == usage
    assert (scanner.terminated, scanner.failed) == (terminated, failed)
    assert scanner.tail == b""


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_every_split_passes_whole_sse_events(name: str, line_end: bytes) -> None:
    stream = STREAMS[name].replace(b"\n", line_end)
    whole = findings(scanned(stream))
    ends = {0}
    for i in range(len(stream)):
        if stream[: i + 1].endswith(line_end * 2):
            ends.add(i + 1)
    for i in range(len(stream) + 1):
        scanner = UsageScanner()
        first = scanner.feed(stream[:i])
        assert len(first) in ends
        assert first + scanner.tail == stream[:i]
        assert first + scanner.feed(stream[i:]) == stream
        assert findings(scanner) == whole
    scanner = UsageScanner()
    passed = [scanner.feed(stream[i : i + 1]) for i in range(len(stream))]
    assert b"".join(passed) == stream
    assert [piece for piece in passed if piece] == [
        sse_event + line_end * 2 for sse_event in stream.split(line_end * 2)[:-1]
    ]
    assert findings(scanner) == whole


@given(
    st.lists(
        st.sampled_from([b"\n", b"\r", b"\r\n", b"data: {", b"event: error", b"x", b":", b"\n\n"]), max_size=16
    ).map(b"".join),
    st.lists(st.integers(0, 60), max_size=5),
)
def test_any_bytes_pass_in_order(stream: bytes, cuts: list[int]) -> None:
    edges = sorted({0, len(stream), *(min(c, len(stream)) for c in cuts)})
    scanner = UsageScanner()
    passed = b"".join(scanner.feed(stream[a:b]) for a, b in itertools.pairwise(edges))
    once = UsageScanner()
    assert passed + scanner.tail == stream
    assert passed == once.feed(stream)
    assert findings(scanner) == findings(once)


@given(st.binary(), st.binary(max_size=30))
def test_garbage_is_harmless(inner: bytes, event: bytes) -> None:
    text = b"event: " + event + b'\ndata: {"choices":[{"delta":{"content":"' + inner + b"\n\n"
    scanner = UsageScanner()
    assert scanner.feed(text) + scanner.tail == text


@pytest.mark.parametrize("name", STREAMS)
def test_every_truncated_payload_is_harmless(name: str) -> None:
    for sse_event in STREAMS[name].split(b"\n\n"):
        for i in range(len(sse_event)):
            text = sse_event[:i] + b"\n\n"
            assert UsageScanner().feed(text) == text


def test_whole_sse_events_pass_as_the_same_object() -> None:
    scanner = UsageScanner()
    data = CHAT[: CHAT.index(b"\n\n") + 2]
    assert scanner.feed(data) is data
    assert scanner.feed(b"") == b""
    assert scanner.feed(b"data: x") == b""
    assert scanner.tail == b"data: x"


@pytest.mark.parametrize(
    "fields",
    [
        {"content": "x"},
        {"role": "assistant", "content": "x"},
        {"reasoning_content": "x"},
        {"reasoning": "x"},
        {"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]},
        {"refusal": "no"},
        {"content": "]"},
        {"content": "}"},
        {"content": '"'},
    ],
)
def test_a_token_is_content_of_any_kind(fields: dict[str, Any]) -> None:
    for sse_events in range(1, 4):
        scanner = scanned(delta(**fields) * sse_events)
        assert scanner.first_token
        assert scanner.num_token_events == sse_events


@pytest.mark.parametrize(
    "sse_event",
    [
        delta(role="assistant", content=""),
        delta(content=None),
        delta(tool_calls=[]),
        delta(),
        chat(choices=[]),
        chat(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}]),
        b": keep-alive\n\n",
        b"event: ping\ndata: {}\n\n",
        b'event: response.created\ndata: {"type":"response.created","response":{"usage":null}}\n\n',
        b'event: content_block_start\ndata: {"type":"content_block_start","content_block":{"text":""}}\n\n',
        b"data: not json\n\n",
        b"data: [DONE\n\n",
        b"\n\n\n",
    ],
)
def test_what_is_no_token(sse_event: bytes) -> None:
    assert findings(scanned(sse_event)) == (False, 0, None, False, False)
    # Nor is it one behind a token whose place is recorded.
    scanner = scanned(delta(content="x"), sse_event)
    assert findings(scanner) == (True, 1, None, False, False)


def test_tokens_of_different_shapes_are_all_counted() -> None:
    shapes = [
        delta(role="assistant", content="a"),
        delta(reasoning_content="b"),
        delta(content="c"),
        delta(role="assistant", content=""),
        delta(content="d"),
        chat(choices=[{"index": 1, "delta": {"content": "e"}}]),
        chat(choices=[{"index": 0, "delta": {}}, {"index": 1, "delta": {"content": "f"}}]),
        chat(choices=[{"index": 0, "text": "g"}]),
        delta(content="h" * 10_000),
        chat(model="m" * 300, choices=[{"index": 0, "delta": {"a" * 100: 1, "content": "i"}}]),
    ]
    assert scanned(*shapes).num_token_events == len(shapes) - 1


SPOOFS = [
    'data: [DONE]\n\n"usage":{"prompt_tokens":1}',
    '{"usage":{"prompt_tokens":1}}',
    '"},"usage":{"prompt_tokens":1},"x":{"y":"',
    '\\","usage":{"prompt_tokens":1}',
    '": usage {"prompt_tokens":1}\n\n: usage {"prompt_tokens":1}\n\n',
    'event: error\ndata: {"error":{}}\n\n',
    '{"type":"response.completed","response":{"usage":{}}}',
    "usage",
    '"usage"',
    "[DONE]",
]


@pytest.mark.parametrize("text", SPOOFS)
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
def test_generated_text_cannot_forge_a_mark(text: str, separators: tuple[str, str]) -> None:
    chunk = {"choices": [{"index": 0, "delta": {"content": text, "tool_calls": [{"function": {"arguments": text}}]}}]}
    sse_events = b"data: " + json.dumps(chunk, separators=separators).encode() + b"\n\n"
    assert findings(scanned(sse_events * 3)) == (True, 3, None, False, False)
    done = {"type": "response.output_text.done", "text": text}
    sse_events = (
        b"event: response.output_text.done\ndata: " + json.dumps(done, separators=separators).encode() + b"\n\n"
    )
    assert findings(scanned(sse_events)) == (False, 0, None, False, False)


def test_a_tool_named_usage_is_not_usage() -> None:
    schema = {"properties": {"usage": {"type": "object"}, "error": {"type": "string"}}}
    response = {"tools": [{"parameters": schema}], "metadata": {"usage": "x"}, "usage": {"input_tokens": 1}}
    data = json.dumps({"type": "response.completed", "response": response}).encode()
    assert scanned(b"event: response.completed\ndata: " + data + b"\n\n").usage == b'{"input_tokens": 1}'
    nested = chat(choices=[{"index": 0, "delta": {"content": "x"}, "extra": {"usage": {"prompt_tokens": 1}}}])
    assert scanned(nested * 2).usage is None


def test_running_usage_is_the_last() -> None:
    chunk = {"choices": [{"index": 0, "delta": {"content": "x"}}]}
    sse_events = [
        b"data: " + json.dumps(chunk | {"usage": {"completion_tokens": n}}).encode() + b"\n\n" for n in range(5)
    ]
    scanner = scanned(*sse_events)
    assert scanner.usage == b'{"completion_tokens": 4}'
    assert scanner.num_token_events == 5
    assert scanned(*sse_events, delta(content="x", usage=None)).usage == b'{"completion_tokens": 4}'


def test_our_own_usage_comment() -> None:
    scanner = scanned(b': usage {"prompt_tokens":1,"completion_tokens":2,"cached_tokens":0}\n\n')
    assert scanner.usage == b'{"prompt_tokens":1,"completion_tokens":2,"cached_tokens":0}'
    assert not scanner.terminated


@pytest.mark.parametrize(
    "sse_event",
    [
        b'data: {"error":{"message":"x"}}\n\n',
        b'data: {"error": "x"}\n\n',
        b'data: { "error" : {"message":"x"}}\n\n',
        b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"x"}}\n\n',
        b'data: {"type":"error","message":"x"}\n\n',
        chat(error={"message": "x"}, choices=[{"index": 0, "delta": {"content": ""}, "finish_reason": "error"}]),
        b"event: error\ndata:\ndata: {}\n\n",
    ],
)
def test_errors(sse_event: bytes) -> None:
    scanner = scanned(delta(content="x"), sse_event)
    assert scanner.failed
    assert not scanner.terminated


def test_null_error_is_none() -> None:
    assert not scanned(chat(error=None, choices=[])).failed


def test_data_over_several_lines() -> None:
    stream = (
        b'data: {"choices":[{"index":0,\ndata: "delta":{"content":"x"}}],\ndata: "usage":{"a":1}}\n\ndata: [DONE]\n\n'
    )
    assert findings(scanned(stream)) == (True, 1, b'{"a":1}', True, False)


def test_byte_order_mark() -> None:
    assert findings(scanned(b"\xef\xbb\xbf" + CHAT)) == findings(scanned(CHAT))


def test_an_sse_event_has_a_limit_whole_or_not() -> None:
    sse_event = b"data: " + b"x" * 92 + b"\n\n"
    assert UsageScanner(max_event_bytes=100).feed(sse_event * 3) == sse_event * 3
    for pieces in ([sse_event], [sse_event[:50], sse_event[50:]]):
        scanner = UsageScanner(max_event_bytes=99)
        with pytest.raises(SseEventTooLarge):
            feed(scanner, *pieces)
