"""Calls and reasoning of Gemma 4: ``<|tool_call>call:NAME{key:<|"|>text<|"|>,other:[1,true]}<tool_call|>``.

Its texts stand between special tokens and need no escapes; they are streamed as they come. A grammar of text cannot ask
for these tokens: a call is forced in the form of Hermes.
"""

import re
from typing import Final

from neuron.text.forms import hermes, think
from neuron.text.forms.bare_values import json_text, literal_as_json, quoted
from neuron.text.forms.form import (
    CallArguments,
    CallBegins,
    CallEnds,
    CallForm,
    CallReader,
    Piece,
    ReasoningForm,
    Schemas,
)
from neuron.text.forms.json_calls import MAX_HEAD_CHARS
from neuron.text.holdback import held_back

START: Final = "<|tool_call>"
END: Final = "<tool_call|>"
QUOTE: Final = '<|"|>'
CHANNEL: Final = "<|channel>"
_HEAD: Final = re.compile(r"\s*call:(?P<name>[^\s{}<>]{1,256})\s*\{")
_PART_OF_HEAD: Final = re.compile(r"\s*(?:c|ca|cal|call|call:[^\s{}<>]{0,256}\s*)?")
_KEY: Final = re.compile(
    rf"(?:{re.escape(QUOTE)}(?P<quoted>.*?){re.escape(QUOTE)}|(?P<bare>[^:{{}}\[\]<>,]+?))\s*:", re.DOTALL
)
_WORD_END: Final = re.compile(r"[,}\]]")
_CLOSES: Final = {"{": "}", "[": "]"}


class Gemma4Reader(CallReader):
    """Reader of what follows ``<|tool_call>``."""

    def __init__(self, opened: str, schemas: Schemas) -> None:
        super().__init__(opened, schemas)
        self._open: list[str] = []
        """Open brackets."""
        self._wants_key = True

    def close(self, *, cut: bool) -> list[Piece]:
        """See :class:`~neuron.text.forms.form.CallReader`."""
        if not self.is_call:
            return [self._opened + self._pending]
        if cut or not self._open:
            return []
        pieces: list[Piece] = []
        if self._state == self._string:
            pieces.append(CallArguments(quoted(self._pending) + '"'))
        elif self._state == self._value and not self._wants_key:
            pieces.append(CallArguments(literal_as_json(self._pending.strip())))
        return [*pieces, *self._closed()]

    def _begin(self, pieces: list[Piece]) -> bool:
        found = _HEAD.match(self._pending)
        if found is None:
            may_be = len(self._pending) <= MAX_HEAD_CHARS and _PART_OF_HEAD.fullmatch(self._pending)
            return False if may_be else self._no_call(pieces)
        pieces += [CallBegins(found["name"]), CallArguments("{")]
        self.is_call, self._open, self._wants_key = True, ["{"], True
        return self._go(self._value, self._pending[found.end() :])

    def _value(self, pieces: list[Piece]) -> bool:
        """Read a key, a value, or what stands between them."""
        body = self._pending.lstrip()
        if not body:
            return False
        if body[0] in "}]":
            return self._close_bracket(body, pieces)
        if body[0] == ",":
            pieces.append(CallArguments(", "))
            self._wants_key = self._open[-1] == "{"
            return self._go(self._value, body[1:])
        if self._wants_key:
            return self._key(body, pieces)
        if body.startswith(QUOTE):
            pieces.append(CallArguments('"'))
            return self._go(self._string, body[len(QUOTE) :])
        if body[0] in "{[":
            pieces.append(CallArguments(body[0]))
            self._open.append(body[0])
            self._wants_key = body[0] == "{"
            return self._go(self._value, body[1:])
        found = _WORD_END.search(body)
        if found is None or QUOTE.startswith(body):
            return False
        pieces.append(CallArguments(literal_as_json(body[: found.start()].strip())))
        return self._go(self._value, body[found.start() :])

    def _key(self, body: str, pieces: list[Piece]) -> bool:
        found = _KEY.match(body)
        if found is None:
            if len(body) <= MAX_HEAD_CHARS and not _WORD_END.search(body):
                return False
            pieces += self._closed()
            return self._end(body)
        name = found["bare"] if found["quoted"] is None else found["quoted"]
        pieces.append(CallArguments(f"{json_text(name)}: "))
        self._wants_key = False
        return self._go(self._value, body[found.end() :])

    def _string(self, pieces: list[Piece]) -> bool:
        text, closed, rest = self._pending.partition(QUOTE)
        if not closed:
            keep = held_back(self._pending, [QUOTE])
            text, rest = self._pending[: len(self._pending) - keep], self._pending[len(self._pending) - keep :]
        if text or closed:
            pieces.append(CallArguments(quoted(text) + ('"' if closed else "")))
        return self._go(self._value if closed else self._string, rest) and bool(closed)

    def _close_bracket(self, body: str, pieces: list[Piece]) -> bool:
        if body[0] != _CLOSES[self._open[-1]]:
            pieces += self._closed()
            return self._end(body)
        self._open.pop()
        pieces.append(CallArguments(body[0]))
        self._wants_key = False
        if self._open:
            return self._go(self._value, body[1:])
        pieces.append(CallEnds())
        return self._go(self._between, body[1:])

    def _between(self, pieces: list[Piece]) -> bool:
        body = self._pending.lstrip()
        if END.startswith(body) and body != END:
            return False
        return self._end(body[len(END) :] if body.startswith(END) else self._pending)

    def _closed(self) -> list[Piece]:
        """Return what closes all that is open."""
        closing = "".join(_CLOSES[each] for each in reversed(self._open))
        self._open = []
        return [CallArguments(closing), CallEnds()]


FORM: Final = CallForm("gemma4", lambda template: START in template, Gemma4Reader, hermes.grammar, START, (END, QUOTE))
REASONING: Final = ReasoningForm(
    "gemma4", lambda template: CHANNEL in template and "<channel|>" in template, f"{CHANNEL}thought", "<channel|>",
    think.EARLY_END,
)  # fmt: skip
