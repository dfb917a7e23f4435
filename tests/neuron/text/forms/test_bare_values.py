"""Values that a model writes bare: recursive schemas are read once."""

from typing import Any

import pytest

from neuron.text.forms import bare_values
from neuron.text.forms.bare_values import as_json, kinds_of, property_schema


@pytest.mark.parametrize("key", ["anyOf", "oneOf", "allOf"])
def test_a_schema_that_refers_to_itself_many_times_is_looked_at_once(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    target = bare_values.value_at

    def counted(root: Any, place: str) -> object:
        nonlocal looks
        looks += 1
        return target(root, place)

    monkeypatch.setattr(bare_values, "value_at", counted)
    around = {"$ref": "#/properties/x"}
    root = {"properties": {"x": around | {key: [dict(around) for _ in range(2_000)]}}}
    schema = property_schema(root, "x")
    assert kinds_of(schema, root) == ("string",)
    assert as_json("3", schema, root) == '"3"'
    assert looks <= 8 * bare_values.MAX_ALTERNATIVES


def test_alternatives_behind_references_are_still_read() -> None:
    root: dict[str, Any] = {
        "properties": {"x": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}},
        "$defs": {"n": {"allOf": [{"type": "integer"}]}},
    }
    schema = property_schema(root, "x")
    assert kinds_of(schema, root) == ("null", "integer")
    assert as_json("3", schema, root) == "3"
