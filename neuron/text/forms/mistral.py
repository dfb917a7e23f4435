"""Calls of Mistral: ``[TOOL_CALLS]`` and a list of objects, or a name, perhaps ``[ARGS]``, and the arguments.

Its marker is a special token, which a grammar of text cannot ask for: a call is forced in the form of Hermes.
"""

from typing import Final

from neuron.text.forms import hermes
from neuron.text.forms.form import CallForm, Piece
from neuron.text.forms.json_calls import MAX_HEAD_CHARS, JsonReader

TOOL_CALLS: Final = "[TOOL_CALLS]"
ARGS: Final = "[ARGS]"
CALL_ID: Final = "[CALL_ID]"


class MistralReader(JsonReader):
    """Reader of a list of calls, or of a call of a name and arguments."""

    _in_list = False

    def _begin(self, pieces: list[Piece]) -> bool:
        body = self._pending.lstrip()
        if not body:
            return False
        if body[0] != "[":
            return self._go(self._name, self._pending)
        self._in_list = True
        self._opened += self._pending[: len(self._pending) - len(body) + 1]
        return self._go(self._item, body[1:])

    def _item(self, pieces: list[Piece]) -> bool:
        return super()._begin(pieces)

    def _name(self, pieces: list[Piece]) -> bool:
        before, brace, _ = self._pending.partition("{")
        name = before.partition(ARGS)[0].partition(CALL_ID)[0].strip()
        if (brace and name) and "\n" not in name:
            return self._begin_arguments(name, self._pending[len(before) :], pieces)
        if brace or "\n" in before.strip() or len(before) > MAX_HEAD_CHARS:
            return self._no_call(pieces)
        return False

    def _behind(self, pieces: list[Piece]) -> bool:
        return super()._behind(pieces) if self._in_list else self._end(self._pending)

    def _between(self, pieces: list[Piece]) -> bool:
        body = self._pending.lstrip()
        if not body:
            return False
        self._opened = ""
        return self._go(self._item, body[1:]) if body[0] == "," else self._end(body.removeprefix("]"))


FORM: Final = CallForm(
    "mistral", lambda template: TOOL_CALLS in template, MistralReader, hermes.grammar, TOOL_CALLS, (ARGS, CALL_ID)
)
