"""A call in the form of Qwen3-Coder: ``<function=NAME><parameter=KEY>value</parameter>...</function>``, as JSON.

Values are written bare (:mod:`neuron.text.bare_values`): one that can be a string only is streamed as it comes, any
other is sent once it is whole. A value may hold what looks like a tag, as code does that reads this very form: a
closing tag closes it only where another tag of the call follows. One that is missing is read where the next parameter
begins, or where the call is closed.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from neuron.text.bare_values import as_json, kinds_of, property_names, property_schema
from neuron.text.call_pieces import CallArguments, CallBegins, CallEnds, Piece
from neuron.text.holdback import held_back

FUNCTION = "<function="
PARAMETER = "<parameter="
PARAMETER_END = "</parameter>"
FUNCTION_END = "</function>"
CALL = "<tool_call>"
CALL_END = "</tool_call>"

MAX_SPACE_CHARS: Final = 256
"""White space between a closing tag and what follows it; behind more of it the tag is part of a value."""

_NAME = re.compile(r"[^<>\n]{1,256}")
_TAG = re.compile(rf"\n?(?:{PARAMETER_END}|{PARAMETER}|{FUNCTION_END}|{CALL_END})")
_TAGS: Final = [f"{end}{tag}" for tag in (PARAMETER_END, PARAMETER, FUNCTION_END, CALL_END) for end in ("", "\n")]
_FOLLOWS: Final = {
    PARAMETER_END: (PARAMETER, FUNCTION_END, CALL_END, CALL, FUNCTION),
    FUNCTION_END: (CALL_END, CALL, FUNCTION),
    CALL_END: (CALL, FUNCTION),
}
"""Tags that may follow each closing tag."""


class XmlCall:
    """Feed what begins with ``<function=``. When it has ended, ``rest`` is what follows."""

    def __init__(self, schemas: Mapping[str, Mapping[str, Any]]) -> None:
        self._schemas = schemas
        self._schema: Mapping[str, Any] = {}
        self._names: frozenset[str] = frozenset()
        self._given: set[str] = set()
        self._name = ""
        self._is_string = True
        self._is_empty = True
        """Whether nothing of the value has come yet."""
        self._parts: list[str] = []
        self._pending = ""
        self._skips_newline = False
        self._state: Callable[[list[Piece]], bool] = self._function
        self.ended = False
        self.is_call = False
        """Whether it has turned out to be one."""
        self.rest = ""

    def feed(self, text: str) -> list[Piece]:
        """Return what has become certain."""
        self._pending += text
        pieces: list[Piece] = []
        while not self.ended and self._state(pieces):
            pass
        return pieces

    def close(self, *, cut: bool) -> list[Piece]:
        """Return what was held back. Of a call that was not cut, only the closing tags are missing."""
        pieces: list[Piece] = []
        if self.ended:
            pass
        elif not self.is_call:
            pieces.append(self._pending)
        else:
            while not self.ended and (
                self._value(pieces, final=True) if self._state == self._value else self._state(pieces)
            ):
                pass
            if not self.ended and self._state == self._value:
                self._put(self._pending, pieces)
                if not cut:
                    self._close_value(pieces)
            if not self.ended and not cut:
                pieces += [CallArguments("}" if self._given else "{}"), CallEnds()]
        self.ended = True
        return pieces

    def _function(self, pieces: list[Piece]) -> bool:
        return self._named(FUNCTION, pieces, self._begin)

    def _begin(self, name: str, pieces: list[Piece]) -> None:
        self._schema = self._schemas.get(name, {})
        self._names = property_names(self._schema)
        self.is_call = True
        pieces.append(CallBegins(name))
        self._state = self._between

    def _between(self, pieces: list[Piece]) -> bool:
        self._pending = self._pending.lstrip()
        if self._pending.startswith(FUNCTION_END):
            return self._end(pieces, self._pending[len(FUNCTION_END) :])
        if self._pending.startswith(PARAMETER):
            return self._named(PARAMETER, pieces, self._open_parameter)
        if any(tag.startswith(self._pending) for tag in (PARAMETER, FUNCTION_END)):
            return False
        return self._end(pieces, self._pending)  # something else: the call is over

    def _open_parameter(self, name: str, pieces: list[Piece]) -> None:
        start = ", " if self._given else "{"
        self._given.add(name)
        self._name = name
        self._is_string = kinds_of(property_schema(self._schema, name), self._schema) == ("string",)
        self._state = self._value
        pieces.append(CallArguments(f"{start}{_json(name)}: " + ('"' if self._is_string else "")))
        # The template writes each value on lines of its own.
        self._skips_newline = self._is_empty = True

    def _value(self, pieces: list[Piece], *, final: bool = False) -> bool:
        if self._skips_newline and self._pending:
            # The line end before a tag that closes an empty value at once is the one behind the opening tag.
            self._pending = self._pending.removeprefix("\n")
            self._skips_newline = False
        if self._skips_newline and not final:
            return False
        found = self._find_end(final)
        if found is None:
            keep = held_back(self._pending, _TAGS)
            self._take(len(self._pending) - keep, pieces)
            return False
        at, rest = found
        self._take(at, pieces)
        if rest is None:
            return False  # the text that follows decides
        self._pending = self._pending[rest - at :]
        self._close_value(pieces)
        self._state = self._between
        return True

    def _find_end(self, final: bool) -> tuple[int, int | None] | None:
        """Return where the value ends and where what is behind it begins, ``None`` for that if it is not yet certain.

        ``None`` where there is no tag.
        """
        for found in _TAG.finditer(self._pending):
            at, tag = found.start(), found[0].lstrip("\n")
            if tag == PARAMETER:
                name, closed, _ = self._pending[found.end() :].partition(">")
                if not closed and not final and (not name or _NAME.fullmatch(name)):
                    return at, None
                begins_line = found[0] != tag or (at == 0 and self._is_empty)
                if closed and _NAME.fullmatch(name) and self._expects(name.strip(), begins_line):
                    return at, found.end() - len(tag)
                continue
            behind = self._pending[found.end() :]
            rest = behind.lstrip()
            may_follow = len(behind) - len(rest) <= MAX_SPACE_CHARS and any(
                follows.startswith(rest) for follows in _FOLLOWS[tag]
            )
            if rest.startswith(_FOLLOWS[tag]) or (final and may_follow):
                return at, found.end() if tag == PARAMETER_END else found.end() - len(tag)
            if may_follow:
                return at, None
        return None

    def _expects(self, name: str, begins_line: bool) -> bool:
        """Return whether a parameter of that name may come: one that is known, or any where none is."""
        if self._names:
            return name in self._names and name not in self._given
        return begins_line and name not in self._given

    def _take(self, length: int, pieces: list[Piece]) -> None:
        self._put(self._pending[:length], pieces)
        self._pending = self._pending[length:]
        self._is_empty = self._is_empty and not length

    def _put(self, text: str, pieces: list[Piece]) -> None:
        if not text:
            return
        if self._is_string:
            pieces.append(CallArguments(_quoted(text)))
        else:
            self._parts.append(text)

    def _close_value(self, pieces: list[Piece]) -> None:
        if self._is_string:
            pieces.append(CallArguments('"'))
            return
        text = "".join(self._parts)
        self._parts.clear()
        pieces.append(CallArguments(as_json(text, property_schema(self._schema, self._name), self._schema)))

    def _named(self, tag: str, pieces: list[Piece], then: Callable[[str, list[Piece]], None]) -> bool:
        """Read ``<tag=NAME>``, which the pending text begins with."""
        name, closed, rest = self._pending[len(tag) :].partition(">")
        if (name or closed) and not _NAME.fullmatch(name):
            if self.is_call:
                return self._end(pieces, self._pending)
            pieces.append(self._pending)
            self.ended = True
            return False
        if not closed:
            return False
        self._pending = rest
        then(name.strip(), pieces)
        return True

    def _end(self, pieces: list[Piece], rest: str) -> bool:
        pieces += [CallArguments("}" if self._given else "{}"), CallEnds()]
        self.ended, self.rest = True, rest
        return False


def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _quoted(text: str) -> str:
    return _json(text)[1:-1]
