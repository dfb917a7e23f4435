"""Find the tool calls in an answer: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, however it is cut.

This is the form of Qwen, Hermes and the models trained after them. A block that is not such a call is text, so nothing
a model writes is ever lost.
"""

from dataclasses import dataclass
from typing import Any

import msgspec

from neuron.text.holdback import held_back

START = "<tool_call>"
END = "</tool_call>"


class _CallBody(msgspec.Struct):
    name: str
    arguments: dict[str, Any] | str = {}


_DECODER = msgspec.json.Decoder(_CallBody)


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """A complete call; ``arguments`` is JSON text."""

    name: str
    arguments: str


class ToolCallParser:
    """Feed answer text in any pieces, take text and calls out in order."""

    def __init__(self) -> None:
        self._pending = ""
        self._inside = False
        self._skips_newlines = False

    def feed(self, text: str) -> list[str | ParsedCall]:
        """Return what has become certain; text that may begin a call is held back."""
        self._pending += text
        pieces: list[str | ParsedCall] = []
        while True:
            if self._inside:
                end = self._pending.find(END)
                if end < 0:
                    return pieces
                pieces.append(_parse(self._pending[:end]) or START + self._pending[:end] + END)
                self._pending = self._pending[end + len(END) :]
                self._inside = False
                self._skips_newlines = True
                continue
            if self._skips_newlines:
                self._pending = self._pending.lstrip("\n")
                self._skips_newlines = not self._pending
            start = self._pending.find(START)
            if start < 0:
                keep = held_back(self._pending, [START])
                # Newlines before a call are the call's: hold them back with what may be its tag.
                ready = self._pending[: len(self._pending) - keep].rstrip("\n")
                if ready:
                    pieces.append(ready)
                self._pending = self._pending[len(ready) :]
                return pieces
            if before := self._pending[:start].rstrip("\n"):
                pieces.append(before)
            self._pending = self._pending[start + len(START) :]
            self._inside = True

    def close(self) -> list[str | ParsedCall]:
        """Return what was held back. A call whose end tag is missing counts if it is whole."""
        rest, self._pending = self._pending, ""
        if self._inside:
            self._inside = False
            return [_parse(rest) or START + rest]
        return [rest] if rest else []


def _parse(block: str) -> ParsedCall | None:
    try:
        body = _DECODER.decode(block.strip())
    except msgspec.DecodeError:
        return None
    if isinstance(body.arguments, dict):
        return ParsedCall(body.name, msgspec.json.encode(body.arguments).decode())
    try:
        # Some models write the object as a string, as the OpenAI dialect has it.
        msgspec.json.decode(body.arguments, type=dict[str, Any])
    except msgspec.DecodeError:
        return None
    return ParsedCall(body.name, body.arguments)
