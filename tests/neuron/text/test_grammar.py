"""Grammars of requests, and refusals of requests that cannot have one."""

import json
from typing import Any

import pytest

from cortex.wire.errors import ApiError
from cortex.wire.request import FormatKind, InferenceRequest, OutputFormat, Tool, ToolChoice, ToolMode
from neuron.text.grammar import constraint_of

TOOL = Tool("f", "", {"type": "object", "properties": {"x": {"type": "integer"}}})


def ask(kind: FormatKind = FormatKind.TEXT, source: str = "", **changes: Any) -> str | None:
    return constraint_of(InferenceRequest("m", prompt="x", output_format=OutputFormat(kind, source), **changes))


def test_free_text_has_none() -> None:
    assert ask() is None
    assert ask(tools=(TOOL,)) is None
    assert ask(tools=(TOOL,), tool_choice=ToolChoice(ToolMode.NONE)) is None


def test_tools_on_offer_are_an_alternative_to_the_format() -> None:
    found = ask(FormatKind.JSON_OBJECT, tools=(TOOL,))
    assert found is not None
    assert found.startswith("start: answer | calls")
    without = ask(FormatKind.JSON_OBJECT, tools=(TOOL,), tool_choice=ToolChoice(ToolMode.NONE))
    assert without is not None
    assert "calls" not in without


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        (FormatKind.JSON_SCHEMA, "{", "not JSON"),
        (FormatKind.JSON_SCHEMA, "3", "an object"),
        (FormatKind.JSON_SCHEMA, '{"type": "strin"}', "strin"),
        (FormatKind.JSON_SCHEMA, '{"$ref": "#/$defs/absent"}', "absent"),
        (FormatKind.JSON_SCHEMA, '{"type": "string", "pattern": "[b-a]"}', "invalid character class range"),
        (FormatKind.JSON_SCHEMA, '{"a":' * 70 + "1" + "}" * 70, "deeper than 64"),
        (FormatKind.JSON_SCHEMA, '{"a":' * 100_000 + "1" + "}" * 100_000, "not JSON"),
        (FormatKind.JSON_SCHEMA, json.dumps({"enum": ["x" * 300_000]}), "longer than"),
        (FormatKind.REGEX, "[a-z", "unclosed"),
        (FormatKind.GRAMMAR, "other: /a/", "no rule 'start'"),
        (FormatKind.GRAMMAR, "start: absent", "absent"),
        (FormatKind.GRAMMAR, 'root ::= "a', "cannot be read"),
    ],
)
def test_an_invalid_grammar_is_refused_with_the_reason(kind: FormatKind, source: str, message: str) -> None:
    with pytest.raises(ApiError) as caught:
        ask(kind, source)
    error = caught.value.info()
    assert (error.status, error.code, error.param) == (400, "invalid_schema", "response_format")
    assert message in error.message
    assert "answer:" not in error.message, "the client did not write that"


def test_a_choice_of_an_absent_tool_is_refused() -> None:
    with pytest.raises(ApiError, match="tool_choice"):
        ask(tools=(TOOL,), tool_choice=ToolChoice(ToolMode.NAMED, "absent"))
