"""Split a model's output into reasoning and answer by its tags, wherever the tags are cut.

Knows the tags and nothing of tokens. A text that ends in mid-thought is reasoning throughout.
"""

from dataclasses import dataclass
from enum import Enum

from neuron.text.holdback import held_back


@dataclass(frozen=True, slots=True)
class ReasoningTags:
    """Tags that a model writes around its reasoning."""

    start: str = "<think>"
    end: str = "</think>"


class Section(Enum):
    """Section of an output that a piece of text belongs to."""

    REASONING = "reasoning"
    ANSWER = "answer"


class ReasoningSplitter:
    """Feed text in any pieces, take ``(section, text)`` pieces out; nothing is lost and no tag leaks.

    The opening tag counts only before the answer has begun. White space next to a tag belongs to the tag.
    """

    def __init__(self, tags: ReasoningTags, *, starts_inside: bool) -> None:
        self._tags = tags
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
            if found >= 0:
                self._emit(pieces, Section.REASONING, self._pending[:found].rstrip())
                self._pending = self._pending[found + len(self._tags.end) :]
                self.inside = False
                self._skips_space = True
                return True
            keep = held_back(self._pending, [self._tags.end])
            # Space before a closing tag is the tag's: hold it back with what may be the tag.
            body = self._pending[: len(self._pending) - keep].rstrip()
            self._emit(pieces, Section.REASONING, body)
            self._pending = self._pending[len(body) :]
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

    @staticmethod
    def _emit(pieces: list[tuple[Section, str]], section: Section, text: str) -> None:
        if text:
            pieces.append((section, text))
