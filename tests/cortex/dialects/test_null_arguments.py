"""Arguments of an earlier call that a client has as null: history, which no client can mend any more."""

import json

import pytest

from cortex.dialects.chat import request as chat_request
from cortex.dialects.responses import request as responses_request


@pytest.mark.parametrize("function", [{"name": "f", "arguments": None}, {"name": "f"}, {"name": "f", "arguments": {}}])
def test_null_arguments_of_an_earlier_call_are_none(function: dict[str, object]) -> None:
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "c", "content": None},
    ]
    found = chat_request.decode(json.dumps({"model": "m", "messages": messages}).encode()).request
    assert found.messages[1].tool_calls[0].arguments == "{}"


@pytest.mark.parametrize("more", [{}, {"arguments": None}, {"input": "a"}])
def test_a_function_call_without_arguments_has_none(more: dict[str, object]) -> None:
    items = [{"type": "function_call", "call_id": "c", "name": "f", **more}]
    found = responses_request.decode(json.dumps({"model": "m", "input": items}).encode()).request
    assert found.messages[0].tool_calls[0].arguments == "{}"


@pytest.mark.parametrize(("more", "wanted"), [({}, ""), ({"input": None}, ""), ({"input": "a"}, "a")])
def test_a_custom_call_has_an_input_always(more: dict[str, object], wanted: str) -> None:
    items = [{"type": "custom_tool_call", "call_id": "c", "name": "f", **more}]
    found = responses_request.decode(json.dumps({"model": "m", "input": items}).encode()).request
    assert json.loads(found.messages[0].tool_calls[0].arguments) == {"input": wanted}
