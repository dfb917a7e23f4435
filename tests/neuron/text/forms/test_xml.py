"""Arguments that a model writes bare: typed by their schema, however the text is cut and whatever a value holds."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuron.text.forms.bare_values import as_json
from neuron.text.forms.form import CallArguments, CallBegins, CallEnds
from neuron.text.forms.xml import FUNCTION, XmlReader

PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "code": {"type": "string"},
        "count": {"type": "integer"},
        "ratio": {"type": "number"},
        "flag": {"type": "boolean"},
        "items": {"type": "array", "items": {"type": "string"}},
        "table": {"type": "object"},
        "maybe": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "maybe_text": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "number_or_text": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
        "text_or_number": {"oneOf": [{"type": "string"}, {"type": "integer"}]},
        "text_or_list": {"anyOf": [{"type": "string"}, {"type": "array"}]},
        "types": {"type": ["integer", "null"]},
        "size": {"enum": ["1", "2", "large"]},
        "mixed": {"enum": [1, "1", None, True, "a"]},
        "level": {"type": "integer", "enum": [1, 2]},
        "fixed": {"const": 7},
        "referred": {"$ref": "#/$defs/Point"},
        "pointed": {"$ref": "#/properties/count"},
        "all": {"allOf": [{"$ref": "#/$defs/Count"}], "default": 3},
        "nullable": {"type": "integer", "nullable": True},
        "untyped": {},
        "described": {"description": "x"},
        "odd": {"type": "date"},
        "loop": {"$ref": "#/properties/loop"},
    },
    "$defs": {"Point": {"type": "object", "properties": {"x": {"type": "number"}}}, "Count": {"type": "integer"}},
    "additionalProperties": {"type": "integer"},
}

TYPED: list[tuple[str, str, Any]] = [
    ("text", "true", "true"), ("text", "007", "007"), ("text", "{}", "{}"), ("text", "null", "null"), ("text", "", ""),
    ("count", "3", 3), ("count", "3.0", 3), ("count", "-3", -3), ("count", "+3", 3), ("count", "1e3", 1000),
    ("count", "3.5", "3.5"), ("count", "three", "three"), ("count", "", ""), ("count", "0x10", "0x10"),
    ("count", "1_000", "1_000"), ("count", "9" * 5000, "9" * 5000), ("count", " 4 ", 4), ("count", "1e999", "1e999"),
    ("ratio", "3", 3), ("ratio", "3.0", 3.0), ("ratio", ".5", 0.5), ("ratio", "5.", 5.0), ("ratio", "NaN", "NaN"),
    ("ratio", "Infinity", "Infinity"), ("ratio", "-1.5e-3", -0.0015), ("ratio", "1,5", "1,5"),
    ("flag", "true", True), ("flag", "True", True), ("flag", "FALSE", False), ("flag", "1", "1"), ("flag", "no", "no"),
    ("items", '["a", "b"]', ["a", "b"]), ("items", "['a', 'b']", ["a", "b"]), ("items", "('a',)", ["a"]),
    ("items", '["it\'s", \'say "x"\']', ["it's", 'say "x"']), ("items", "[]", []), ("items", "a, b", "a, b"),
    ("items", "[True, None, 1.5, -2]", [True, None, 1.5, -2]), ("items", "['\\n\\x41\\u00e9\\\\']", ["\nAé\\"]),
    ("items", '{"a": 1}', '{"a": 1}'), ("items", "[1, [2, (3, 4)], {'a': None}]", [1, [2, [3, 4]], {"a": None}]),
    ("items", "[" * 3000, "[" * 3000),
    ("items", "[" * 80 + "]" * 80, "[" * 80 + "]" * 80), ("items", "[f(1)]", "[f(1)]"),
    ("table", '{"a": {"b": 1}}', {"a": {"b": 1}}), ("table", "{'a': True, 'b': None,}", {"a": True, "b": None}),
    ("table", "{1: 'x', True: 2}", {"1": "x", "true": 2}), ("table", "{'a'}", "{'a'}"), ("table", "[1]", "[1]"),
    ("table", "{a: 1}", "{a: 1}"), ("table", "{'a': [1, 2", "{'a': [1, 2"), ("table", "null", "null"),
    ("maybe", "3", 3), ("maybe", "null", None), ("maybe", "None", None), ("maybe", "x", "x"), ("maybe", "", None),
    ("maybe_text", "null", None), ("maybe_text", "None", None), ("maybe_text", "a", "a"), ("maybe_text", "3", "3"),
    ("maybe_text", "", ""),
    ("number_or_text", "3", 3), ("number_or_text", "x", "x"), ("text_or_number", "3", "3"),
    ("text_or_list", "[1]", [1]), ("text_or_list", "a", "a"), ("text_or_list", "[a", "[a"),
    ("types", "3", 3), ("types", "None", None), ("nullable", "null", None), ("nullable", "5", 5),
    ("size", "1", "1"), ("size", "large", "large"), ("size", "other", "other"), ("size", "3", "3"),
    ("mixed", "1", "1"), ("mixed", "True", True), ("mixed", "null", None), ("mixed", "a", "a"),
    ("level", "1", 1), ("level", "2.0", 2), ("level", "9", 9), ("fixed", "7", 7), ("fixed", "8", 8),
    ("referred", "{'x': 1}", {"x": 1}), ("referred", '{"x": 1}', {"x": 1}), ("pointed", "3", 3), ("all", "4", 4),
    ("untyped", "3", "3"), ("described", "[1]", "[1]"), ("odd", "3", "3"), ("loop", "3", "3"),
    ("unheard_of", "12", 12), ("unheard_of", "x", "x"),
]  # fmt: skip


def arguments(text: str, cuts: list[int] | None = None, *, cut: bool = False, schema: Any = PARAMETERS) -> str:
    """Return the arguments of the one call that ``text`` is, given in pieces."""
    call, text = XmlReader(FUNCTION, {"f": schema}), text.removeprefix(FUNCTION)
    edges = [0, *sorted(at % (len(text) + 1) for at in cuts or []), len(text)]
    pieces = [piece for start, end in itertools.pairwise(edges) for piece in call.feed(text[start:end])]
    pieces += call.close(cut=cut)
    assert isinstance(pieces[0], CallBegins)
    assert cut or isinstance(pieces[-1], CallEnds)
    return "".join(piece.text for piece in pieces if isinstance(piece, CallArguments))


def written(*parameters: tuple[str, str]) -> str:
    inner = "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in parameters)
    return f"<function=f>\n{inner}</function>"


@pytest.mark.parametrize(("name", "value", "expected"), TYPED)
def test_a_value_is_what_its_schema_lets_it_be(name: str, value: str, expected: Any) -> None:
    found = json.loads(arguments(written((name, value)))).get(name)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    "schema", [{}, {"properties": 3}, {"$ref": "#"}, {"properties": {"count": 3}}, {"type": "object", "allOf": 1}]
)
def test_a_schema_without_a_type_leaves_text(schema: Any) -> None:
    assert json.loads(arguments(written(("count", "3")), schema=schema)) == {"count": "3"}


def test_properties_are_found_behind_references() -> None:
    schema = {"$ref": "#/$defs/Args", "$defs": {"Args": {"allOf": [{"properties": {"count": {"type": "integer"}}}]}}}
    assert json.loads(arguments(written(("count", "3")), schema=schema)) == {"count": 3}


LOOKALIKES = [
    "a</parameter>b",
    "x = '</parameter>'\ny = 1",
    "<parameter=text>\ninner\n</parameter> done",
    "</function>\nmore",
    "if tag == '</function>': pass",
    "<tool_call>\n{}\n</tool_call>\nmore",
    "<parameter=unknown>x",
    "<parameter=code>again",
    "</param",
    "<",
    "\n\nblank lines\n\n",
    "</parameter>\n\nno tag",
]


@pytest.mark.parametrize("value", LOOKALIKES)
@given(cuts=st.lists(st.integers(0, 400), max_size=12))
def test_a_value_may_hold_what_looks_like_a_tag(value: str, cuts: list[int]) -> None:
    text = written(("text", "first"), ("code", value), ("count", "3"))
    assert json.loads(arguments(text, cuts)) == {"text": "first", "code": value, "count": 3}


UNCLOSED: list[tuple[str, dict[str, Any]]] = [
    ("<function=f>\n<parameter=text>\na\n<parameter=count>\n3\n</parameter>\n</function>", {"text": "a", "count": 3}),
    ("<function=f>\n<parameter=count>\n3\n<parameter=text>\na\n</parameter>\n</function>", {"text": "a", "count": 3}),
    ("<function=f>\n<parameter=text>\na\n</function>\n</tool_call>", {"text": "a"}),
    ("<function=f><parameter=text>a</function></tool_call>", {"text": "a"}),
    ("<function=f>\n<parameter=count>\n3\n</function>\n</tool_call>", {"count": 3}),
    ("<function=f>\n<parameter=text>\na\n</function>", {"text": "a"}),
    ("<function=f>\n<parameter=text>\na\n</tool_call>", {"text": "a"}),
    ("<function=f>\n<parameter=text>\na\n</parameter>\n</tool_call>", {"text": "a"}),
    ("<function=f>\n<parameter=text>\na\n</parameter>", {"text": "a"}),
    ("<function=f>\n<parameter=text>\na", {"text": "a"}),
    ("<function=f>\n<parameter=count>\n3", {"count": 3}),
    ("<function=f>\n<parameter=items>\n['a',", {"items": "['a',"}),
    ("<function=f>\n<parameter=text>\n<parameter=count>\n3\n</parameter>\n</function>", {"text": "", "count": 3}),
    ("<function=f>\n<parameter=text>\n</parameter>\n</function>", {"text": ""}),
    ("<function=f>\n<parameter=text></parameter>\n</function>", {"text": ""}),
    ("<function=f>\n<parameter=maybe>\n\n</parameter>\n</function>", {"maybe": None}),
    ("<function=f>\n<parameter=text>\n</function>\n</tool_call>", {"text": ""}),
    ("<function=f>\n</function>", {}),
    ("<function=f>", {}),
]


@pytest.mark.parametrize(("text", "expected"), UNCLOSED)
@given(cuts=st.lists(st.integers(0, 200), max_size=12))
def test_a_tag_that_is_missing_closes_all_the_same(text: str, expected: dict[str, Any], cuts: list[int]) -> None:
    assert json.loads(arguments(text, cuts)) == expected


PIECES = [
    "<function=f>", "</function>", "<parameter=text>", "<parameter=count>", "<parameter=items>", "</parameter>",
    "<tool_call>", "</tool_call>", "\n", " ", "3", "a", "['b']", "<", "</par", '"', "\\", "é",
]  # fmt: skip


@given(st.lists(st.sampled_from(PIECES), max_size=25), st.lists(st.integers(0, 300), max_size=10), st.booleans())
def test_any_cut_gives_the_same(pieces: list[str], cuts: list[int], cut: bool) -> None:
    text = "<function=f>" + "".join(pieces)
    whole = arguments(text, cut=cut)
    assert arguments(text, cuts, cut=cut) == whole
    assert arguments(text, list(range(len(text))), cut=cut) == whole
    if not cut:
        assert isinstance(json.loads(whole), dict)


def test_a_string_is_streamed_as_it_comes_and_a_cut_call_stays_open() -> None:
    call = XmlReader(FUNCTION, {"f": PARAMETERS})
    call.feed("f>\n<parameter=text>\n")
    assert call.feed("hello") == [CallArguments("hello")]
    assert call.feed(" wor") == [CallArguments(" wor")]
    assert arguments("<function=f>\n<parameter=text>\nhel", cut=True) == '{"text": "hel'
    assert arguments("<function=f>\n<parameter=text>\nhel\n</parameter>\n", cut=True) == '{"text": "hel"'
    assert arguments("<function=f>\n<parameter=count>\n3", cut=True) == '{"count": '


def test_a_long_value_is_read_once() -> None:
    """No bound of time here but that it ends: looked at again with each token, 400 kB would take minutes."""
    value = json.dumps(["x" * 50] * 8000)
    call = XmlReader(FUNCTION, {"f": PARAMETERS})
    pieces = call.feed("f>\n<parameter=items>\n")
    for at in range(0, len(value), 4):
        pieces += call.feed(value[at : at + 4])
    pieces += call.feed("\n</parameter>\n</function>")
    assert call.ended
    assert json.loads("".join(p.text for p in pieces if isinstance(p, CallArguments))) == {"items": json.loads(value)}


@given(st.recursive(
    st.none() | st.booleans() | st.integers(-(10**15), 10**15) | st.text(max_size=8) | st.floats(-1e9, 1e9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
))  # fmt: skip
def test_python_literals_are_read(value: Any) -> None:
    assert json.loads(as_json(repr([value]), {"type": "array"}, {})) == [value]
    assert json.loads(as_json(repr({"k": value}), {"type": "object"}, {})) == {"k": value}
