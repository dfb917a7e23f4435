"""A call of tags with bare values, as JSON: ``<function=NAME><parameter=KEY>value</parameter>...</function>``.

The tags are those of a form. Values are written bare (:mod:`neuron.text.forms.bare_values`): one that can be a string
only is streamed as it comes, any other is sent once it is whole. A value may hold what looks like a tag, as code does
that reads this very form: a closing tag closes it only where another tag of the call follows. One that is missing is
read where the next parameter begins, or where the call is closed.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Final

from neuron.text.forms.bare_values import as_json, json_text, kinds_of, property_names, property_schema, quoted
from neuron.text.forms.form import CallArguments, CallBegins, CallEnds, CallReader, Piece, Schemas
from neuron.text.holdback import held_back

MAX_SPACE_CHARS: Final = 256
"""White space between a closing tag and what follows it; behind more of it the tag is part of a value."""
ANYTHING: Final[Mapping[str, Any]] = {"type": ["object", "array", "null", "boolean", "integer", "number", "string"]}
"""Schema of a value that nothing is known of, where a form has such values in JSON."""
NAME: Final = r"(?P<name>[^<>\n]{1,256})"


@dataclass(frozen=True, slots=True)
class Opening:
    """Opening tag that has a name in it."""

    prefix: str
    head: re.Pattern[str]
    """Text between the prefix and ``end``, with its ``name``, and whether the value ``is_text`` where the tag tells."""
    end: str = ">"
    partial: re.Pattern[str] = re.compile(r"[^<>\n]{0,300}")
    """Beginnings of such a text, while its end has not come."""

    def read(self, text: str) -> tuple[re.Match[str], str] | tuple[()] | None:
        """Return the head and what follows the tag; ``None`` while it may still come, nothing if ``text`` has none."""
        head, closed, rest = text.partition(self.end)
        if not closed:
            return None if self.partial.fullmatch(head) else ()
        found = self.head.fullmatch(head)
        return (found, rest) if found and found["name"].strip() else ()


@dataclass(frozen=True)
class Tags:
    """Tags of a form."""

    function: Opening
    function_end: str
    parameter: Opening
    parameter_end: str
    call: str
    call_end: str
    on_lines: bool = False
    """Whether values stand on lines of their own, so that a newline at each end is not theirs."""
    guesses: bool = False
    """Whether a value without a schema is JSON where it reads as such."""

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Tags that may end a value."""
        return re.compile(("\n?" if self.on_lines else "") + f"(?:{'|'.join(map(re.escape, self._ends))})")

    @cached_property
    def closing(self) -> tuple[str, ...]:
        """Texts of which a value's end may be a part."""
        return tuple(before + tag for tag in self._ends for before in (("", "\n") if self.on_lines else ("",)))

    @cached_property
    def follows(self) -> Mapping[str, tuple[str, ...]]:
        """Tags that may follow each closing tag."""
        again = tuple(tag for tag in (self.call, self.function.prefix) if tag)
        return {
            self.function_end: (self.call_end, *again),
            self.call_end: again,
            self.parameter_end: (self.parameter.prefix, self.function_end, self.call_end, *again),
        }

    @property
    def _ends(self) -> tuple[str, ...]:
        return self.parameter_end, self.parameter.prefix, self.function_end, self.call_end


class TaggedValuesReader(CallReader):
    """Reader of what follows the text before a function's name."""

    tags: ClassVar[Tags]

    def __init__(self, opened: str, schemas: Schemas) -> None:
        super().__init__(opened, schemas)
        self._schema: Mapping[str, Any] = {}
        self._names: frozenset[str] = frozenset()
        self._given: set[str] = set()
        self._of_value: Mapping[str, Any] | None = None
        self._is_string = True
        self._is_empty = True
        """Whether nothing of the value has come yet."""
        self._parts: list[str] = []
        self._skips_newline = False

    def open(self, name: str, pieces: list[Piece]) -> None:
        """Begin a call whose name was read elsewhere."""
        self._schema = self._schemas.get(name, {})
        self._names = property_names(self._schema)
        self.is_call = True
        pieces.append(CallBegins(name))
        self._state = self._between

    def close(self, *, cut: bool) -> list[Piece]:
        """See :class:`~neuron.text.forms.form.CallReader`; a call that was not cut lacks closing tags alone."""
        pieces: list[Piece] = []
        if not self.is_call:
            return [self._opened + self._pending]
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

    def _begin(self, pieces: list[Piece]) -> bool:
        return self._named(self.tags.function, pieces, lambda found: self.open(found["name"].strip(), pieces))

    def _between(self, pieces: list[Piece]) -> bool:
        self._pending = self._pending.lstrip()
        parameter, function_end = self.tags.parameter.prefix, self.tags.function_end
        if self._pending.startswith(function_end):
            return self._close_call(pieces, self._pending[len(function_end) :])
        if self._pending.startswith(parameter):
            self._pending = self._pending[len(parameter) :]
            if self._named(self.tags.parameter, pieces, lambda found: self._open_parameter(found, pieces)):
                return True
            self._pending = self._pending if self.ended else parameter + self._pending
            return False
        if any(tag.startswith(self._pending) for tag in (parameter, function_end)):
            return False
        return self._close_call(pieces, self._pending)  # something else: the call is over

    def _open_parameter(self, found: re.Match[str], pieces: list[Piece]) -> None:
        name, is_text = found["name"].strip(), found.groupdict().get("is_text")
        start = ", " if self._given else "{"
        self._given.add(name)
        self._of_value = property_schema(self._schema, name)
        if self._of_value is None and (self.tags.guesses or is_text == "false"):
            self._of_value = ANYTHING
        self._is_string = is_text == "true" or kinds_of(self._of_value, self._schema) == ("string",)
        self._state = self._value
        pieces.append(CallArguments(f"{start}{json_text(name)}: " + ('"' if self._is_string else "")))
        self._skips_newline, self._is_empty = self.tags.on_lines, True

    def _value(self, pieces: list[Piece], *, final: bool = False) -> bool:
        if self._skips_newline and self._pending:
            # The line end before a tag that closes an empty value at once is the one behind the opening tag.
            self._pending = self._pending.removeprefix("\n")
            self._skips_newline = False
        if self._skips_newline and not final:
            return False
        found = self._find_end(final)
        if found is None:
            keep = held_back(self._pending, self.tags.closing)
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
        for found in self.tags.pattern.finditer(self._pending):
            at, tag = found.start(), found[0].lstrip("\n")
            if tag == self.tags.parameter.prefix:
                opened = self.tags.parameter.read(self._pending[found.end() :])
                if opened is None and not final:
                    return at, None
                begins_line = found[0] != tag or (at == 0 and self._is_empty)
                if opened and self._expects(opened[0]["name"].strip(), begins_line):
                    return at, found.end() - len(tag)
                continue
            behind = self._pending[found.end() :]
            rest = behind.lstrip()
            may_follow = len(behind) - len(rest) <= MAX_SPACE_CHARS and any(
                follows.startswith(rest) for follows in self.tags.follows[tag]
            )
            if rest.startswith(self.tags.follows[tag]) or (final and may_follow):
                return at, found.end() if tag == self.tags.parameter_end else found.end() - len(tag)
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
            pieces.append(CallArguments(quoted(text)))
        else:
            self._parts.append(text)

    def _close_value(self, pieces: list[Piece]) -> None:
        if self._is_string:
            pieces.append(CallArguments('"'))
            return
        text = "".join(self._parts)
        self._parts.clear()
        pieces.append(CallArguments(as_json(text, self._of_value, self._schema)))

    def _named(self, opening: Opening, pieces: list[Piece], then: Callable[[re.Match[str]], None]) -> bool:
        """Read the rest of an opening tag."""
        opened = opening.read(self._pending)
        if opened is None:
            return False
        if not opened:
            return self._close_call(pieces, self._pending) if self.is_call else self._no_call(pieces)
        found, self._pending = opened
        then(found)
        return True

    def _close_call(self, pieces: list[Piece], rest: str) -> bool:
        pieces += [CallArguments("}" if self._given else "{}"), CallEnds()]
        return self._end(rest)
