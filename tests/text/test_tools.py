"""Tool calls in an answer: found wherever they are cut; what is no call stays text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuron.text.tools import ParsedCall, ToolCallParser

CALL = '<tool_call>\n{"name": "f", "arguments": {"x": [1, 2]}}\n</tool_call>'
PARSED = ParsedCall("f", '{"x":[1,2]}')


def parse(pieces: list[str]) -> list[str | ParsedCall]:
    parser = ToolCallParser()
    found = [piece for text in pieces for piece in parser.feed(text)] + parser.close()
    joined: list[str | ParsedCall] = []
    for piece in found:
        if isinstance(piece, str) and joined and isinstance(joined[-1], str):
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no call", ["no call"]),
        (CALL, [PARSED]),
        (f"first {CALL}{CALL}", ["first ", PARSED, PARSED]),
        ('<tool_call>{"name": "f"}</tool_call>', [ParsedCall("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', [ParsedCall("f", '{"a": 1}')]),
        (CALL.removesuffix("</tool_call>"), [PARSED]),
        ("<tool_call>not json</tool_call>!", ["<tool_call>not json</tool_call>!"]),
        ('<tool_call>{"name": "f", "arg', ['<tool_call>{"name": "f", "arg']),
        ("a <tool_ca", ["a <tool_ca"]),
        ("1 < 2", ["1 < 2"]),
    ],
)
def test_whole_and_in_any_cut(text: str, expected: list[str | ParsedCall]) -> None:
    assert parse([text]) == expected
    assert parse(list(text)) == expected
    for cut in range(len(text)):
        assert parse([text[:cut], text[cut:]]) == expected


@given(st.text(alphabet='<>/tol_ca{}": f', max_size=40))
def test_text_without_a_call_is_never_lost(text: str) -> None:
    found = parse(list(text))
    if not any(isinstance(piece, ParsedCall) for piece in found):
        assert "".join(piece for piece in found if isinstance(piece, str)) == text
