"""Tool calls in an answer: found wherever they are cut, streamed as they are written; what is no call stays text."""

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cortex.wire.request import Tool
from neuron.text.forms.form import CallArguments, CallBegins, CallEnds, CallForm, Piece
from neuron.text.forms.registry import FORMS, HERMES, form_of
from neuron.text.tools import ToolCallParser

OBJECT = '{"x": [1, 2]}'
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": [1, 2]}}\n</tool_call>'
F = ("f", OBJECT)
EDIT = Tool(
    "edit",
    parameters={
        "type": "object",
        "properties": {"path": {"type": "string"}, "line": {"type": "integer"}, "all": {"type": ["boolean", "null"]}},
    },
)


def parse(pieces: list[str], form: CallForm = HERMES, *, cut: bool = False) -> list[str | tuple[str, str]]:
    """Return what :func:`parse_with` does of an answer that may call ``edit``."""
    return parse_with([EDIT], pieces, form, cut=cut)


def parse_with(tools: list[Tool], pieces: list[str], form: CallForm, *, cut: bool = False) -> list[Any]:
    """Return text, and calls as pairs of a name and arguments; a call that has no end ends with ``...``."""
    parser = ToolCallParser(form, tools)
    found: list[Piece] = [piece for text in pieces for piece in parser.feed(text)] + parser.close(cut=cut)
    joined: list[Any] = []
    open_call = False
    for piece in found:
        match piece:
            case str() if joined and isinstance(joined[-1], str):
                joined[-1] += piece
            case str():
                joined.append(piece)
            case CallBegins(name):
                joined.append((name, ""))
                open_call = True
            case CallArguments(text):
                assert open_call, found
                joined[-1] = (joined[-1][0], joined[-1][1] + text)
            case CallEnds():
                assert open_call, found
                open_call = False
    if open_call:
        joined[-1] = (*joined[-1], "...")
    return joined


XML = (
    'Now.\n<tool_call>\n<function=edit>\n<parameter=path>\na "b"\n\n</parameter>\n<parameter=line>\n3\n'
    "</parameter>\n<parameter=all>\nnull\n</parameter>\n</function>\n</tool_call>"
)
TAGGED = [
    ("no call", ["no call"]),
    (CALL, [F]),
    (f"first {CALL}\n{CALL}", ["first ", F, F]),
    (f"\n\n{CALL}\n\nlast", [F, "last"]),
    ('<tool_call>{"name": "f"}</tool_call>', [("f", "{}")]),
    ('<tool_call>{"arguments": {"x":  1}, "name": "f"}</tool_call>', [("f", '{"x":  1}')]),
    ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', [("f", '{"a": 1}')]),
    ('<tool_call>{"name": "f", "parameters": {"a": 1}, "id": 3}</tool_call>', [("f", '{"a": 1}')]),
    ('<tool_call>{"type": "function", "name": "f", "arguments": {}}</tool_call>', [("f", "{}")]),
    (
        '<tool_call>{"name": "f", "arguments": {"x": "</tool_call>\\"}"}}</tool_call>',
        [("f", '{"x": "</tool_call>\\"}"}')],
    ),
    ('<tool_call>{"name": "f", "arguments": {"x": 1}</tool_call>!', [("f", '{"x": 1}'), "!"]),
    ('<tool_call>{"name": "f", "arguments": {"x": [1 \n</tool_call>!', [("f", '{"x": [1'), "!"]),
    (CALL.removesuffix("</tool_call>"), [F]),
    ("<tool_call>not json</tool_call>!", ["<tool_call>not json</tool_call>!"]),
    ("a\n<tool_call>\nnot json</tool_call>!", ["a\n<tool_call>\nnot json</tool_call>!"]),
    ('<tool_call>{"name": "", "arguments": {}}</tool_call>', ['<tool_call>{"name": "", "arguments": {}}</tool_call>']),
    ('<tool_call>{"name": "f", "arg', ['<tool_call>{"name": "f", "arg']),
    ('<tool_call>{"name": "f", "arguments": {"x": "y', [("f", '{"x": "y')]),
    ("a <tool_ca", ["a <tool_ca"]),
    ("1 < 2", ["1 < 2"]),
    ('{"name": "f", "arguments": {}}', ['{"name": "f", "arguments": {}}']),
    (
        XML,
        ["Now.", ("edit", '{"path": "a \\"b\\"\\n", "line": 3, "all": null}')],
    ),
    ("<function=edit>\n</function>", [("edit", "{}")]),
    ("<tool_call><function=edit><parameter=line>x<y</parameter></function></tool_call>", [("edit", '{"line": "x<y"}')]),
    ("<tool_call><function=g><parameter=a>[1]</parameter></function></tool_call>b", [("g", '{"a": "[1]"}'), "b"]),
    ("<tool_call><function=edit><parameter=path>x", [("edit", '{"path": "x"}')]),
    ("<tool_call><function=a\nb>", ["<tool_call><function=a\nb>"]),
    ("a\n<function=>b", ["a\n<function=>b"]),
]
LLAMA = [
    ('{"name": "f", "parameters": {"x": [1, 2]}}', [F]),
    (' \n{"type": "function", "name": "f", "parameters": {"x": [1, 2]}}', [F]),
    ('<|python_tag|>{"name": "f", "parameters": {"x": [1, 2]}}; {"name": "f", "parameters": {}}', [F, ("f", "{}")]),
    ('{"city": "Paris"}', ['{"city": "Paris"}']),
    ('{"name": "Ann", "age": 3}', ['{"name": "Ann", "age": 3}']),
    ('So: {"name": "f", "parameters": {}}', ['So: {"name": "f", "parameters": {}}']),
    ("<|python_tag|>print(1)", ["<|python_tag|>print(1)"]),
    (CALL, [F]),
]
MISTRAL = [
    ('[TOOL_CALLS] [{"name": "f", "arguments": {"x": [1, 2]}, "id": "abc"}, {"name": "f", "arguments": {}}]',
     [F, ("f", "{}")]),
    ('So.\n[TOOL_CALLS]f[ARGS]{"x": [1, 2]}[TOOL_CALLS]f{"x": [1, 2]}', ["So.", F, F]),
    ('[TOOL_CALLS]f[CALL_ID]abc[ARGS]{"x": [1, 2]}', [F]),
    ("[TOOL_CALLS] none\nof them {", ["[TOOL_CALLS] none\nof them {"]),
    ("[TOOL_CALLS] [1, 2]", ["[TOOL_CALLS] [1, 2]"]),
    ("a [TOOL", ["a [TOOL"]),
    (CALL, [F]),
]  # fmt: skip
CASES = [
    *((HERMES, *case) for case in TAGGED),
    *((FORMS["llama"], *case) for case in LLAMA),
    *((FORMS["mistral"], *case) for case in MISTRAL),
]


@pytest.mark.parametrize(("form", "text", "expected"), CASES)
def test_whole_and_in_any_cut(form: CallForm, text: str, expected: list[Any]) -> None:
    assert parse([text], form) == expected
    assert parse(list(text), form) == expected
    for cut in range(len(text)):
        assert parse([text[:cut], text[cut:]], form) == expected


def test_arguments_are_streamed_as_they_are_written() -> None:
    head, body, tail = '<tool_call>\n{"name": "f", "arguments": ', '{"text": "one two three"}', "}\n</tool_call>"
    parser = ToolCallParser()
    assert parser.feed(head) == []
    joined = []
    for character in body:
        joined += parser.feed(character)
    assert joined[0] == CallBegins("f")
    assert "".join(piece.text for piece in joined if isinstance(piece, CallArguments)) == body
    assert len(joined) > 20, "piece by piece"
    assert joined[-1] == CallEnds()
    assert parser.feed(tail) == parser.close() == []


def test_a_string_of_the_xml_form_is_streamed_as_it_is_written() -> None:
    parser = ToolCallParser(tools=[EDIT])
    parser.feed("<tool_call>\n<function=edit>\n<parameter=path>\n")
    assert parser.feed("one") == [CallArguments("one")]
    assert parser.feed(' "two"') == [CallArguments(' \\"two\\"')]
    assert parser.feed("\n</param") == []
    assert parser.feed("x") == [CallArguments("\\n</paramx")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('<tool_call>{"name": "f", "arguments": {"x": "y', ("f", '{"x": "y', "...")),
        ("<tool_call><function=edit><parameter=path>x", ("edit", '{"path": "x', "...")),
        ("<tool_call><function=edit>", ("edit", "", "...")),
    ],
)
def test_a_call_that_is_cut_does_not_look_complete(text: str, expected: Any) -> None:
    assert parse([text], cut=True) == [expected]


@given(st.text(alphabet='<>/tol_ca{}": f\n', max_size=40), st.sampled_from(list(FORMS.values())))
@example("\n<tool_call>\n{", HERMES)
def test_text_without_a_call_is_never_lost(text: str, form: CallForm) -> None:
    found = parse(list(text), form)
    if all(isinstance(piece, str) for piece in found):
        assert "".join(piece for piece in found if isinstance(piece, str)) == text


SOUP = st.lists(
    st.sampled_from(["<tool_call>", "</tool_call>", "<function=edit>", "<parameter=path>", "<parameter=line>", "\n",
                     "a", "</parameter>", "</function>", '{"name": "f", "arguments": ', "{", "}", '"', "\\", "[", "]",
                     ", ", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", ";", " "]),
    max_size=14,
)  # fmt: skip


@given(SOUP, st.sampled_from(list(FORMS.values())), st.booleans(), st.data())
def test_any_cut_of_anything_gives_the_same(words: list[str], form: CallForm, cut: bool, data: st.DataObject) -> None:
    text = "".join(words)
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    assert parse(pieces, form, cut=cut) == parse([text], form, cut=cut)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.text(max_size=4), VALUES, max_size=3), st.booleans(), st.integers(1, 9))
def test_any_object_goes_through_byte_for_byte(arguments: dict[str, Any], ascii_only: bool, step: int) -> None:
    text = json.dumps(arguments, ensure_ascii=ascii_only)
    call = f'<tool_call>\n{{"name": "f", "arguments": {text}}}\n</tool_call>'
    assert parse([call[at : at + step] for at in range(0, len(call), step)]) == [("f", text)]


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (None, HERMES),
        ("{{ messages }} [TOOL_CALLS]", HERMES),
        ("{% if tools %}<tool_call>", HERMES),
        ("{% if tools %}<|python_tag|> <|start_header_id|>", FORMS["llama"]),
        ("{% if tools %}[TOOL_CALLS]", FORMS["mistral"]),
        ("{% if tools %}<|im_start|>", HERMES),
        ("{% if tools %}<tool_call>\n<function=example>", FORMS["xml"]),
    ],
)
def test_the_template_selects_the_form(template: str | None, form: CallForm) -> None:
    assert form_of(template) is form
