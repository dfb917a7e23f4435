"""A call in the form of Qwen3-Coder: ``<function=NAME><parameter=KEY>value</parameter>...</function>``, as JSON.

Values are written bare (:mod:`neuron.text.forms.bare_values`): one that can be a string only is streamed as it comes,
any other is sent once it is whole. A value may hold what looks like a tag, as code does that reads this very form: a
closing tag closes it only where another tag of the call follows. One that is missing is read where the next parameter
begins, or where the call is closed.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from neuron.text.forms.bare_values import as_json, kinds_of, property_names, property_schema
from neuron.text.forms.form import CallArguments, CallBegins, CallEnds, CallForm, CallReader, ForcedTool, Piece, Schemas
from neuron.text.forms.json_calls import object_rule
from neuron.text.holdback import held_back
from neuron.text.schema import json_rule

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


class XmlReader(CallReader):
    """Reader of what follows ``<function=``."""

    def __init__(self, opened: str, schemas: Schemas) -> None:
        super().__init__(opened, schemas)
        self._schema: Mapping[str, Any] = {}
        self._names: frozenset[str] = frozenset()
        self._given: set[str] = set()
        self._name = ""
        self._is_string = True
        self._is_empty = True
        """Whether nothing of the value has come yet."""
        self._parts: list[str] = []
        self._skips_newline = False

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
        return self._named("", pieces, self._open_function)

    def _open_function(self, name: str, pieces: list[Piece]) -> None:
        self._schema = self._schemas.get(name, {})
        self._names = property_names(self._schema)
        self.is_call = True
        pieces.append(CallBegins(name))
        self._state = self._between

    def _between(self, pieces: list[Piece]) -> bool:
        self._pending = self._pending.lstrip()
        if self._pending.startswith(FUNCTION_END):
            return self._close_call(pieces, self._pending[len(FUNCTION_END) :])
        if self._pending.startswith(PARAMETER):
            return self._named(PARAMETER, pieces, self._open_parameter)
        if any(tag.startswith(self._pending) for tag in (PARAMETER, FUNCTION_END)):
            return False
        return self._close_call(pieces, self._pending)  # something else: the call is over

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
        """Read ``NAME>`` behind ``tag``, which the pending text begins with."""
        name, closed, rest = self._pending[len(tag) :].partition(">")
        if (name or closed) and not _NAME.fullmatch(name):
            return self._close_call(pieces, self._pending) if self.is_call else self._no_call(pieces)
        if not closed:
            return False
        self._pending = rest
        then(name.strip(), pieces)
        return True

    def _close_call(self, pieces: list[Piece], rest: str) -> bool:
        pieces += [CallArguments("}" if self._given else "{}"), CallEnds()]
        return self._end(rest)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _quoted(text: str) -> str:
    return _json(text)[1:-1]


# ------------------------------------------------------------------ grammar

_OF_OBJECTS: Final = {"type", "properties", "required", "additionalProperties"}
_OF_TEXTS: Final = {"type", "enum", "const", "minLength", "maxLength", "pattern"}
_ANCHORS: Final = re.compile(r"(?<!\\)(?:\\\\)*[\^$]")
_VALUE_END: Final = f"\\n{PARAMETER_END}\\n"


class _NotWritableError(Exception):
    """A schema asks for more than values that are written bare can be held to."""


def grammar(tools: Sequence[ForcedTool], parallel: bool) -> str:
    """See :class:`~neuron.text.forms.form.CallForm`.

    A call whose schema cannot be held to in bare values is forced as JSON within the tags, which is read as well.
    """
    names, more = " | ".join(f"call_{index}" for index in range(len(tools))), ' ("\\n" call)*' if parallel else ""
    rules = [f"calls: call{more}", f'call: "{CALL}\\n" ({names}) "\\n{CALL_END}"']
    for index, tool in enumerate(tools):
        try:
            rules += _call_rules(f"call_{index}", tool)
        except _NotWritableError:
            rules.append(f"call_{index}: {object_rule(tool)}")
    return "\n".join(rules) + "\n"


def _call_rules(rule: str, tool: ForcedTool) -> list[str]:
    """Return the rules of a call: parameters in the order of the schema, without those that are left out."""
    schema, definitions = tool.prepared.schema, tool.prepared.definitions
    properties, required = (schema.get("properties") or {}, schema.get("required") or []) if schema else ({}, [])
    is_closed = properties or schema.get("additionalProperties") is False
    if schema.keys() - _OF_OBJECTS or not set(required) <= properties.keys() or not (is_closed or _takes_any(schema)):
        raise _NotWritableError
    if not all(_NAME.fullmatch(name) and name == name.strip() for name in (tool.name, *properties)):
        raise _NotWritableError
    parts, rules = [], []
    for index, (name, prepared) in enumerate(properties.items()):
        own = f"{rule}_{index}"
        kinds = kinds_of(property_schema(tool.parameters, name), tool.parameters)
        rules += _value_rules(f"{own}_value", prepared, definitions, is_text="string" in kinds)
        rules.append(f"{own}: {_json(PARAMETER + name + '>' + chr(10))} {own}_value")
        parts.append(own if name in required else f"({own})?")
    if not is_closed:
        rules.append(f'{rule}_any: "{PARAMETER}" /[^<>\\n]{{1,64}}/ ">\\n" {rule}_value')
        rules += _value_rules(f"{rule}_value", {"type": "string"}, {}, is_text=True)
        parts.append(f"({rule}_any)*")
    head = _json(f"{FUNCTION}{tool.name}>\n")
    return [f'{rule}: {" ".join([head, *parts])} "{FUNCTION_END}"', *rules]


def _takes_any(schema: Mapping[str, Any]) -> bool:
    return schema.get("additionalProperties", True) in (True, {})


def _value_rules(rule: str, schema: Any, definitions: Mapping[str, Any], *, is_text: bool) -> list[str]:
    """Return the rules of a value and of the tag that closes it."""
    if not isinstance(schema, Mapping):
        raise _NotWritableError
    listed = [schema["const"]] if "const" in schema else schema.get("enum")
    if listed is not None and schema.keys() <= _OF_TEXTS:
        texts = [value if isinstance(value, str) else _json(value) for value in listed]
        if any("\n" in text or not text for text in texts):
            raise _NotWritableError
        return [f'{rule}: ({" | ".join(map(_json, texts))}) "{_VALUE_END}"']
    if not is_text:
        return [f'{rule}: {rule}_json "{_VALUE_END}"', f"{rule}_json: {json_rule(schema, definitions).strip()}"]
    if schema.keys() - _OF_TEXTS or ("pattern" in schema and schema.get("type") != "string"):
        raise _NotWritableError
    most = schema.get("maxLength", "")
    length = f"/(?s:.{{{schema.get('minLength', 0)},{most}}})/" if "minLength" in schema or most != "" else "/(?s:.*)/"
    terminal = f"{rule.upper()}: {length}{_pattern(schema['pattern']) if 'pattern' in schema else ''}"
    return [f'{rule}[suffix="{_VALUE_END}"]: {rule.upper()}', terminal]


def _pattern(pattern: str) -> str:
    """Return what holds a terminal to a pattern, which JSON schema looks for anywhere in a text."""
    starts, ends = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
    inner = pattern[int(starts) : len(pattern) - int(ends)]
    if _ANCHORS.search(inner) or "\n" in inner or ("|" in inner and (starts or ends)):
        raise _NotWritableError
    escaped = re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", inner)
    return f" & /{'' if starts else '(?s:.*)'}({escaped}){'' if ends else '(?s:.*)'}/"


def is_shown(template: str) -> bool:
    """See :class:`~neuron.text.forms.form.CallForm`."""
    return FUNCTION in template


FORM: Final = CallForm("xml", is_shown, XmlReader, grammar, FUNCTION)
