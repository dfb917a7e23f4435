"""Grammars of calls of tags with bare values (:mod:`neuron.text.forms.tagged_values`)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from neuron.text.forms.bare_values import json_text, kinds_of, property_schema
from neuron.text.forms.form import ForcedTool
from neuron.text.forms.json_calls import object_rule
from neuron.text.schema import json_rule

NAME: Final = re.compile(r"[^<>\n]{1,256}")
EMPTY: Final = '""'
_OF_OBJECTS: Final = {"type", "properties", "required", "additionalProperties"}
_OF_TEXTS: Final = {"type", "enum", "const", "minLength", "maxLength", "pattern"}
_ANCHORS: Final = re.compile(r"(?<!\\)(?:\\\\)*[\^$]")


class _NotWritableError(Exception):
    """A schema asks for more than values that are written bare can be held to."""


@dataclass(frozen=True, slots=True)
class Writing:
    """Texts of a call as its model writes them; a name stands in for ``{}``."""

    function: str
    function_end: str
    parameter: str
    parameter_end: str


def bodies(tools: Sequence[ForcedTool], writing: Writing) -> list[str]:
    """Return the right sides of the rules ``call_0`` and on, and the rules they refer to.

    A call whose schema cannot be held to in bare values is JSON, which is read as well.
    """
    found = []
    for index, tool in enumerate(tools):
        try:
            found.append(_call_rules(f"call_{index}", tool, writing))
        except _NotWritableError:
            found.append(object_rule(tool))
    return found


def _call_rules(rule: str, tool: ForcedTool, writing: Writing) -> str:
    """Return the rules of a function: parameters in the order of the schema, without those that are left out."""
    schema, definitions = tool.prepared.schema, tool.prepared.definitions
    properties, required = (schema.get("properties") or {}, schema.get("required") or []) if schema else ({}, [])
    is_closed = properties or schema.get("additionalProperties") is False
    if schema.keys() - _OF_OBJECTS or not set(required) <= properties.keys() or not (is_closed or _takes_any(schema)):
        raise _NotWritableError
    if not all(NAME.fullmatch(name) and name == name.strip() for name in (tool.name, *properties)):
        raise _NotWritableError
    parts, rules = [], []
    for index, (name, prepared) in enumerate(properties.items()):
        own = f"{rule}_{index}"
        kinds = kinds_of(property_schema(tool.parameters, name), tool.parameters)
        rules += _value_rules(f"{own}_value", prepared, definitions, writing, is_text="string" in kinds)
        rules.append(f"{own}: {json_text(writing.parameter.format(name))} {own}_value")
        parts.append(own if name in required else f"({own})?")
    if not is_closed:
        before, after = map(json_text, writing.parameter.split("{}"))
        rules.append(f"{rule}_any: {before} /[^<>\\n]{{1,64}}/ {after} {rule}_value")
        rules += _value_rules(f"{rule}_value", {"type": "string"}, {}, writing, is_text=True)
        parts.append(f"({rule}_any)*")
    texts = [json_text(writing.function.format(tool.name)), *parts, json_text(writing.function_end)]
    return "\n".join([" ".join(text for text in texts if text != EMPTY), *rules, ""])


def _takes_any(schema: Mapping[str, Any]) -> bool:
    return schema.get("additionalProperties", True) in (True, {})


def _value_rules(
    rule: str, schema: Any, definitions: Mapping[str, Any], writing: Writing, *, is_text: bool
) -> list[str]:
    """Return the rules of a value and of the tag that closes it."""
    end = json_text(writing.parameter_end)
    if not isinstance(schema, Mapping):
        raise _NotWritableError
    listed = [schema["const"]] if "const" in schema else schema.get("enum")
    if listed is not None and schema.keys() <= _OF_TEXTS:
        texts = [value if isinstance(value, str) else json_text(value) for value in listed]
        if any("\n" in text or not text for text in texts):
            raise _NotWritableError
        return [f"{rule}: ({' | '.join(map(json_text, texts))}) {end}"]
    if not is_text:
        return [f"{rule}: {rule}_json {end}", f"{rule}_json: {json_rule(schema, definitions).strip()}"]
    if schema.keys() - _OF_TEXTS or ("pattern" in schema and schema.get("type") != "string"):
        raise _NotWritableError
    most = schema.get("maxLength", "")
    length = f"/(?s:.{{{schema.get('minLength', 0)},{most}}})/" if "minLength" in schema or most != "" else "/(?s:.*)/"
    terminal = f"{rule.upper()}: {length}{_pattern(schema['pattern']) if 'pattern' in schema else ''}"
    return [f"{rule}[suffix={end}]: {rule.upper()}", terminal]


def _pattern(pattern: str) -> str:
    """Return what holds a terminal to a pattern, which JSON schema looks for anywhere in a text."""
    starts, ends = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
    inner = pattern[int(starts) : len(pattern) - int(ends)]
    if _ANCHORS.search(inner) or "\n" in inner or ("|" in inner and (starts or ends)):
        raise _NotWritableError
    escaped = re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", inner)
    return f" & /{'' if starts else '(?s:.*)'}({escaped}){'' if ends else '(?s:.*)'}/"
