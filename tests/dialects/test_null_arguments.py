"""Arguments of an earlier call that a client has as null: history, which nobody can mend any more."""

import json

import pytest

from cortex.dialects import openai_chat


@pytest.mark.parametrize("function", [{"name": "f", "arguments": None}, {"name": "f"}, {"name": "f", "arguments": {}}])
def test_null_arguments_of_an_earlier_call_are_none(function: dict[str, object]) -> None:
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "c", "content": None},
    ]
    found = openai_chat.decode(json.dumps({"model": "m", "messages": messages}).encode()).request
    assert found.messages[1].tool_calls[0].arguments == "{}"
