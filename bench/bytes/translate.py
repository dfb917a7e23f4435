"""Cost of translation in the gateway: a Messages stream made of chat chunks, and the bodies of long conversations.

``python bench/bytes/translate.py [--keep]``. CPU time of this process; translation costs the difference to forwarding.
A token is a chunk, and each arrives by itself, as from a node that is not behind.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import orjson
import report

from cortex._fast.chat_stream import ChatStream
from cortex._fast.messages_stream import MessagesStream
from cortex._fast.peek import peek
from cortex._fast.usage_scanner import UsageScanner
from cortex.dialects.dialect import Dialect
from cortex.dialects.registry import MESSAGES, RESPONSES
from cortex.dialects.translate import Translation, to_chat
from cortex.wire.events import Finished, FinishReason, InferenceEvent, Started, TextDelta

NUM_TOKENS = 200
NUM_MESSAGES = 1000
WORDS = (" the", " quick", " brown", " fox", ' "', " jumps", ",\n", " über", " 狐", " dog", ".")


def cpu_ns(call: Callable[[], object], *, repeats: int = 9, min_s: float = 0.1) -> float:
    """Return the median over ``repeats`` of the CPU time of one ``call``."""
    count = 1
    while True:
        start = time.process_time_ns()
        for _ in range(count):
            call()
        if time.process_time_ns() - start >= min_s * 1e9:
            break
        count *= 2
    samples = []
    for _ in range(repeats):
        start = time.process_time_ns()
        for _ in range(count):
            call()
        samples.append((time.process_time_ns() - start) / count)
    return statistics.median(samples)


def events() -> list[InferenceEvent]:
    """Return a stream of text."""
    deltas = [TextDelta(WORDS[i % len(WORDS)]) for i in range(NUM_TOKENS)]
    return [Started(100), *deltas, Finished(FinishReason.STOP, NUM_TOKENS)]


def forward(chunks: list[bytes]) -> None:
    """Do what the gateway does with the chunks of a node of the Messages dialect."""
    scanner = UsageScanner()
    for chunk in chunks:
        scanner.feed(chunk)


def translate(chunks: list[bytes], translation: Translation) -> None:
    """Do what it does with the chunks of a node of the chat dialect."""
    scanner, answer = UsageScanner(), translation.begin()
    for chunk in chunks:
        scanner.feed(answer.sse_events(chunk))


def conversation(dialect: Dialect) -> bytes:
    """Return a body of ``NUM_MESSAGES`` messages, as an agent has them: text, calls and results."""
    text = 'It reads the file and then it says what is in it, at some length, with a "quote" and a\nnew line. ' * 4
    messages: list[dict[str, Any]] = []
    for number in range(NUM_MESSAGES // 4):
        id, arguments = f"call_{number}", {"path": f"src/file_{number}.py", "lines": [1, 200]}
        if dialect is MESSAGES:
            call = {"type": "tool_use", "id": id, "name": "read", "input": arguments}
            result = {"type": "tool_result", "tool_use_id": id, "content": [{"type": "text", "text": text * 3}]}
            messages += [
                {"role": "user", "content": [{"type": "text", "text": text}]},
                {"role": "assistant", "content": [{"type": "text", "text": text}, call]},
                {"role": "user", "content": [result]},
                {"role": "assistant", "content": [{"type": "text", "text": text}]},
            ]
        else:
            called = {
                "type": "function_call",
                "call_id": id,
                "name": "read",
                "arguments": orjson.dumps(arguments).decode(),
            }
            messages += [
                {"role": "user", "content": [{"type": "input_text", "text": text}]},
                called,
                {"type": "function_call_output", "call_id": id, "output": text * 3},
                {"role": "assistant", "content": [{"type": "output_text", "text": text}]},
            ]
    name = "messages" if dialect is MESSAGES else "input"
    return orjson.dumps({"model": "m", "stream": True, "max_tokens": 9, name: messages})


def whole(dialect: Dialect, body: bytes) -> bytes:
    """Return a body as a chat."""
    translation = to_chat(dialect, body)
    assert translation is not None
    return translation.body()


def main() -> None:
    """Measure and print; ``--keep`` writes the result."""
    keep = report.arguments(__doc__).parse_args().keep
    request = orjson.dumps({"model": "m", "stream": True, "messages": [{"role": "user", "content": "hi"}]})
    translation = to_chat(MESSAGES, request)
    assert translation is not None
    translation.body()
    native, chat = MessagesStream("msg_1", "m"), ChatStream("c", "m", 1, include_usage=True)
    native_chunks = [native.sse_events([event]) for event in events()]
    chat_chunks = [chat.sse_events([event]) for event in events()]
    native_us = cpu_ns(lambda: forward(native_chunks)) / NUM_TOKENS / 1e3
    translated = cpu_ns(lambda: translate(chat_chunks, translation)) / NUM_TOKENS / 1e3
    rows: list[dict[str, Any]] = [
        {"what": f"Messages stream of {NUM_TOKENS} tokens, forwarded", "us a token": native_us},
        {"what": f"Messages stream of {NUM_TOKENS} tokens, from chat", "us a token": translated},
    ]
    ratios = {"translation, us a token over forwarding (at most 1.5)": translated - native_us}
    for dialect in (MESSAGES, RESPONSES):
        body = conversation(dialect)
        forwarded = len(body) / cpu_ns(lambda body=body: peek(body)) * 1e3  # type: ignore[misc]
        decoded = len(body) / cpu_ns(lambda body=body, dialect=dialect: whole(dialect, body)) * 1e3  # type: ignore[misc]
        rows.append(
            {"what": f"{dialect.name}, {NUM_MESSAGES} messages, {len(body) >> 10} KiB, forwarded", "MB/s": forwarded}
        )
        rows.append(
            {"what": f"{dialect.name}, {NUM_MESSAGES} messages, {len(body) >> 10} KiB, as a chat", "MB/s": decoded}
        )
        ratios[f"{dialect.name} forwarded, MB/s (at least 300)"] = forwarded
        ratios[f"{dialect.name} as a chat, MB/s (at least 60)"] = decoded
    report.write(
        "translate",
        rows,
        question="What does it cost to translate for a node of the chat dialect alone?",
        packages=["orjson", "msgspec"],
        ratios=ratios,
        keep=keep,
    )


if __name__ == "__main__":
    main()
