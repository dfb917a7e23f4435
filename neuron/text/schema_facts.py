"""Facts about a JSON schema: the places that its references name, its types, and alternatives that exclude each other.

Nothing here depends on the compiler of grammars.
"""

from collections.abc import Mapping
from typing import Any, Final

MAX_BOUND: Final = 10**17
"""Bounds of numbers beyond this have no pattern of digits."""

Link = tuple["Link | None", str]
"""A place within a document: that of what holds it, and the key there; ``None`` for the root.

A pointer is written only where it is asked for: those of all places take the square of a document's size.
"""


def named_places(document: object) -> dict[str, Link | None]:
    """Return the place of each ``$id``, and of each anchor, with a ``#`` before it."""
    found: dict[str, Link | None] = {}
    waiting: list[tuple[Link | None, object]] = [(None, document)]
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, Mapping):
            for key in ("$id", "id"):
                if isinstance(value.get(key), str):
                    found.setdefault(value[key].removesuffix("#"), place)
            for key in ("$anchor", "$dynamicAnchor"):
                if isinstance(value.get(key), str):
                    found.setdefault("#" + value[key], place)
            for key, inner in value.items():
                if isinstance(inner, Mapping | list):
                    waiting.append(((place, str(key)), inner))
        elif isinstance(value, list):
            waiting += [
                ((place, str(index)), inner) for index, inner in enumerate(value) if isinstance(inner, Mapping | list)
            ]
    return found


def pointer(place: Link | None) -> str:
    """Return the pointer to a place, empty for the root."""
    steps = []
    while place is not None:
        place, key = place
        steps.append("/" + key.replace("~", "~0").replace("/", "~1"))
    return "".join(reversed(steps))


def value_at(document: object, place: str) -> object:
    """Return what a pointer leads to. Raises ``LookupError``."""
    found: Any = document
    for step in place.split("/")[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and key.isascii() and key.isdecimal():
            found = found[int(key[:9])]
        elif isinstance(found, Mapping):
            found = found[key]
        else:
            raise LookupError(place)
    return found


def types_of(schema: Mapping[str, Any]) -> set[str] | None:
    """Return the types a value may have, ``None`` if any. An integer is a number too."""
    given = schema.get("type")
    if given is None:
        listed = (
            schema["enum"] if isinstance(schema.get("enum"), list) else [schema["const"]] if "const" in schema else None
        )
        return None if listed is None else {_TYPE_NAMES.get(type(value), "number") for value in listed}
    if not isinstance(given, str | list):
        return None  # no schema; its compiler reports it
    found = {given} if isinstance(given, str) else {name for name in given if isinstance(name, str)}
    return {"number" if name == "integer" else name for name in found}


_TYPE_NAMES: Final = {str: "string", bool: "boolean", type(None): "null", list: "array", dict: "object"}


def may_be(name: str, schema: Mapping[str, Any]) -> bool:
    """Return whether a value of type ``name`` may fit."""
    types = types_of(schema)
    return types is None or name in types


class Alternative:
    """Features that tell an alternative from others, computed once."""

    __slots__ = ("constants", "listed", "types")

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self.types = types_of(schema)
        self.listed = _listed(schema)
        self.constants: dict[str, set[str]] = {}
        """The values of each property that must be there and lists its own."""
        properties = schema.get("properties")
        if self.types == {"object"} and isinstance(properties, Mapping):
            for name in _names(schema):
                inner = properties.get(name)
                listed = _listed(inner) if isinstance(inner, Mapping) and name not in self.constants else None
                if listed is not None:
                    self.constants[name] = listed


def are_disjoint(one: Alternative, other: Alternative) -> bool:
    """Return whether it is plain that no value fits both."""
    if one.types is not None and other.types is not None and not one.types & other.types:
        return True
    if one.listed is not None and other.listed is not None:
        return not one.listed & other.listed
    return any(not one.constants[name] & other.constants[name] for name in one.constants.keys() & other.constants)


def _names(schema: Mapping[str, Any]) -> list[str]:
    required = schema.get("required")
    return [name for name in required if isinstance(name, str)] if isinstance(required, list) else []


def _listed(schema: Mapping[str, Any]) -> set[str] | None:
    """Return the values that a schema lists, each as what it is; ``None`` if it lists none."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(values, list):
        return None
    return {f"number {float(value)}" if _is_number(value) else f"{type(value).__name__} {value!r}" for value in values}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_BOUND
