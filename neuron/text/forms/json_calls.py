"""Calls whose arguments are a JSON object: ``{"name": ..., "arguments": {...}}``, read as it is written."""

import json
import re
from collections.abc import Sequence
from enum import Enum
from typing import Any, Final

from neuron.text.forms.form import CallArguments, CallBegins, CallEnds, CallReader, ForcedTool, Piece
from neuron.text.schema import json_rule

START: Final = "<tool_call>"
CLOSING_TAG: Final = "</tool_call>"
"""Tag that closes a call, where its model may have left a bracket open."""
MAX_HEAD_CHARS: Final = 512


class JsonReader(CallReader):
    """Reader of calls in JSON, whose beginnings and ends are those of a form."""

    _object: "ObjectScanner"

    def close(self, *, cut: bool) -> list[Piece]:
        """See :class:`~neuron.text.forms.form.CallReader`."""
        if self._state == self._arguments:
            pieces: list[Piece] = [CallArguments(self._pending)] if self._pending else []
            return pieces if cut else [*pieces, CallEnds()]
        given = "" if self.is_call else self._opened + self._pending
        return [given] if given else []

    def _begin(self, pieces: list[Piece]) -> bool:
        """Read the head of a call."""
        body = self._pending.lstrip()
        try:
            head = read_head(body)
        except NotACallError:
            return self._other(pieces)
        if head is None:
            return False
        name, length = head
        return self._begin_arguments(name, body[length:], pieces)

    def _other(self, pieces: list[Piece]) -> bool:
        """Read what has no head of a call."""
        return self._no_call(pieces)

    def _begin_arguments(self, name: str, pending: str, pieces: list[Piece]) -> bool:
        pieces.append(CallBegins(name))
        self.is_call, self._object = True, ObjectScanner()
        return self._go(self._arguments, pending)

    def _arguments(self, pieces: list[Piece]) -> bool:
        used, progress = self._object.scan(self._pending)
        arguments, self._pending = self._pending[:used], self._pending[used:]
        if progress is Progress.GOES_ON:
            pieces += [CallArguments(arguments)] if arguments else []
            return False
        arguments = arguments.rstrip()
        pieces += [CallArguments(arguments), CallEnds()] if arguments else [CallEnds()]
        if progress is Progress.TAG:
            return self._end(self._pending[len(CLOSING_TAG) :])
        self._object = ObjectScanner(depth=1)
        return self._go(self._behind, self._pending)

    def _behind(self, pieces: list[Piece]) -> bool:
        """Skip to the end of the object that the arguments stand in; nothing in there is the client's."""
        used, progress = self._object.scan(self._pending)
        self._pending = self._pending[used:]
        if progress is Progress.TAG:
            return self._end(self._pending[len(CLOSING_TAG) :])
        return progress is Progress.ENDED and self._go(self._between, self._pending)

    def _between(self, pieces: list[Piece]) -> bool:
        """Read what follows a call: another one, or text."""
        return self._end(self._pending)


class NotACallError(Exception):
    """The text is not the beginning of a call after all."""


def read_head(text: str) -> tuple[str, int] | None:
    """Return the name of the call whose arguments begin in ``text``, and where; ``None`` while that may still come.

    Raises :class:`NotACallError` if it cannot come any more.
    """
    name, at, step, steps = "", 0, 0, _HEAD
    while step < len(steps):
        found = _TOKEN.match(text, at)
        if found is None:
            rest = text[at:].lstrip()
            if len(text) <= MAX_HEAD_CHARS and any(word.startswith(rest) for word in steps[step] or (rest,)):
                return None
            raise NotACallError
        token, at = found[1], found.end()
        if step == 1 and token == '"type"':
            steps = _TYPED_HEAD
        if token not in (steps[step] or (token,)):
            raise NotACallError
        if steps[step] is None:
            try:
                name = str(json.loads(token))
            except ValueError:
                raise NotACallError from None
        step += 1
    if not (rest := text[at:].lstrip()):
        return None
    if rest[0] != "{" or not name:
        raise NotACallError
    return name, len(text) - len(rest)


_TOKEN: Final = re.compile(r'\s*([{:,]|"(?:[^"\\]|\\.)*")', re.DOTALL)
_NAMED: Final[tuple[tuple[str, ...] | None, ...]] = (
    ('"name"',), (":",), None, (",",), ('"arguments"', '"parameters"'), (":",),
)  # fmt: skip
_HEAD: Final = (("{",), ('"name"', '"type"'), *_NAMED[1:])
_TYPED_HEAD: Final = (("{",), ('"type"',), (":",), ('"function"',), (",",), *_NAMED)


class Progress(Enum):
    """Progress of a scan."""

    GOES_ON = "goes on"
    ENDED = "ended"
    TAG = "tag"
    """The tag that closes a call, where none can stand: its model left something open."""


class ObjectScanner:
    """Finds the end of JSON that comes in pieces, by its brackets alone; ``depth`` of them are open before it."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = False

    def scan(self, text: str) -> tuple[int, Progress]:
        """Return how much of ``text`` is certain, and what follows; what is not is to be given again."""
        at = 0
        while True:
            if self._in_string:
                inner = _STRING_REST.match(text, at)
                assert inner is not None  # it matches nothing too
                at = inner.end()
                if at == len(text) or text[at] == "\\":
                    return at, Progress.GOES_ON  # half an escape, at most
                self._in_string, at = False, at + 1
                continue
            found = _OBJECT_MARK.search(text, at)
            if found is None:
                return len(text.rstrip()), Progress.GOES_ON
            mark, before, at = found[0], found.start(), found.end()
            if mark == '"':
                self._in_string = True
            elif mark == "<":
                if text.startswith(CLOSING_TAG, before):
                    return before, Progress.TAG
                if CLOSING_TAG.startswith(text[before:]):
                    return len(text[:before].rstrip()), Progress.GOES_ON
            elif mark in "{[":
                self._depth += 1
            else:
                self._depth -= 1
                if self._depth <= 0:
                    return at, Progress.ENDED


_STRING_REST: Final = re.compile(r'(?:[^"\\]|\\.)*', re.DOTALL)
_OBJECT_MARK: Final = re.compile(r'["{}\[\]<]')


# ------------------------------------------------------------------ grammars


def object_rule(tool: ForcedTool, key: str = "arguments") -> str:
    """Return the right side of a rule of the object of a call."""
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"name": {"const": tool.name}, key: tool.prepared.schema},
        "required": ["name", key],
        "additionalProperties": False,
    }
    return json_rule(schema, tool.prepared.definitions)


def tagged_rules(bodies: Sequence[str], parallel: bool, newline: str = "\\n") -> str:
    """Return the rules of calls within tags, of which each has one of ``bodies``, right sides of rules.

    ``newline`` stands within the tags.
    """
    names, more = " | ".join(f"call_{index}" for index in range(len(bodies))), ' ("\\n" call)*' if parallel else ""
    rules = "".join(f"call_{index}: {body}" for index, body in enumerate(bodies))
    return f'calls: call{more}\ncall: "{START}{newline}" ({names}) "{newline}{CLOSING_TAG}"\n' + rules
