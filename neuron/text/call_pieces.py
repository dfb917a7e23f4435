"""Pieces of an answer with tool calls, the same for every form in which models write calls."""

from dataclasses import dataclass


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
