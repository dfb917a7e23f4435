"""Split a model's output into reasoning and answer by its tags, wherever the tags are cut.

Knows the tags and nothing of tokens. A text that ends in mid-thought is reasoning throughout.
"""

from collections.abc import Sequence
from enum import Enum
from typing import Final

from neuron.text.forms.form import ReasoningForm
from neuron.text.holdback import held_back

EFFORTS: Final = ("low", "medium", "high", "xhigh", "max")
"""Efforts of thinking in their order, as APIs name them."""


def nearest_effort(asked: str, taken: Sequence[str]) -> str:
    """Return the effort of those that a template has ``taken`` that is nearest to the one asked for, above it first."""
    order = EFFORTS[EFFORTS.index(asked) :] + EFFORTS[EFFORTS.index(asked) :: -1]
    return next((effort for effort in order if effort in taken), asked)


class Section(Enum):
    """Section of an output that a piece of text belongs to."""

    REASONING = "reasoning"
    ANSWER = "answer"


class ReasoningSplitter:
    """Feed text in any pieces, take ``(section, text)`` pieces out; nothing is lost and no tag leaks.

    The opening tag counts only before the answer has begun. White space next to a tag belongs to the tag. ``call`` is
    the text that a tool call begins with: models call without closing their reasoning, which ends where a line is one.
    """

    def __init__(self, tags: ReasoningForm, *, starts_inside: bool, call: str = "") -> None:
        self._tags = tags
        self._call = call
        self._begins_line = True
        """Whether the pending text begins a line of the reasoning."""
        self._pending = ""
        self._may_open = not starts_inside
        self._skips_space = starts_inside
        self.inside = starts_inside
        """Whether the text so far ends within reasoning."""

    def feed(self, text: str) -> list[tuple[Section, str]]:
        """Return what has become certain."""
        self._pending += text
        pieces: list[tuple[Section, str]] = []
        while self._advance(pieces):
            pass
        return pieces

    def close(self) -> list[tuple[Section, str]]:
        """Return what was held back: the output is over, so no tag can follow."""
        rest, self._pending = self._pending, ""
        if self.inside:
            rest = rest.rstrip()
        return [(Section.REASONING if self.inside else Section.ANSWER, rest)] if rest else []

    def _advance(self, pieces: list[tuple[Section, str]]) -> bool:
        """Move past one tag, or past what cannot be part of one; return whether there may be more."""
        if self._skips_space:
            self._pending = self._pending.lstrip()
            if not self._pending:
                return False
            self._skips_space = False
        if self.inside:
            found = self._pending.find(self._tags.end)
            call = self._find_call()
            if call >= 0 and (found < 0 or call < found):
                self._emit(pieces, Section.REASONING, self._pending[:call].rstrip())
                self._pending, self.inside = self._pending[call:], False
                return True
            if found >= 0:
                self._emit(pieces, Section.REASONING, self._pending[:found].rstrip())
                self._pending = self._pending[found + len(self._tags.end) :]
                self.inside = False
                self._skips_space = True
                return True
            keep = held_back(self._pending, [self._tags.end, *([self._call] if self._call else [])])
            # Space before a closing tag is the tag's: hold it back with what may be the tag.
            body = self._pending[: len(self._pending) - keep].rstrip()
            self._emit(pieces, Section.REASONING, body)
            self._pending, self._begins_line = self._pending[len(body) :], self._begins_line and not body
            return False
        if self._may_open:
            stripped = self._pending.lstrip()
            if not stripped or (len(stripped) < len(self._tags.start) and self._tags.start.startswith(stripped)):
                return False
            self._may_open = False
            if stripped.startswith(self._tags.start):
                self._pending = stripped[len(self._tags.start) :]
                self.inside = self._skips_space = True
                return True
        self._emit(pieces, Section.ANSWER, self._pending)
        self._pending = ""
        return False

    def _find_call(self) -> int:
        """Return where a line of the pending text begins with a call; -1: none does."""
        at = self._pending.find(self._call) if self._call else -1
        while at >= 0:
            line = self._pending[:at].rpartition("\n")
            if not line[2].strip() and (line[1] or self._begins_line):
                return at
            at = self._pending.find(self._call, at + 1)
        return -1

    @staticmethod
    def _emit(pieces: list[tuple[Section, str]], section: Section, text: str) -> None:
        if text:
            pieces.append((section, text))
