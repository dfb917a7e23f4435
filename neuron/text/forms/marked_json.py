"""Calls in JSON behind a marker: a list of objects, or for each a name between texts of its form and its arguments."""

import re
from typing import ClassVar

from neuron.text.forms.form import Piece
from neuron.text.forms.json_calls import MAX_HEAD_CHARS, JsonReader


class MarkedReader(JsonReader):
    """Reader of a list of calls, or of calls of a name and arguments."""

    head: ClassVar[re.Pattern[str]]
    """Text before a call's arguments, with its ``name``."""
    behind: ClassVar[tuple[str, ...]] = ()
    """Texts behind a call, of which each may be left out."""
    opening: ClassVar[str] = ""
    """Text that another call begins with."""
    section_end: ClassVar[str] = ""
    """Text behind the last call."""
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
        found = self.head.fullmatch(before) if brace else None
        if found:
            return self._begin_arguments(found["name"], self._pending[len(before) :], pieces)
        return self._no_call(pieces) if brace or len(before) > MAX_HEAD_CHARS else False

    def _behind(self, pieces: list[Piece]) -> bool:
        return super()._behind(pieces) if self._in_list else self._go(self._between, self._pending)

    def _between(self, pieces: list[Piece]) -> bool:
        if self._in_list:
            body = self._pending.lstrip()
            if not body:
                return False
            self._opened = ""
            if body[0] == ",":
                return self._go(self._item, body[1:])
            self._in_list, self._pending = False, body.removeprefix("]")
        rest = self._pending
        for text in self.behind:
            rest = rest.lstrip().removeprefix(text) if rest.lstrip().startswith(text) else rest
        bare = rest.lstrip()
        if any(text.startswith(bare) and text != bare for text in (*self.behind, self.opening, self.section_end)):
            return False
        if self.opening and bare.startswith(self.opening):
            self._opened = self.opening
            return self._go(self._name, bare[len(self.opening) :])
        return self._end(bare[len(self.section_end) :] if bare.startswith(self.section_end or "\0") else rest)
