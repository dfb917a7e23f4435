"""One call in the form of Qwen3-Coder: ``<function=NAME><parameter=KEY>value</parameter>...</function>``, as JSON.

Values are written bare: what a parameter's schema calls a string is one, streamed as it comes; of any other type it is
JSON if it reads as that, once it is whole, and a string otherwise.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from neuron.text.call_pieces import CallArguments, CallBegins, CallEnds, Piece
from neuron.text.holdback import held_back

FUNCTION = "<function="
PARAMETER = "<parameter="
PARAMETER_END = "</parameter>"
FUNCTION_END = "</function>"

_NAME = re.compile(r"[^<>\n]{1,256}")


class XmlCall:
    """Feed what begins with ``<function=``. When it has ended, ``rest`` is what follows."""

    def __init__(self, schemas: Mapping[str, Mapping[str, Any]]) -> None:
        self._schemas = schemas
        self._properties: Mapping[str, Any] = {}
        self._pending = ""
        self._num_parameters = 0
        self._skips_newline = False
        self._state: Callable[[list[Piece]], bool] = self._function
        self.ended = False
        self.is_call = False
        """Whether it has turned out to be one."""
        self.rest = ""

    def feed(self, text: str) -> list[Piece]:
        """Return what has become certain."""
        self._pending += text
        told: list[Piece] = []
        while not self.ended and self._state(told):
            pass
        return told

    def close(self, *, cut: bool) -> list[Piece]:
        """Return what was held back. Of a call that was not cut, only the closing tags are missing."""
        told: list[Piece] = []
        if self.ended:
            pass
        elif not self.is_call:
            told.append(self._pending)
        elif self._state == self._string:
            if cut:
                told.append(CallArguments(_quoted(self._pending)))
            else:
                told += [CallArguments(_quoted(self._pending.removesuffix("\n")) + '"}'), CallEnds()]
        elif not cut:
            if self._state == self._value:
                told.append(CallArguments(_as_json(self._pending)))
            told += [CallArguments("}" if self._num_parameters else "{}"), CallEnds()]
        self.ended = True
        return told

    def _function(self, told: list[Piece]) -> bool:
        return self._named(FUNCTION, told, self._begin)

    def _begin(self, name: str, told: list[Piece]) -> None:
        properties = self._schemas.get(name, {}).get("properties")
        self._properties = properties if isinstance(properties, Mapping) else {}
        self.is_call = True
        told.append(CallBegins(name))
        self._state = self._between

    def _between(self, told: list[Piece]) -> bool:
        self._pending = self._pending.lstrip()
        if self._pending.startswith(FUNCTION_END):
            return self._end(told, self._pending[len(FUNCTION_END) :])
        if self._pending.startswith(PARAMETER):
            return self._named(PARAMETER, told, self._open_parameter)
        if any(tag.startswith(self._pending) for tag in (PARAMETER, FUNCTION_END)):
            return False
        return self._end(told, self._pending)  # something else: the call is over

    def _open_parameter(self, name: str, told: list[Piece]) -> None:
        start = ", " if self._num_parameters else "{"
        self._num_parameters += 1
        self._state = self._string if _is_string(self._properties.get(name)) else self._value
        told.append(CallArguments(f"{start}{_json(name)}: " + ('"' if self._state == self._string else "")))
        # The template writes each value on lines of its own.
        self._skips_newline = True

    def _string(self, told: list[Piece]) -> bool:
        if not self._value_begins():
            return False
        at = self._pending.find(PARAMETER_END)
        if at >= 0:
            told.append(CallArguments(_quoted(self._pending[:at].removesuffix("\n")) + '"'))
            return self._end_parameter(at)
        keep = held_back(self._pending, [PARAMETER_END, "\n" + PARAMETER_END])
        if ready := self._pending[: len(self._pending) - keep]:
            told.append(CallArguments(_quoted(ready)))
            self._pending = self._pending[len(ready) :]
        return False

    def _value(self, told: list[Piece]) -> bool:
        if not self._value_begins():
            return False
        at = self._pending.find(PARAMETER_END)
        if at < 0:
            return False
        told.append(CallArguments(_as_json(self._pending[:at].removesuffix("\n"))))
        return self._end_parameter(at)

    def _value_begins(self) -> bool:
        if self._skips_newline and self._pending:
            self._pending = self._pending.removeprefix("\n")
            self._skips_newline = False
        return not self._skips_newline

    def _end_parameter(self, at: int) -> bool:
        self._pending = self._pending[at + len(PARAMETER_END) :]
        self._state = self._between
        return True

    def _named(self, tag: str, told: list[Piece], then: Callable[[str, list[Piece]], None]) -> bool:
        """Read ``<tag=NAME>``, which the pending text begins with."""
        name, closed, rest = self._pending[len(tag) :].partition(">")
        if (name or closed) and not _NAME.fullmatch(name):
            if self.is_call:
                return self._end(told, self._pending)
            told.append(self._pending)
            self.ended = True
            return False
        if not closed:
            return False
        self._pending = rest
        then(name.strip(), told)
        return True

    def _end(self, told: list[Piece], rest: str) -> bool:
        told += [CallArguments("}" if self._num_parameters else "{}"), CallEnds()]
        self.ended, self.rest = True, rest
        return False


def _is_string(schema: object) -> bool:
    """Return whether a parameter is a string for certain; one that nothing is known of is taken for one."""
    if not isinstance(schema, Mapping):
        return True
    return schema.get("type", "string") == "string" and not {"anyOf", "oneOf", "allOf", "$ref", "enum"} & schema.keys()


def _as_json(text: str) -> str:
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _json(text)
    return text.strip()


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _quoted(text: str) -> str:
    return _json(text)[1:-1]
