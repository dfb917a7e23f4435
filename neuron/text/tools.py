"""Find the tool calls in an answer, however it is cut, and pass on their arguments as they are written.

The forms of calls (:mod:`neuron.text.forms`) read what follows a marker; all else is text.
"""

from collections.abc import Sequence

from cortex.wire.request import Tool
from neuron.text.forms.form import CallForm, CallReader, Piece
from neuron.text.forms.registry import ALWAYS_READ, HERMES
from neuron.text.holdback import held_back


class ToolCallParser:
    """Feed answer text in any pieces, take text and calls out in order."""

    def __init__(self, form: CallForm = HERMES, tools: Sequence[Tool] = ()) -> None:
        self._bare = form
        self._forms = {each.marker: each for each in (*ALWAYS_READ, form)}
        self._schemas = {tool.name: tool.parameters for tool in tools}
        self._pending = ""
        self._at_start = True
        self._skips_newlines = False
        self._reader: CallReader | None = None

    @property
    def in_call(self) -> bool:
        """Whether the text so far ends in a call, or in what closes one."""
        return self._reader is not None and self._reader.is_call

    def feed(self, text: str) -> list[Piece]:
        """Return what has become certain; text that may begin a call is held back."""
        self._pending += text
        pieces: list[Piece] = []
        while self._read(pieces) if self._reader is not None else self._find(pieces):
            pass
        return pieces

    def close(self, *, cut: bool = False) -> list[Piece]:
        """Return what was held back. With ``cut`` the model was stopped: its unfinished call stays unfinished."""
        rest, self._pending = self._pending, ""
        reader, self._reader = self._reader, None
        if reader is not None:
            return reader.close(cut=cut)
        return [rest] if rest else []

    def _find(self, pieces: list[Piece]) -> bool:
        """Pass on text up to a marker; return whether there is one."""
        if self._skips_newlines:
            self._pending = self._pending.lstrip("\n")
            self._skips_newlines = not self._pending
        if self._at_start and self._bare.bare:
            begun = self._pending.lstrip()
            if not begun:
                return False
            if begun.startswith(self._bare.bare):
                return self._open(self._bare, self._pending[: len(self._pending) - len(begun)], begun)
        found = [(at, marker) for marker in self._forms if (at := self._pending.find(marker)) >= 0]
        at, marker = min(found, default=(len(self._pending) - held_back(self._pending, self._forms), ""))
        # Newlines before a call are the call's: they are held back with what may be its marker.
        text = self._pending[:at].rstrip("\n")
        if text:
            pieces.append(text)
            self._at_start = False
            self._pending = self._pending[len(text) :]
        if not marker:
            return False
        at += len(marker) - len(text)
        return self._open(self._forms[marker], self._pending[:at], self._pending[at:])

    def _open(self, form: CallForm, opened: str, rest: str) -> bool:
        self._reader, self._pending = form.reader(opened, self._schemas), rest
        return True

    def _read(self, pieces: list[Piece]) -> bool:
        """Have the call read on; return whether it has ended."""
        assert self._reader is not None
        pieces += self._reader.feed(self._pending)
        self._pending = self._reader.rest
        if not self._reader.ended:
            return False
        self._at_start, self._skips_newlines = False, self._reader.is_call
        self._reader = None
        return True
