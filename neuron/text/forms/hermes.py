"""Calls of Hermes and Qwen: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``.

Every model is understood when it writes this form: it is also what a prompt without a place for tools asks for. Within
the tags there may be a call of Qwen3-Coder (:mod:`neuron.text.forms.xml`).
"""

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from neuron.text.forms.form import CallArguments, CallBegins, CallEnds, CallForm, CallReader, ForcedTool, Piece, Schemas
from neuron.text.forms.json_calls import CLOSING_TAG, START, JsonReader, object_rule, tagged_rules
from neuron.text.forms.xml import FUNCTION, XmlReader
from neuron.text.holdback import held_back


class TaggedReader(JsonReader):
    """Reader of a call within tags."""

    def __init__(self, opened: str, schemas: Schemas) -> None:
        super().__init__(opened, schemas)
        self._inner: CallReader | None = None
        """Reader of a call in another form."""

    def close(self, *, cut: bool) -> list[Piece]:
        """See :class:`~neuron.text.forms.form.CallReader`."""
        if self._inner is not None and not self._inner.ended:
            return self._inner.close(cut=cut)
        if self._state == self._whole and (call := whole_call(self._pending)):
            return call
        return super().close(cut=cut)

    def _begin(self, pieces: list[Piece]) -> bool:
        body = self._pending.lstrip()
        if body.startswith(FUNCTION):
            space = self._pending[: len(self._pending) - len(body)]
            self._inner = XmlReader(self._opened + space + FUNCTION, self._schemas)
            return self._go(self._inside, body[len(FUNCTION) :])
        if body and FUNCTION.startswith(body):
            return False
        return super()._begin(pieces)

    def _other(self, pieces: list[Piece]) -> bool:
        return self._go(self._whole, self._pending)

    def _behind(self, pieces: list[Piece]) -> bool:
        at = self._pending.find(CLOSING_TAG)
        if at < 0:
            self._pending = self._pending[len(self._pending) - held_back(self._pending, [CLOSING_TAG]) :]
            return False
        return self._end(self._pending[at + len(CLOSING_TAG) :])

    def _whole(self, pieces: list[Piece]) -> bool:
        """Read an object in an order of its own when all of it is there."""
        block, closed, rest = self._pending.partition(CLOSING_TAG)
        if not closed:
            return False
        call = whole_call(block)
        pieces += call or [self._opened + block + closed]
        self.is_call = call is not None
        return self._end(rest)

    def _inside(self, pieces: list[Piece]) -> bool:
        assert self._inner is not None
        pieces += self._inner.feed(self._pending)
        self._pending, self.is_call = "", self._inner.is_call
        if not self._inner.ended:
            return False
        return self._go(self._close_inner, self._inner.rest) if self.is_call else self._end(self._inner.rest)

    def _close_inner(self, pieces: list[Piece]) -> bool:
        body = self._pending.lstrip()
        if CLOSING_TAG.startswith(body) and body != CLOSING_TAG:
            return False
        return self._end(body.removeprefix(CLOSING_TAG))


class _WholeCall(msgspec.Struct):
    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"{}")


_WHOLE_DECODER: Final = msgspec.json.Decoder(_WholeCall)
_OBJECT_DECODER: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])


def whole_call(block: str) -> list[Piece] | None:
    """Return the pieces of a call that is all of ``block``; ``None`` if it is none."""
    try:
        body = _WHOLE_DECODER.decode(block.strip())
        arguments = bytes(body.arguments)
        if arguments[:1] == b'"':
            # Some models write the object as a string, as the OpenAI dialect has it.
            arguments = msgspec.json.decode(arguments, type=str).encode()
        fields: dict[str, Any] = _OBJECT_DECODER.decode(arguments)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None
    if not body.name:
        return None
    return [CallBegins(body.name), CallArguments(arguments.decode() if fields else "{}"), CallEnds()]


def grammar(tools: Sequence[ForcedTool], parallel: bool) -> str:
    """See :class:`~neuron.text.forms.form.CallForm`."""
    return tagged_rules([object_rule(tool) for tool in tools], parallel)


FORM: Final = CallForm("hermes", lambda template: START in template, TaggedReader, grammar, START, (CLOSING_TAG,))
