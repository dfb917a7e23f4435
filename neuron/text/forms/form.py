"""Forms in which models write: of tool calls, how a template shows it, how an answer is read, how a call is forced.

A call begins once its name is known and its arguments have begun; they go on as the model writes them, and a client
learns from the bytes themselves if they are not JSON in the end. What never becomes a call is text.
"""

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neuron.text.schema import PreparedSchema


@dataclass(frozen=True, slots=True)
class CallBegins:
    """A call of this name; its arguments follow."""

    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of the open call's arguments, as JSON text."""

    text: str


@dataclass(frozen=True, slots=True)
class CallEnds:
    """The open call is complete."""


Piece = str | CallBegins | CallArguments | CallEnds
"""Text is a ``str``."""
Schemas = Mapping[str, Mapping[str, Any]]
"""Schemas of the arguments of the tools on offer, by name."""


class CallReader(abc.ABC):
    """Reader of what follows a marker, in any pieces, until it has ``ended``; ``rest`` is then behind it.

    ``opened`` is the text that was taken with the marker: text again if no call begins.
    """

    def __init__(self, opened: str, schemas: Schemas) -> None:
        self._opened = opened
        self._schemas = schemas
        self._pending = ""
        self._state: Callable[[list[Piece]], bool] = self._begin
        self.is_call = False
        """Whether the text so far ends in a call, or in what closes it."""
        self.ended = False
        self.rest = ""

    def feed(self, text: str) -> list[Piece]:
        """Return what has become certain."""
        self._pending += text
        pieces: list[Piece] = []
        while not self.ended and self._state(pieces):
            pass
        return pieces

    @abc.abstractmethod
    def close(self, *, cut: bool) -> list[Piece]:
        """Return what was held back. With ``cut`` the model was stopped: its unfinished call stays unfinished."""

    # A state takes what it can from the pending text and returns whether there may be more to do.

    @abc.abstractmethod
    def _begin(self, pieces: list[Piece]) -> bool:
        """Be in the first state: is this a call?"""

    def _go(self, state: Callable[[list[Piece]], bool], pending: str) -> bool:
        self._state, self._pending = state, pending
        return True

    def _end(self, rest: str) -> bool:
        self.ended, self.rest, self._pending = True, rest, ""
        return False

    def _no_call(self, pieces: list[Piece]) -> bool:
        """Give back what was taken for a marker; what follows it may hold another one."""
        if self._opened:
            pieces.append(self._opened)
        self.is_call = False
        return self._end(self._pending)


@dataclass(frozen=True, slots=True)
class ForcedTool:
    """A tool of which a call is forced."""

    name: str
    parameters: Mapping[str, Any]
    """Schema of the arguments, as the client wrote it."""
    prepared: PreparedSchema
    """The same in the terms of the grammar's compiler."""


@dataclass(frozen=True, slots=True)
class CallForm:
    """Form of calls."""

    name: str
    is_shown: Callable[[str], bool]
    """Whether a chat template with a place for tools shows it."""
    reader: Callable[[str, Schemas], CallReader]
    """Reader of what follows a marker."""
    grammar: Callable[[Sequence[ForcedTool], bool], str]
    """Function of tools and of whether several may be called, which returns the Lark rules of ``calls``."""
    marker: str
    """Text that a call begins with."""
    tokens: tuple[str, ...] = ()
    """Further texts in a call that may be special tokens, which a tokenizer leaves out of its text."""
    bare: str = ""
    """Text that a call begins with where the answer does, and which is part of the call."""


@dataclass(frozen=True, slots=True)
class ReasoningForm:
    """Form of reasoning before an answer: text between two tags."""

    name: str
    is_shown: Callable[[str], bool]
    """Whether a chat template shows it."""
    start: str
    end: str
    early_end: str
    """Last words of reasoning whose budget is spent, before the closing tag."""
