"""The compiled request path, for pytest-benchmark: ``pytest --benchmark bench/regressions/test_fast.py``."""

from typing import Any

import orjson

from cortex._fast import sse
from cortex._fast.chat_stream import ChatStream
from cortex._fast.peek import peek, splice
from cortex._fast.responses_stream import ResponsesStream
from cortex._fast.sse import SseDecoder
from cortex._fast.usage_scanner import UsageScanner
from cortex.wire.events import Finished, FinishReason, InferenceEvent, ReasoningDelta, Started, TextDelta

DELTAS: list[InferenceEvent] = [TextDelta(" hello")] * 1000
EVENTS: list[InferenceEvent] = [Started(9), ReasoningDelta("Hm"), *DELTAS, Finished(FinishReason.STOP, 1001)]
CHAT = ChatStream("chatcmpl-1", "qwen3-8b", 1).sse_events(EVENTS)
MESSAGE = {"role": "user", "content": "The quick brown fox jumps over the lazy dog.\n" * 20}
BODY = orjson.dumps({"model": "qwen3-8b", "stream": True, "messages": [MESSAGE] * 70})


def test_encode(benchmark: Any) -> None:
    """Encode a short payload."""
    assert benchmark(sse.encode, b"x" * 200, b"ping").endswith(b"\n\n")


def test_chat_stream(benchmark: Any) -> None:
    """Make a chat stream of a thousand short deltas."""
    sse_events = benchmark(lambda: ChatStream("chatcmpl-1", "qwen3-8b", 1).sse_events(EVENTS))
    assert sse_events == CHAT


def test_chat_stream_of_wide_text(benchmark: Any) -> None:
    """Make a thousand deltas of Chinese."""
    chat = ChatStream("chatcmpl-1", "qwen3-8b", 1)
    chat.sse_events([Started(9)])
    deltas: list[InferenceEvent] = [TextDelta("你好")] * 1000
    assert benchmark(chat.sse_events, deltas).count(b"data: ") == 1000


def test_responses_stream(benchmark: Any) -> None:
    """Make a Responses stream of a thousand short deltas."""
    sse_events = benchmark(lambda: ResponsesStream("resp_1", "qwen3-8b", 1, echo=b"{}").sse_events(EVENTS))
    assert sse_events.count(b"event: response.output_text.delta") == 1000


def test_sse_event_decoder(benchmark: Any) -> None:
    """Read a chat stream."""
    assert len(benchmark(lambda: SseDecoder().feed(CHAT))) == 1004


def test_usage_scanner(benchmark: Any) -> None:
    """Pass a chat stream on."""

    def scan() -> int:
        scanned = UsageScanner()
        scanned.feed(CHAT)
        return scanned.num_token_events

    assert benchmark(scan) == 1001


def test_peek(benchmark: Any) -> None:
    """Route a body of 64 KiB."""
    assert benchmark(peek, BODY).model == "qwen3-8b"


def test_splice(benchmark: Any) -> None:
    """Replace its model."""
    assert b'"other"' in benchmark(splice, BODY, peek(BODY), "other")
