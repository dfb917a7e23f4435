"""Bodies of /v1/responses: how they flatten into a chat, and the errors of wrong ones."""

from typing import Any

import orjson
import pytest

from cortex.dialects.chat import request as chat_request
from cortex.dialects.responses import request as responses_request
from cortex.dialects.responses.sealed import seal
from cortex.dialects.translate import chat_body
from cortex.wire.errors import ApiError
from cortex.wire.request import FormatKind, ImagePart, Message, Role, TextPart, ToolCall, ToolMode


def decode(**body: Any) -> responses_request.ResponsesCall:
    return responses_request.decode(orjson.dumps({"model": "m", "input": "hello"} | body))


def messages(**body: Any) -> tuple[Message, ...]:
    return decode(**body).request.messages


def call(call_id: str, kind: str = "function_call") -> dict[str, Any]:
    return {"type": kind, "call_id": call_id, "name": "f", "arguments": "{}"}


def output(call_id: str, kind: str = "function_call_output") -> dict[str, Any]:
    return {"type": kind, "call_id": call_id, "output": "x"}


@pytest.mark.parametrize(
    "items",
    [
        [call("a"), output("a")],
        [call("a"), call("b"), output("b"), output("a")],
        [call("a"), {"role": "user", "content": "wait"}, output("a")],
        [call("a"), output("a"), call("a"), output("a")],  # ids counted from zero in each message
        [call("a"), call("b"), output("a")],  # interrupted before the other
        [call("a", "custom_tool_call"), output("a", "custom_tool_call_output")],
        [call("a", "local_shell_call"), output("a")],  # which Codex runs itself
    ],
)
def test_an_output_answers_a_call(items: list[dict[str, Any]]) -> None:
    messages(input=items)


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ([output("a")], "No tool call found for function call output with call_id a."),
        ([output("a", "custom_tool_call_output")], "No tool call found for custom tool call output with call_id a."),
        ([call("b"), output("a")], "No tool call found for function call output with call_id a."),
        ([output("a"), call("a")], "No tool call found for function call output with call_id a."),
        (
            [call("a"), output("a"), output("a")],
            "The function call output with call_id a is a second one for its call.",
        ),
        ([{"type": "web_search_call", "id": "a"}, output("a")], "No tool call found for function call output"),
    ],
)
def test_an_output_that_answers_nothing_is_refused(items: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(ApiError) as caught:
        messages(input=[{"role": "user", "content": "hi"}, *items])
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "tool_call_not_found", "input")
    assert caught.value.message.startswith(words)


def test_instructions_and_text_input() -> None:
    assert messages(instructions="be brief") == (Message(Role.SYSTEM, "be brief"), Message(Role.USER, "hello"))


def test_items_flatten_into_messages() -> None:
    items = [
        {"role": "developer", "content": "rules"},
        {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}],
        },
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x", "content": None},
        {
            "type": "message",
            "role": "assistant",
            "id": "msg_1",
            "status": "completed",
            "content": [{"type": "output_text", "text": "calling", "annotations": []}],
        },
        {
            "type": "function_call",
            "id": "fc_1",
            "call_id": "c1",
            "name": "f",
            "arguments": '{"x":1}',
            "status": "completed",
        },
        {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "id": "fco_1", "call_id": "c1", "output": "one"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "two"}]},
        {"type": "web_search_call", "id": "ws_1", "status": "completed"},
    ]
    assert messages(input=items) == (
        Message(Role.SYSTEM, "rules"),
        Message(Role.USER, "ab"),
        Message(Role.ASSISTANT, "calling", (ToolCall("c1", "f", '{"x":1}'), ToolCall("c2", "g", "{}"))),
        Message(Role.TOOL, "one", tool_call_id="c1"),
        Message(Role.TOOL, "two", tool_call_id="c2"),
    )


def test_mixed_content_keeps_its_parts() -> None:
    content = [
        {"type": "input_text", "text": "see"},
        {"type": "input_image", "image_url": "https://x/y.png", "detail": "low"},
    ]
    assert messages(input=[{"role": "user", "content": content}]) == (
        Message(Role.USER, (TextPart("see"), ImagePart("https://x/y.png", "low"))),
    )


def test_tools_of_agents_never_fail() -> None:
    grammar = {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"}
    tools = [
        {"type": "function", "name": "f", "parameters": None, "strict": False},
        {"type": "namespace", "name": "ns", "description": "", "tools": [{"type": "function", "name": "g"}]},
        {"type": "namespace", "name": "mcp__s__", "description": "", "tools": [{"type": "custom", "name": "h"}]},
        {"type": "web_search", "external_web_access": True},
        {"type": "custom", "name": "apply_patch", "description": "Patches.", "format": grammar},
        {"type": "custom", "name": "f"},
    ]
    call = decode(tools=tools, tool_choice={"type": "function", "name": "g"})
    assert [tool.name for tool in call.request.tools] == ["f", "ns__g", "mcp__s__h", "apply_patch"]
    assert (call.request.tool_choice.mode, call.request.tool_choice.name) == (ToolMode.NAMED, "ns__g")
    assert call.tools.custom == {"mcp__s__h", "apply_patch"}
    assert call.tools.namespaces == {"ns__g": ("ns", "g"), "mcp__s__h": ("mcp__s__", "h")}
    patch = call.request.tools[-1]
    assert patch.description == "Patches.\n\nThe input must match this lark grammar:\nstart: /.+/"
    assert patch.parameters["required"] == ["input"]
    assert orjson.loads(call.echo)["tools"] == [tools[0] | {"description": None}, *tools[1:]]


@pytest.mark.parametrize(
    ("choice", "mode", "names"),
    [
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "g"}]}, ToolMode.AUTO, "g"),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "custom", "name": "f"}]},
            ToolMode.REQUIRED,
            "f",
        ),
        ({"type": "custom", "name": "f"}, ToolMode.NAMED, "fg"),
        ("required", ToolMode.REQUIRED, "fg"),
        ("none", ToolMode.NONE, "fg"),
    ],
)
def test_tool_choice(choice: Any, mode: ToolMode, names: str) -> None:
    request = decode(
        tools=[{"type": "custom", "name": "f"}, {"type": "function", "name": "g"}], tool_choice=choice
    ).request
    assert request.tool_choice.mode is mode
    assert "".join(tool.name for tool in request.tools) == names


def test_calls_of_custom_and_namespaced_tools_come_back_under_the_models_names() -> None:
    items = [
        {"type": "custom_tool_call", "call_id": "c1", "name": "p", "input": 'a"b'},
        {"type": "function_call", "call_id": "c2", "name": "g", "namespace": "ns", "arguments": "{}"},
        {"type": "function_call", "call_id": "c3", "name": "g", "arguments": "{}"},
        {"type": "custom_tool_call_output", "call_id": "c1", "output": "done"},
    ]
    tools = [{"type": "namespace", "name": "ns", "tools": [{"type": "function", "name": "g"}]}]
    calls = (ToolCall("c1", "p", '{"input":"a\\"b"}'), ToolCall("c2", "ns__g", "{}"), ToolCall("c3", "ns__g", "{}"))
    assert messages(input=items, tools=tools) == (
        Message(Role.ASSISTANT, "", calls),
        Message(Role.TOOL, "done", tool_call_id="c1"),
    )


@pytest.mark.parametrize(
    "reasoning",
    [
        {"id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "why"}]},
        {"summary": [{"type": "summary_text", "text": "wh"}, {"type": "summary_text", "text": "y"}]},
        {"summary": [], "encrypted_content": seal("why")},
        {"summary": [], "content": None, "encrypted_content": seal("why"), "status": None},
    ],
)
def test_reasoning_goes_to_the_message_it_precedes(reasoning: dict[str, Any]) -> None:
    item = {"type": "reasoning", **reasoning}
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    answer = {"role": "assistant", "content": "so"}
    user = {"role": "user", "content": "go"}
    called = (ToolCall("c", "f", "{}"),)
    assert messages(input=[user, item, answer, call])[1] == Message(Role.ASSISTANT, "so", called, reasoning="why")
    assert messages(input=[user, item, call])[1] == Message(Role.ASSISTANT, "", called, reasoning="why")
    found = messages(input=[user, item, call, item, answer])[1:]
    assert found == (
        Message(Role.ASSISTANT, "", called, reasoning="why"),
        Message(Role.ASSISTANT, "so", reasoning="why"),
    )


@pytest.mark.parametrize("sealed", ["gAAAA", "open1.!", "open1./w=="])
def test_encrypted_content_of_another_server_is_dropped(sealed: str) -> None:
    item = {"type": "reasoning", "summary": [], "encrypted_content": sealed}
    assert messages(input=[item, {"role": "assistant", "content": "so"}]) == (Message(Role.ASSISTANT, "so"),)


def test_options_of_the_answer() -> None:
    plain = decode()
    asked = decode(reasoning={"summary": "auto"}, include=["reasoning.encrypted_content"], truncation="auto")
    assert (plain.summarises, plain.seals) == (False, False)
    assert (asked.summarises, asked.seals) == (True, True)
    assert "truncation" not in orjson.loads(asked.echo), "nothing is truncated"
    assert orjson.loads(decode(text={"verbosity": "low"}).echo)["text"] == {
        "format": {"type": "text"},
        "verbosity": "low",
    }


def test_every_sampling_field_arrives() -> None:
    asked = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "repetition_penalty": 1.1,
        "presence_penalty": 0.2, "frequency_penalty": -0.3, "seed": 7,
    }  # fmt: skip
    call = decode(**asked, logit_bias={"17": -100}, stop="END")
    assert {name: getattr(call.request.sampling, name) for name in asked} == asked
    assert (call.request.sampling.logit_bias, call.request.stop) == ({17: -100}, ("END",))
    assert {"presence_penalty", "frequency_penalty"} <= set(orjson.loads(call.echo))


def test_items_of_unknown_types_are_dropped() -> None:
    items = [
        {"type": "additional_tools", "tools": [{"type": "function", "name": "f"}]},
        {"type": "compaction_trigger"},
        {"role": "developer", "id": "msg_9", "content": [{"type": "input_text", "text": "rules"}]},
        {"role": "user", "content": "go"},
    ]
    assert messages(input=items) == (Message(Role.SYSTEM, "rules"), Message(Role.USER, "go"))


def test_formats_reasoning_and_echo() -> None:
    text = {"format": {"type": "json_schema", "name": "s", "schema": {"type": "object"}}}
    call = decode(text=text, reasoning={"effort": "none"}, metadata={"a": "b"}, temperature=0.5, instructions=None)
    assert call.request.output_format.kind is FormatKind.JSON_SCHEMA
    assert call.request.thinking is False
    assert orjson.loads(call.echo) == {
        "metadata": {"a": "b"},
        "reasoning": {"effort": "none"},
        "temperature": 0.5,
        "text": text,
    }


def test_the_same_conversation_is_the_same_request_in_either_dialect() -> None:
    tool = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    chat = chat_request.decode(
        orjson.dumps(
            {
                "model": "m",
                "messages": [
                    {"role": "system", "content": "rules"},
                    {"role": "user", "content": "go"},
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
                    },
                    {"role": "tool", "tool_call_id": "c", "content": "done"},
                ],
                "tools": [{"type": "function", "function": tool}],
                "max_tokens": 5,
            }
        )
    )
    responses = decode(
        instructions="rules",
        input=[
            {"role": "user", "content": "go"},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "done"},
        ],
        tools=[{"type": "function", **tool}],
        max_output_tokens=5,
    )
    assert chat.request == responses.request


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"previous_response_id": "resp_1"}, "chained_conversation_not_supported", "previous_response_id"),
        ({"input": []}, "invalid_value", "input"),
        ({"input": 3}, "invalid_type", "input"),
        ({"input": [3]}, "invalid_type", "input[0]"),
        ({"input": [{"role": "user"}]}, "invalid_value", "input[0].content"),
        ({"input": [{"content": "x"}]}, "invalid_value", "input[0].role"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "invalid_value", "input[0].call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "invalid_value", "input[0].output"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "unsupported_parameter", "input[0]"),
        ({"max_output_tokens": 0}, "invalid_value", "max_output_tokens"),
        ({"temperature": 9}, "invalid_value", "temperature"),
        ({"presence_penalty": 3}, "invalid_value", "presence_penalty"),
        ({"stop": [""]}, "invalid_value", "stop"),
        ({"conversation": "conv_1"}, "unsupported_parameter", "conversation"),
        ({"background": True}, "unsupported_parameter", "background"),
        ({"truncation": "sometimes"}, "invalid_type", "truncation"),
        ({"tools": [{"type": "function"}]}, "missing_required_parameter", "tools[0].name"),
        ({"tool_choice": {"type": "web_search"}}, "unsupported_parameter", "tool_choice.type=web_search"),
        ({"reasoning": {"effort": "heroic"}}, "invalid_value", "reasoning.effort"),
        ({"text": {"format": {"type": "poem"}}}, "invalid_value", "text.format.type"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "invalid_value", "tool_choice"),
        ({"model": None}, "invalid_type", "model"),
    ],
)
def test_a_wrong_field_is_named(body: dict[str, Any], code: str, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        decode(**body)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, code, param)


def test_hosted_tools_are_named_and_not_offered() -> None:
    hosted = [{"type": "web_search"}, {"type": "mcp", "server_label": "x", "server_url": "y"}]
    inner = {
        "type": "namespace",
        "name": "n",
        "tools": [{"type": "image_generation"}, {"type": "function", "name": "g"}],
    }
    body = {"model": "m", "input": "a", "tools": [*hosted, {"type": "function", "name": "f"}, inner]}
    call = responses_request.decode(orjson.dumps(body))
    assert [tool.name for tool in call.request.tools] == ["f", "n__g"]
    named = ("tools[0].type=web_search", "tools[1].type=mcp", "tools[3].tools[0].type=image_generation")
    assert call.ignored == named


def test_a_message_of_many_calls_and_thoughts_is_read_in_one_pass() -> None:
    """30,000 calls of one message took minutes, and tools times calls did."""
    namespace = {"type": "namespace", "name": "n", "tools": [{"type": "function", "name": f"g{n}"} for n in range(900)]}
    calls = [
        {"type": "function_call", "call_id": f"c{n}", "name": f"g{n % 900}", "arguments": "{}"} for n in range(18_000)
    ]
    thought = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm. "}]}
    body = {"model": "m", "input": [*[thought] * 1_000, *calls], "tools": [namespace]}
    (message,) = responses_request.decode(orjson.dumps(body)).request.messages
    assert len(message.tool_calls) == 18_000
    assert message.tool_calls[901].name == "n__g1"
    assert message.reasoning == "Hm. " * 1_000


def test_the_output_of_a_call_of_no_tool_here_has_a_call_before_it() -> None:
    body = {
        "model": "m",
        "input": [
            {"role": "user", "content": "go"},
            {"type": "local_shell_call", "call_id": "s", "action": {"type": "exec", "command": ["ls"]}},
            {"type": "function_call_output", "call_id": "s", "output": "a.txt"},
        ],
    }
    request = responses_request.decode(orjson.dumps(body)).request
    assert [(message.role, [call.name for call in message.tool_calls]) for message in request.messages] == [
        ("user", []),
        ("assistant", ["local_shell"]),
        ("tool", []),
    ]
    assert len(chat_request.decode(chat_body(request, stream=False)).request.messages) == 3
