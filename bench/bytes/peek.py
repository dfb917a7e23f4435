"""Cost of finding a body's model and of checking that the rest is JSON.

``python bench/bytes/peek.py [--keep]``
"""

import json
from collections.abc import Callable
from typing import Any

import msgspec
import orjson
import report

from cortex._fast.peek import peek, splice

BODY_BYTES = 64 * 1024


class Routed(msgspec.Struct):
    """The fields a gateway routes by, for msgspec, which skips the others without building them."""

    model: str
    stream: bool | None = None
    previous_response_id: str | None = None
    prompt_cache_key: str | None = None


def body(message: dict[str, Any], **fields: Any) -> bytes:
    """Return a chat body of about ``BODY_BYTES`` that repeats ``message``."""
    size = len(orjson.dumps(message)) + 1
    return orjson.dumps({"model": "qwen3-8b", "stream": True, "messages": [message] * (BODY_BYTES // size)} | fields)


def bodies() -> dict[str, bytes]:
    """Return the bodies that are measured: prose, code, Chinese, and the many small objects of a tool-using agent."""
    prose = "The quick brown fox jumps over the lazy dog, and the dog lets it. " * 12
    code = 'def f(x: int) -> str:\n    return f"{x!r}\\t"\n' * 20
    call = {"id": "call_1", "type": "function", "function": {"name": "read_file", "arguments": '{"path":"a.py"}'}}
    return {
        "prose": body({"role": "user", "content": prose}),
        "code": body({"role": "user", "content": code}),
        "Chinese": body({"role": "user", "content": "敏捷的棕色狐狸跳过了懒狗，狗也由它去。" * 20}),
        "tool calls": body({"role": "assistant", "content": None, "tool_calls": [call]}, temperature=0.7),
    }


def main() -> None:
    """Measure and print; ``--keep`` writes the result."""
    keep = report.arguments(__doc__).parse_args().keep
    decoder = msgspec.json.Decoder(Routed)
    ways: dict[str, Callable[[bytes], object]] = {
        "json.loads": json.loads,
        "orjson.loads": orjson.loads,
        "msgspec, four fields": decoder.decode,
        "peek": peek,
        "peek + splice": lambda text: splice(text, peek(text), "another-model"),
    }
    rows: list[dict[str, Any]] = [{"way": name} for name in ways]
    ratios = {}
    for kind, text in bodies().items():
        for row, way in zip(rows, ways.values(), strict=True):
            row[f"us, {kind}"] = report.best_ns(lambda way=way, text=text: way(text)) / 1e3  # type: ignore[misc]
        by_way = {row["way"]: row[f"us, {kind}"] for row in rows}
        ratios[f"orjson.loads / peek, {kind}"] = by_way["orjson.loads"] / by_way["peek"]
    report.write(
        "peek",
        rows,
        question=f"What does it cost to route a chat body of {BODY_BYTES // 1024} KiB?",
        packages=["orjson", "msgspec"],
        ratios=ratios,
        keep=keep,
    )


if __name__ == "__main__":
    main()
