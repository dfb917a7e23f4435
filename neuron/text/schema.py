"""A client's JSON schema as the compiler of grammars takes it, and what of it cannot be enforced.

Schemas (of zod, pydantic, OpenAPI) use more keywords than a grammar can enforce. Each keyword is enforced, perhaps in
other words; or left out, since it does not constrain an answer; or, where no grammar can enforce it, left out and
reported, or refused where the schema is ``strict``. References are resolved within the client's own document, wherever
the result is put. The table is in docs/structured_outputs.md.
"""

import contextlib
import itertools
import json
import math
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, Final

from cortex.wire.errors import InvalidSchemaError
from cortex.wire.request import FormatKind, InferenceRequest, ToolMode
from neuron.text.history import is_deeper
from neuron.text.schema_facts import MAX_BOUND, Alternative, are_disjoint, may_be, named_places, pointer, value_at

MAX_SOURCE_BYTES: Final = 256 << 10
MAX_SCHEMA_DEPTH: Final = 64
FORMATS: Final = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"}
)
"""Formats of strings that the compiler supports."""
MAX_STEP: Final = 2**31
"""The same of the digits of ``multipleOf``."""
MAX_LENGTH: Final = 2**24
"""Characters or items that no answer has: a greater maximum is no constraint."""
LEAST_INTEGER: Final = -9 * 10**18
"""Below it, down to the least of 64 bits, the compiler counts without end."""

JSON_OPTIONS: Final = {"whitespace_flexible": True, "whitespace_pattern": r"[ \n]{0,16}"}
"""White space is free but bounded: a model that is unsure likes to write it for ever."""

_AS_IT_IS: Final = ("type", "required", "minLength", "minItems", "minProperties", "maxProperties")
_BOUNDS: Final = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_REFERENCES: Final = ("$ref", "$dynamicRef", "$recursiveRef")
_APPLICATORS: Final = frozenset({"allOf", "anyOf", "oneOf", "if", "dependentSchemas", *_REFERENCES})
_DEPENDENCIES: Final = ("dependentRequired", "dependentSchemas", "dependencies")
_BEYOND_PATTERNS: Final = re.compile(r"\(\?<?[=!]|\(\?>|\\[bB1-9]|\\k<")
"""Constructs that no automaton recognises: look-around, word boundary, back-reference."""
_ESCAPES_AND_CLASSES: Final = re.compile(r"\\\\|\\\[|\[(?:\\.|[^\]\\])*\]", re.DOTALL)


class PreparedSchema:
    """A schema in the compiler's terms.

    ``schema`` refers to ``definitions``, which are to stand under ``$defs`` at the root of whatever it is put into.
    ``left_out`` names the keywords that no grammar can hold an answer to.
    """

    def __init__(self, document: object, *, strict: bool = False, param: str = "response_format") -> None:
        """Prepare ``document``, nested no deeper than a recursion may go. Raises :class:`InvalidSchemaError`."""
        self._document = document
        self._strict = strict
        self._param = param
        self._places = named_places(document)
        self._ends: dict[str, tuple[str, object]] = {}
        self._names: dict[str, str] = {}
        self._waiting: list[tuple[str, object]] = []
        self.left_out: list[str] = []
        self.definitions: dict[str, Any] = {}
        self.schema = self._prepared(document)
        while self._waiting:
            name, found = self._waiting.pop()
            self.definitions[name] = self._prepared(found)

    def _refuse(self, problem: str) -> InvalidSchemaError:
        return InvalidSchemaError(problem, param=self._param)

    def _leave_out(self, keyword: str, why: str) -> None:
        if self._strict:
            raise self._refuse(f"'{keyword}' cannot be enforced: {why}. Leave it out, or do not ask for 'strict'")
        if keyword not in self.left_out:
            self.left_out.append(keyword)

    def _prepared(self, schema: object) -> Any:
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, Mapping):
            raise self._refuse(f"a schema is an object, not {str(schema)[:50]!r}")
        if _is_never(schema):
            return False
        prepared: dict[str, Any] = {key: schema[key] for key in _AS_IT_IS if key in schema}
        if not isinstance(prepared.get("required", []), list):
            del prepared["required"]  # as drafts before 4 have it, of a property
        self._reference(schema, prepared)
        self._numbers(schema, prepared)
        self._strings(schema, prepared)
        self._values(schema, prepared)
        self._items(schema, prepared)
        self._properties(schema, prepared)
        self._alternatives(schema, prepared)
        self._conditions(schema)
        if schema.get("nullable") is True:
            _take_null(prepared)
        return prepared

    # ------------------------------------------------------------------ references

    def _reference(self, schema: Mapping[str, Any], prepared: dict[str, Any]) -> None:
        given = [schema[key] for key in _REFERENCES if key in schema]
        if not given:
            return
        if len(given) > 1 or not isinstance(given[0], str):
            raise self._refuse("a reference is one text")
        place, target = self._followed(given[0])
        if place not in self._names:
            self._names[place] = f"r{len(self._names)}"
            self._waiting.append((self._names[place], target))
        prepared["$ref"] = f"#/$defs/{self._names[place]}"

    def _followed(self, reference: str) -> tuple[str, object]:
        """Return where a reference leads in the end, and what is there; one to a mere reference goes on from there."""
        seen: set[str] = set()
        while True:
            place = self._place(reference)
            if place in seen:
                raise self._refuse(f"the reference {reference[:100]!r} refers to itself")
            seen.add(place)
            if (end := self._ends.get(place)) is None:
                try:
                    target = value_at(self._document, place)
                except LookupError:
                    raise self._refuse(f"there is nothing at the reference {reference[:100]!r}") from None
                if isinstance(target, Mapping) and isinstance(target.get("$ref"), str) and len(target) == 1:
                    reference = target["$ref"]
                    continue
                end = place, target
            self._ends |= dict.fromkeys(seen, end)
            return end

    def _place(self, reference: str) -> str:
        """Return the pointer that a reference means, empty for the root."""
        base, _, fragment = reference.partition("#")
        if base and base not in self._places:
            raise self._refuse(f"the reference {reference[:100]!r} leads out of the schema")
        start = pointer(self._places.get(base))
        fragment = urllib.parse.unquote(fragment)
        if not fragment:
            return start
        if fragment.startswith("/"):
            return start + fragment
        if f"#{fragment}" not in self._places:
            raise self._refuse(f"there is nothing at the reference {reference[:100]!r}")
        return pointer(self._places[f"#{fragment}"])

    # ------------------------------------------------------------------ values

    def _numbers(self, schema: Mapping[str, Any], prepared: dict[str, Any]) -> None:
        for key in _BOUNDS:
            value = schema.get(key)
            if value is None:
                continue
            if isinstance(value, bool):
                prepared[key] = value
            elif not isinstance(value, int | float) or value != value:
                raise self._refuse(f"'{key}' is not a number")
            elif math.inf == (value if "aximum" in key else -value):
                pass  # no constraint
            elif abs(value) >= MAX_BOUND:
                self._leave_out(key, f"{value} has too many digits for a grammar")
            else:
                prepared[key] = value
        step = schema.get("multipleOf")
        if step is not None:
            if isinstance(step, bool) or not isinstance(step, int | float) or not 0 < step < math.inf:
                raise self._refuse("'multipleOf' is not a positive number")
            if _digits(step) >= MAX_STEP:
                self._leave_out("multipleOf", f"{step} has too many digits for a grammar")
            else:
                prepared["multipleOf"] = step

    def _strings(self, schema: Mapping[str, Any], prepared: dict[str, Any]) -> None:
        _keep_maximum("maxLength", schema, prepared)
        pattern = schema.get("pattern")
        if isinstance(pattern, str) and _is_beyond_patterns(pattern):
            self._leave_out("pattern", f"{pattern[:60]!r} looks around, at the edges of words or back")
        elif pattern is not None:
            prepared["pattern"] = pattern
        form = schema.get("format")
        if form is None:
            return
        if not isinstance(form, str):
            raise self._refuse("'format' is not a text")
        if not may_be("string", schema):
            return
        if form in FORMATS:
            prepared["format"] = form
        elif "pattern" not in prepared:  # which defines the format
            self._leave_out("format", f"{form[:40]!r} is not known here")

    def _values(self, schema: Mapping[str, Any], prepared: dict[str, Any]) -> None:
        for key in ("enum", "const"):
            if key in schema:
                self._check_value(schema[key], key)
                prepared[key] = schema[key]

    def _check_value(self, value: object, key: str) -> None:
        match value:
            case float() if not math.isfinite(value):
                raise self._refuse(f"'{key}' holds a number that JSON has no word for")
            case int() if -(2**63) <= value < LEAST_INTEGER:
                raise self._refuse(f"'{key}' holds {value}; integers there are at least {LEAST_INTEGER}")
            case list():
                for inner in value:
                    self._check_value(inner, key)
            case dict():
                for inner in value.values():
                    self._check_value(inner, key)

    # ------------------------------------------------------------------ lists and objects

    def _items(self, schema: Mapping[str, Any], prepared: dict[str, Any]) -> None:
        _keep_maximum("maxItems", schema, prepared)
        items, first, rest = schema.get("items"), schema.get("prefixItems"), schema.get("items")
        if isinstance(items, list):  # drafts before 2020 have it so
            first, rest = items, schema.get("additionalItems")
        if rest is None and "unevaluatedItems" in schema:
            if _APPLICATORS & schema.keys() or "contains" in schema:
                self._leave_out("unevaluatedItems", "it hangs on what other keywords have looked at")
            else:
                rest = schema["unevaluatedItems"]
        if isinstance(first, list):
            prepared["prefixItems"] = [self._prepared(item) for item in first]
        if rest is not None:
            prepared["items"] = self._prepared(rest)
        if schema.get("uniqueItems") is True and schema.get("maxItems") not in (0, 1):
            self._leave_out("uniqueItems", "a grammar does not remember what it has seen")
        if "contains" in schema and schema.get("minContains") != 0:
            self._leave_out("contains", "a grammar does not count what fits")
        elif "contains" in schema and "maxContains" in schema:
            self._leave_out("maxContains", "a grammar does not count what fits")

    def _properties(self, schema: Mapping[str, Any], prepared: dict[str, Any]) -> None:
        for key in ("properties", "patternProperties"):
            if key in schema:
                if not isinstance(schema[key], Mapping):
                    raise self._refuse(f"'{key}' is not an object")
                prepared[key] = {name: self._prepared(value) for name, value in schema[key].items()}
        if schema.get("additionalProperties") is not None:
            prepared["additionalProperties"] = self._prepared(schema["additionalProperties"])
        if any(_is_beyond_patterns(pattern) for pattern in prepared.get("patternProperties", ())):
            del prepared["patternProperties"]
            prepared.pop("additionalProperties", None)  # it would forbid what the patterns allow
            self._leave_out("patternProperties", "a pattern looks around, at the edges of words or back")
        if "unevaluatedProperties" in schema and "additionalProperties" not in prepared:
            if _APPLICATORS & schema.keys():
                if schema["unevaluatedProperties"] not in (True, {}):
                    self._leave_out("unevaluatedProperties", "it hangs on what other keywords have looked at")
            else:
                prepared["additionalProperties"] = self._prepared(schema["unevaluatedProperties"])
        if "propertyNames" in schema:
            self._property_names(schema["propertyNames"], prepared)

    def _property_names(self, names: object, prepared: dict[str, Any]) -> None:
        """Express ``propertyNames`` by other keywords: a list of names, or their pattern."""
        if names is True or (isinstance(names, Mapping) and not _says(names) - {"type"}):
            return  # all names are strings
        known = {"properties", "patternProperties"} & prepared.keys()
        if isinstance(names, Mapping) and not known and prepared.get("additionalProperties") is not False:
            rest = prepared.get("additionalProperties", True)
            says = _says(names) - {"type"}
            if says == {"enum"} or says == {"const"}:
                listed = names["enum"] if "enum" in names else [names["const"]]
                if isinstance(listed, list) and all(isinstance(name, str) for name in listed):
                    prepared["properties"] = dict.fromkeys(listed, rest)
                    prepared["additionalProperties"] = False
                    return
            pattern = names.get("pattern")
            if says == {"pattern"} and isinstance(pattern, str) and not _is_beyond_patterns(pattern):
                prepared["patternProperties"] = {pattern: rest}
                prepared["additionalProperties"] = False
                return
        self._leave_out("propertyNames", "a grammar knows names by a list or a pattern only")

    # ------------------------------------------------------------------ alternatives and conditions

    def _alternatives(self, schema: Mapping[str, Any], prepared: dict[str, Any]) -> None:
        together = []
        for key in ("allOf", "anyOf", "oneOf"):
            if key not in schema:
                continue
            ways = schema[key]
            if not isinstance(ways, list) or not ways:
                raise self._refuse(f"'{key}' is not a list of schemas")
            alternatives = [self._prepared(way) for way in ways]
            if key == "allOf":
                together += alternatives
                continue
            if key == "oneOf" and not self._are_apart(ways):
                self._leave_out("oneOf", "an answer may fit several of its alternatives")
            if "anyOf" in prepared:
                together.append({"anyOf": alternatives})
            else:
                prepared["anyOf"] = alternatives
        if together:
            prepared["allOf"] = together

    def _are_apart(self, ways: Sequence[object]) -> bool:
        """Return whether it is plain that no value fits two of ``ways``: by types, or by a property's constant."""
        if len(ways) > 32:
            return False
        whole = [Alternative(self._plain(way)) for way in ways]
        return all(are_disjoint(one, other) for one, other in itertools.combinations(whole, 2))

    def _plain(self, way: object) -> Mapping[str, Any]:
        if isinstance(way, Mapping) and isinstance(way.get("$ref"), str):
            way = self._followed(way["$ref"])[1]
        return way if isinstance(way, Mapping) else {}

    def _conditions(self, schema: Mapping[str, Any]) -> None:
        if "not" in schema and schema["not"] is not False:
            self._leave_out("not", "a grammar says what an answer is, not what it is not")
        if "if" in schema and {"then", "else"} & schema.keys():
            self._leave_out("if", "a grammar has no conditions")
        for key in _DEPENDENCIES:
            if schema.get(key):
                self._leave_out(key, "a grammar has no conditions")


def json_rule(schema: Any, definitions: Mapping[str, Any]) -> str:
    """Return the right side of a Lark rule of JSON that follows a prepared schema."""
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    return "%json " + json.dumps({**schema, "$defs": definitions, "x-guidance": JSON_OPTIONS}) + "\n"


def holds_schemas(request: InferenceRequest) -> bool:
    """Return whether the answer to ``request`` is to be held to a schema."""
    mode = request.tool_choice.mode
    kind = request.output_format.kind
    forced = mode in {ToolMode.REQUIRED, ToolMode.NAMED}
    offered = kind is not FormatKind.TEXT and mode is not ToolMode.NONE
    return kind is FormatKind.JSON_SCHEMA or (bool(request.tools) and (forced or offered))


def left_out(request: InferenceRequest) -> list[str]:
    """Return the keywords in the schemas of ``request`` that will not be enforced, each with its place.

    The cost depends on the client's schema: run it in a text process, within its limits.
    """
    paths = []
    asked = request.output_format
    mode = request.tool_choice.mode
    with contextlib.suppress(InvalidSchemaError, ValueError, RecursionError):
        if asked.kind is FormatKind.JSON_SCHEMA and len(asked.source) <= MAX_SOURCE_BYTES:
            schema = json.loads(asked.source)
            if not is_deeper(schema, MAX_SCHEMA_DEPTH):
                paths += [f"response_format.{keyword}" for keyword in PreparedSchema(schema).left_out]
        if mode in {ToolMode.REQUIRED, ToolMode.NAMED} or (
            asked.kind is not FormatKind.TEXT and mode is not ToolMode.NONE
        ):
            for index, tool in enumerate(request.tools):
                if not is_deeper(tool.parameters, MAX_SCHEMA_DEPTH):
                    keywords = PreparedSchema({"type": "object", **tool.parameters}).left_out
                    paths += [f"tools[{index}].parameters.{keyword}" for keyword in keywords]
    return paths


def _is_never(schema: Mapping[str, Any]) -> bool:
    """Return whether a schema is how ``false`` was written before there was one."""
    return schema.get("not") in (True, {}) and isinstance(schema["not"], bool | Mapping)


def _digits(step: int | float) -> int:
    """Return a number's digits without its point and the zeros around them."""
    number = Decimal(repr(step)).normalize() if isinstance(step, float) else Decimal(step)
    _, digits, exponent = number.as_tuple()
    zeros = min(exponent, 30) if isinstance(exponent, int) and exponent > 0 else 0
    return int("".join(map(str, digits)) + "0" * zeros)


def _keep_maximum(key: str, schema: Mapping[str, Any], prepared: dict[str, Any]) -> None:
    value = schema.get(key)
    if value is not None and not (isinstance(value, int | float) and value >= MAX_LENGTH):
        prepared[key] = value


def _is_beyond_patterns(pattern: str) -> bool:
    # Within a class these are letters, and behind a backslash a bracket opens none.
    return _BEYOND_PATTERNS.search(_ESCAPES_AND_CLASSES.sub("x", pattern)) is not None


_SAYS_NOTHING: Final = frozenset({"title", "description", "default", "examples", "$comment", "$schema", "$id"})


def _says(schema: Mapping[str, Any]) -> set[str]:
    return set(schema) - _SAYS_NOTHING


def _take_null(prepared: dict[str, Any]) -> None:
    """Let a schema take null as well, for OpenAPI's ``nullable``."""
    given = prepared.get("type")
    if isinstance(given, str):
        prepared["type"] = [given, "null"]
    elif isinstance(given, list) and "null" not in given:
        prepared["type"] = [*given, "null"]
    if isinstance(prepared.get("enum"), list) and None not in prepared["enum"]:
        prepared["enum"] = [*prepared["enum"], None]
    if given is None and ("$ref" in prepared or "anyOf" in prepared or "allOf" in prepared):
        whole = dict(prepared)
        prepared.clear()
        prepared["anyOf"] = [whole, {"type": "null"}]
