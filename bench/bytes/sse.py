"""Cost of a streamed token as an SSE event: encoded in the node, forwarded by the gateway, decoded by a client.

``python bench/bytes/sse.py [--keep]``
"""

import json
import re
from collections.abc import Callable
from typing import Any

import msgspec
import orjson
import report

from cortex._fast import sse
from cortex._fast.chat_stream import ChatStream
from cortex._fast.responses_stream import ResponsesStream
from cortex._fast.sse import SseDecoder
from cortex._fast.usage_scanner import UsageScanner
from cortex.wire.events import Finished, FinishReason, InferenceEvent, Started, TextDelta

ID = "chatcmpl-9f8e7d6c5b4a"
MODEL = "qwen3-8b"
CREATED = 1_700_000_000
TEXTS = {"6 characters": " hello", "200 characters": "The quick brown fox jumps over the lazy dog. " * 5}
BATCH = 16
RESPONSE_EVENTS = 1000
STREAM_SSE_EVENTS = 2_000


class Delta(msgspec.Struct):
    """The peers' delta."""

    content: str


class Choice(msgspec.Struct):
    """The peers' choice."""

    index: int
    delta: Delta
    finish_reason: str | None = None


class Chunk(msgspec.Struct):
    """The peers' chunk, for msgspec."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]


def as_dict(text: str) -> dict[str, Any]:
    """Return a chunk as a dict, for the peers that encode one."""
    return {
        "id": ID,
        "object": "chat.completion.chunk",
        "created": CREATED,
        "model": MODEL,
        "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}],
    }


def responses(events: list[InferenceEvent]) -> None:
    """Make a whole Responses stream, its last event included, which repeats the text."""
    stream = ResponsesStream("resp_9f8e7d6c5b4a", MODEL, CREATED, echo=b"{}")
    for start in range(0, len(events), BATCH):
        stream.sse_events(events[start : start + BATCH])


def producers(text: str) -> dict[str, tuple[Callable[[], object], int]]:
    """Return a call for each encoder, and the number of SSE events that it makes."""
    encoder = msgspec.json.Encoder()
    chat = ChatStream(ID, MODEL, CREATED)
    chat.sse_events([Started(1)])
    one: list[InferenceEvent] = [TextDelta(text)]
    batch = one * BATCH
    events: list[InferenceEvent] = [Started(1), *one * RESPONSE_EVENTS, Finished(FinishReason.STOP, RESPONSE_EVENTS)]
    payload = orjson.dumps(as_dict(text))
    return {
        "json.dumps": (lambda: b"data: " + json.dumps(as_dict(text)).encode() + b"\n\n", 1),
        "orjson": (lambda: b"data: " + orjson.dumps(as_dict(text)) + b"\n\n", 1),
        "msgspec": (
            lambda: (
                b"data: "
                + encoder.encode(Chunk(ID, "chat.completion.chunk", CREATED, MODEL, [Choice(0, Delta(text))]))
                + b"\n\n"
            ),
            1,
        ),
        "sse.encode (payload given)": (lambda: sse.encode(payload), 1),
        "ChatStream, one event": (lambda: chat.sse_events(one), 1),
        f"ChatStream, batch of {BATCH}": (lambda: chat.sse_events(batch), BATCH),
        f"ResponsesStream, a response in batches of {BATCH}": (lambda: responses(events), RESPONSE_EVENTS),
    }


def split(stream: bytes) -> list[bytes]:
    """Split a stream into payloads in plain Python."""
    payloads = []
    for sse_event in re.split(rb"\r?\n\r?\n", stream):
        lines = [line[5:].lstrip(b" ") for line in sse_event.splitlines() if line.startswith(b"data:")]
        if lines:
            payloads.append(b"\n".join(lines))
    return payloads


def findings(stream: bytes) -> tuple[int, Any]:
    """Count tokens and read usage in plain Python, with orjson for the payloads: what the usage scanner does."""
    num_tokens, usage = 0, None
    for payload in split(stream):
        if payload == b"[DONE]":
            continue
        chunk = orjson.loads(payload)
        usage = chunk.get("usage") or usage
        num_tokens += any(choice["delta"].get("content") for choice in chunk["choices"])
    return num_tokens, usage


def consumers(stream: bytes, num_sse_events: int) -> list[dict[str, Any]]:
    """Measure the ways to read a stream, in one piece and SSE event by SSE event."""
    sse_events = [sse_event + b"\n\n" for sse_event in stream.split(b"\n\n")[:-1]]

    def each(make: Callable[[], Callable[[bytes], object]]) -> Callable[[], object]:
        def call() -> None:
            feed = make()
            for sse_event in sse_events:
                feed(sse_event)

        return call

    calls: dict[str, Callable[[], object]] = {
        "Python split": lambda: split(stream),
        "Python split + orjson": lambda: findings(stream),
        "SseDecoder, whole": lambda: SseDecoder().feed(stream),
        "SseDecoder, by SSE event": each(lambda: SseDecoder().feed),
        "UsageScanner, whole": lambda: UsageScanner().feed(stream),
        "UsageScanner, by SSE event": each(lambda: UsageScanner().feed),
    }
    rows = []
    for name, call in calls.items():
        ns = report.best_ns(call)
        rows.append({"way": name, "MB/s": len(stream) / ns * 1e3, "ns/SSE event": ns / num_sse_events})
    return rows


def main() -> None:
    """Measure and print; ``--keep`` writes the result."""
    keep = report.arguments(__doc__).parse_args().keep
    made: dict[str, dict[str, Any]] = {}
    for size, text in TEXTS.items():
        for name, (call, num_sse_events) in producers(text).items():
            made.setdefault(name, {"way": name})[f"ns/SSE event, {size}"] = report.best_ns(call) / num_sse_events
    rows = list(made.values())
    by_way = {row["way"]: row["ns/SSE event, 6 characters"] for row in rows}
    report.write(
        "sse_make",
        rows,
        question="What does one text delta cost, from event to finished SSE event?",
        packages=["orjson", "msgspec"],
        ratios={"msgspec / ChatStream in batches": by_way["msgspec"] / by_way[f"ChatStream, batch of {BATCH}"]},
        keep=keep,
    )
    chat = ChatStream(ID, MODEL, CREATED)
    stream = chat.sse_events([Started(1), *[TextDelta(TEXTS["6 characters"])] * STREAM_SSE_EVENTS])
    rows = consumers(stream, STREAM_SSE_EVENTS + 1)
    by_way = {row["way"]: row["ns/SSE event"] for row in rows}
    report.write(
        "sse_read",
        rows,
        question="What does it cost to read or to scan a chat stream of short deltas?",
        packages=["orjson"],
        ratios={
            "Python split + orjson / UsageScanner": by_way["Python split + orjson"] / by_way["UsageScanner, whole"]
        },
        keep=keep,
    )


if __name__ == "__main__":
    main()
