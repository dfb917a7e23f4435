"""Values that a model writes bare, as JSON by the schema of what they are for.

A value is what its schema lets it be: text is text, a number a number; of several types the first that it reads as, and
lists and objects before text. Lists, objects and constants may be written as Python writes them. What fits none of
its types stays text: the client receives the model's output.
"""

import collections
import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from neuron.text.history import is_deeper
from neuron.text.schema_facts import value_at

MAX_PARTS: Final = 64
MAX_ALTERNATIVES: Final = 256
MAX_DEPTH: Final = 64


def json_text(value: object) -> str:
    """Return the JSON of a value, with letters of all scripts as they are."""
    return json.dumps(value, ensure_ascii=False)


def quoted(text: str) -> str:
    """Return a text as it stands within the quotation marks of JSON."""
    return json_text(text)[1:-1]


def property_schema(root: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """Return the schema of a property of ``root``; ``None`` where it has none, or an empty one."""
    for schema in _parts(root, root):
        properties = schema.get("properties")
        if isinstance(properties, Mapping) and name in properties:
            found = properties[name]
            return found if isinstance(found, Mapping) else None
    for schema in _parts(root, root):
        more = schema.get("additionalProperties")
        if isinstance(more, Mapping):
            return more
    return None


def property_names(root: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of the properties of ``root``."""
    return frozenset(
        name
        for schema in _parts(root, root)
        if isinstance(schema.get("properties"), Mapping)
        for name in schema["properties"]
    )


def kinds_of(schema: Mapping[str, Any] | None, root: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the types a value may have, in the order they are tried; one that nothing is known of is text."""
    if schema is None:
        return ("string",)
    found = [kind for part in _alternatives(schema, root) for kind in _own_kinds(part)]
    if any(part.get("nullable") is True for part in _parts(schema, root)):
        found.append("null")
    kinds = tuple(dict.fromkeys(found)) or ("string",)
    # A text that begins as a list is a list where both are allowed.
    return tuple(sorted(kinds, key=lambda kind: {"object": 0, "array": 0, "null": 0}.get(kind, 1)))


def as_json(text: str, schema: Mapping[str, Any] | None, root: Mapping[str, Any]) -> str:
    """Return the JSON of a value that is written as ``text``."""
    kinds = kinds_of(schema, root)
    listed = _listed(schema, root)
    if listed is not None:
        found = _one_of(text, listed)
        if found is not None:
            return found
    for kind in kinds:
        found = _READERS[kind](text.strip() if kind != "string" else text)
        if found is not None:
            return found
    return "null" if "null" in kinds and not text.strip() else json_text(text)


def literal_as_json(text: str) -> str:
    """Return the JSON of a literal, of JSON or of Python; of what is none, the text."""
    return _literal(text, object) or json_text(text)


def _parts(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a schema and all that hold together with it, each once: what it refers to, and what it is all of."""
    waiting: collections.deque[object] = collections.deque([schema])
    seen: set[int] = set()
    for _ in range(MAX_PARTS):
        if not waiting:
            return
        part = waiting.popleft()
        if isinstance(part, Mapping) and id(part) not in seen:
            seen.add(id(part))
            yield part
            if isinstance(part.get("$ref"), str):
                with contextlib.suppress(LookupError):
                    waiting.append(value_at(root, part["$ref"].removeprefix("#")))
            if isinstance(part.get("allOf"), list):
                waiting += part["allOf"][:MAX_PARTS]


def _alternatives(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the schemas of which a value fits one, each once."""
    waiting: collections.deque[object] = collections.deque([schema])
    seen: set[int] = set()
    for _ in range(MAX_ALTERNATIVES):
        if not waiting:
            return
        part = waiting.popleft()
        if not isinstance(part, Mapping) or id(part) in seen:
            continue
        for together in _parts(part, root):
            if id(together) in seen:
                continue
            seen.add(id(together))
            yield together
            for key in ("anyOf", "oneOf"):
                if isinstance(together.get(key), list):
                    waiting += together[key][:MAX_ALTERNATIVES]


def _own_kinds(schema: Mapping[str, Any]) -> list[str]:
    given = schema.get("type")
    if isinstance(given, str):
        return [given] if given in _READERS else ["string"]
    if isinstance(given, list):
        return [kind for kind in given if kind in _READERS]
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list):
        return [_kind_of(value) for value in values]
    if isinstance(schema.get("properties"), Mapping):
        return ["object"]
    return ["array"] if "items" in schema else []


def _kind_of(value: object) -> str:
    kinds = {str: "string", bool: "boolean", list: "array", dict: "object", type(None): "null"}
    return kinds.get(type(value), "number")


def _listed(schema: Mapping[str, Any] | None, root: Mapping[str, Any]) -> list[Any] | None:
    """Return the values that a schema lists, where it has no alternatives."""
    for part in _parts(schema or {}, root):
        if "const" in part:
            return [part["const"]]
        if isinstance(part.get("enum"), list):
            return list(part["enum"])
    return None


def _one_of(text: str, values: list[Any]) -> str | None:
    """Return the JSON of the listed value that ``text`` means: the text itself first, then what it reads as."""
    if text in [value for value in values if isinstance(value, str)]:
        return json_text(text)
    bare = text.strip()
    for kind in ("null", "boolean", "number", "array", "object"):
        found = _READERS[kind](bare)
        if found is not None:
            value = json.loads(found)
            for listed in values:
                if listed == value and isinstance(listed, bool) == isinstance(value, bool):
                    return json_text(listed)
    return json_text(bare) if bare in [value for value in values if isinstance(value, str)] else None


# ------------------------------------------------------------------ readers of one type


def _string(text: str) -> str | None:
    return json_text(text)


def _null(text: str) -> str | None:
    return "null" if text in {"null", "None", "NULL"} else None


def _boolean(text: str) -> str | None:
    lowered = text.lower()
    return lowered if lowered in {"true", "false"} else None


_INTEGER: Final = re.compile(r"[+-]?[0-9]{1,4000}")
_NUMBER: Final = re.compile(r"[+-]?(?:[0-9]{1,4000}\.?[0-9]{0,4000}|\.[0-9]{1,4000})(?:[eE][+-]?[0-9]{1,4})?")


def _integer(text: str) -> str | None:
    if _INTEGER.fullmatch(text):
        return str(int(text))
    if _NUMBER.fullmatch(text) and math.isfinite(value := float(text)) and value == int(value):
        return str(int(value))
    return None


def _number(text: str) -> str | None:
    if _INTEGER.fullmatch(text):
        return str(int(text))
    if not _NUMBER.fullmatch(text) or not math.isfinite(value := float(text)):
        return None
    try:
        json.loads(text)
    except ValueError:
        return repr(value)
    return text


def _object(text: str) -> str | None:
    return _literal(text, dict) if text[:1] == "{" else None


def _array(text: str) -> str | None:
    return _literal(text, list) if text[:1] in {"[", "("} else None


def _literal(text: str, kind: type) -> str | None:
    """Return the JSON of a literal of this type, of JSON or of Python; ``None`` if it is none."""
    for written in (text, _from_python(text)):
        if written is None:
            continue
        try:
            value = json.loads(written, parse_constant=_refuse)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, kind) and not is_deeper(value, MAX_DEPTH):
            return written
    return None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


_READERS: Final = {
    "string": _string,
    "null": _null,
    "boolean": _boolean,
    "integer": _integer,
    "number": _number,
    "object": _object,
    "array": _array,
}

_PYTHON: Final = re.compile(
    r"""\s*(?:(?P<mark>[\[\]{}(),:])|'(?P<single>(?:[^'\\]|\\.)*)'|"(?P<double>(?:[^"\\]|\\.)*)\""""
    r"""|(?P<word>[-+]?[0-9.][0-9a-zA-Z.+-]*|[A-Za-z]+))""",
    re.DOTALL,
)
_WORDS: Final = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_ESCAPE: Final = re.compile(
    r"\\(?:(?P<line>\n)|x(?P<x>[0-9a-fA-F]{2})|u(?P<u>[0-9a-fA-F]{4})|U(?P<U>00[0-9a-fA-F]{6})|(?P<one>.))", re.DOTALL
)
_ONE: Final = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "0": "\0"}


def _from_python(text: str) -> str | None:
    """Return a Python literal as JSON, ``None`` if it is none; one pass, and no recursion."""
    output: list[str] = []
    open_marks: list[str] = []
    at = 0
    while at < len(text):
        found = _PYTHON.match(text, at)
        if found is None:
            return "".join(output) if not text[at:].strip() else None
        at = found.end()
        if found["mark"]:
            mark = found["mark"]
            if mark in "[{(":
                open_marks.append(mark)
            elif mark in "]})":
                if not open_marks:
                    return None
                open_marks.pop()
                if output and output[-1] == ",":
                    output.pop()
            output.append({"(": "[", ")": "]"}.get(mark, mark))
            continue
        if found["word"] is not None:
            word = _WORDS.get(found["word"]) or _number(found["word"])
            if word is None:
                return None
        else:
            spelt = found["single"] if found["single"] is not None else found["double"]
            word = json_text(_ESCAPE.sub(_unescaped, spelt))
        is_key = bool(open_marks) and open_marks[-1] == "{" and output[-1] in {"{", ","}
        output.append(json_text(word) if is_key and word[0] != '"' else word)
    return "".join(output)


def _unescaped(found: re.Match[str]) -> str:
    if found["line"]:
        return ""
    if code := found["x"] or found["u"] or found["U"]:
        number = int(code, 16)
        return chr(number) if number < 0x110000 and not 0xD800 <= number < 0xE000 else "\ufffd"
    one = found["one"]
    return _ONE.get(one, one if one in "'\"\\" else "\\" + one)
