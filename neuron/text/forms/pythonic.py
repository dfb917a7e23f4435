"""Calls as Python writes them: ``[name(key='text', other=1), other()]``, of LFM2 and Llama 4.

LFM2 writes them between special tokens, Llama 4 where the answer begins. An argument is sent once it is whole; one that
is no literal is sent as text.
"""

import re
from typing import Final

from neuron.text.forms import hermes
from neuron.text.forms.bare_values import json_text, literal_as_json
from neuron.text.forms.form import CallArguments, CallBegins, CallEnds, CallForm, CallReader, Piece
from neuron.text.forms.json_calls import MAX_HEAD_CHARS

LFM_START: Final = "<|tool_call_start|>"
LFM_END: Final = "<|tool_call_end|>"
LLAMA_START: Final = "<|python_start|>"
LLAMA_END: Final = "<|python_end|>"
_HEAD: Final = re.compile(r"(\s*\[)?\s*(?P<name>[A-Za-z_][\w.-]*)\s*\(\s*(?=\)|[A-Za-z_]\w*\s*=[^=])")
_PART_OF_HEAD: Final = re.compile(r"\s*(\[\s*)?([A-Za-z_][\w.-]*\s*(\(\s*([A-Za-z_]\w*\s*=?)?)?)?")
_KEY: Final = re.compile(r"\s*,?\s*(?P<name>[A-Za-z_]\w*)\s*=(?!=)\s*")
_MARK: Final = re.compile(r"""["'(){}\[\],]""")
_REST: Final = {"'": re.compile(r"(?:[^'\\]|\\.)*", re.DOTALL), '"': re.compile(r'(?:[^"\\]|\\.)*', re.DOTALL)}


class PythonicReader(CallReader):
    """Reader of a list of calls."""

    closing = (LFM_END, LLAMA_END)
    _num_given = 0

    def close(self, *, cut: bool) -> list[Piece]:
        """See :class:`~neuron.text.forms.form.CallReader`; an argument that was cut is left out."""
        if not self.is_call:
            return [self._opened + self._pending]
        if self._state != self._argument or cut:
            return []
        return self._ended_call()

    def _begin(self, pieces: list[Piece]) -> bool:
        found = _HEAD.match(self._pending)
        if found is None:
            may_be = len(self._pending) <= MAX_HEAD_CHARS and _PART_OF_HEAD.fullmatch(self._pending)
            return False if may_be else self._no_call(pieces)
        pieces.append(CallBegins(found["name"]))
        self.is_call, self._num_given = True, 0
        return self._go(self._argument, self._pending[found.end() :])

    def _argument(self, pieces: list[Piece]) -> bool:
        body = self._pending.lstrip()
        if body.startswith(")"):
            pieces += self._ended_call()
            return self._go(self._between, body[1:])
        key = _KEY.match(self._pending)
        end = _end_of_value(self._pending, key.end()) if key else -1
        if key is None or end < 0:
            return False
        start = ", " if self._num_given else "{"
        value = literal_as_json(self._pending[key.end() : end].strip())
        pieces.append(CallArguments(f"{start}{json_text(key['name'])}: {value}"))
        self._num_given += 1
        return self._go(self._argument, self._pending[end:].removeprefix(","))

    def _ended_call(self) -> list[Piece]:
        return [CallArguments("}" if self._num_given else "{}"), CallEnds()]

    def _between(self, pieces: list[Piece]) -> bool:
        body = self._pending.lstrip()
        if body[:1] in {",", ";"}:
            self._opened = ""
            return self._go(self._begin, body[1:])
        if not body:
            return False
        rest = body.removeprefix("]")
        bare = rest.lstrip()
        if any(tag.startswith(bare) and tag != bare for tag in self.closing):
            return False
        return self._end(next((bare[len(tag) :] for tag in self.closing if bare.startswith(tag)), rest))


def _end_of_value(text: str, at: int) -> int:
    """Return where a value ends that begins at ``at``: at a comma or bracket that is not its own; -1: not yet there."""
    depth = 0
    while found := _MARK.search(text, at):
        mark, at = found[0], found.end()
        if mark in _REST:
            rest = _REST[mark].match(text, at)
            assert rest is not None  # it matches nothing, too
            at = rest.end() + 1
            if at > len(text) or text[at - 1] != mark:
                return -1
        elif mark in "([{":
            depth += 1
        elif depth == 0:
            return found.start()
        elif mark != ",":
            depth -= 1
    return -1


FORM: Final = CallForm(
    "lfm", lambda template: LFM_START in template, PythonicReader, hermes.grammar, LFM_START, (LFM_END,)
)
LLAMA_FORM: Final = CallForm(
    "llama4",
    lambda template: "<|header_start|>" in template,
    PythonicReader,
    hermes.grammar,
    LLAMA_START,
    (LLAMA_END,),
    bare="[",
)
