"""Bodies of /v1/chat/completions: what they become, and the errors of wrong ones."""

from typing import Any

import msgspec
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex.dialects.chat import request as chat_request
from cortex.wire.errors import ApiError
from cortex.wire.request import (
    FormatKind,
    ImagePart,
    Message,
    Role,
    TextPart,
    ToolCall,
    ToolMode,
)

HELLO = [{"role": "user", "content": "hello"}]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def decode(**body: Any) -> chat_request.ChatCall:
    return chat_request.decode(orjson.dumps({"model": "m", "messages": HELLO} | body))


def test_a_plain_body_leaves_the_rest_to_the_model() -> None:
    call = decode()
    assert call.request.messages == (Message(Role.USER, "hello"),)
    assert call.request.sampling.temperature is None
    assert call.request.max_tokens is None
    assert (call.stream, call.include_usage) == (False, False)


def test_every_sampling_field_arrives() -> None:
    call = decode(
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=-0.3,
        logit_bias={"17": -100},
        seed=7,
        n=3,
        stop=["a", "b"],
        max_tokens=9,
        stream=True,
        stream_options={"include_usage": True},
    )
    sampling = call.request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 40, 0.1)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.1, 0.2, -0.3)
    assert (sampling.logit_bias, sampling.seed) == ({17: -100}, 7)
    assert (call.request.num_choices, call.request.stop, call.request.max_tokens) == (3, ("a", "b"), 9)
    assert (call.stream, call.include_usage) == (True, True)


def test_max_completion_tokens_goes_before_max_tokens() -> None:
    assert decode(max_tokens=1, max_completion_tokens=2).request.max_tokens == 2


def test_messages_of_every_kind() -> None:
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]},
        {"role": "user", "content": [{"type": "text", "text": "what is"}, _image("data:image/png;base64,AA==")]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "rain"}]},
        {"role": "assistant", "content": "wet", "reasoning_content": "it rains"},
    ]
    assert decode(messages=messages).request.messages == (
        Message(Role.SYSTEM, "be brief"),
        Message(Role.USER, (TextPart("what is"), ImagePart("data:image/png;base64,AA=="))),
        Message(Role.ASSISTANT, "", (ToolCall("c1", "weather", "{}"),)),
        Message(Role.TOOL, "rain", tool_call_id="c1"),
        Message(Role.ASSISTANT, "wet", reasoning="it rains"),
    )


def _image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def calls(*call_ids: str) -> dict[str, Any]:
    made = [{"id": call_id, "type": "function", "function": {"name": "f", "arguments": "{}"}} for call_id in call_ids]
    return {"role": "assistant", "content": None, "tool_calls": made}


def result(call_id: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": "x"}


@pytest.mark.parametrize(
    "messages",
    [
        [*HELLO, calls("a"), result("a")],
        [*HELLO, calls("a", "b"), result("b"), result("a")],
        [*HELLO, calls("a"), result("a"), calls("a"), result("a")],  # ids counted from zero in each message
        [*HELLO, calls("a", "b"), result("a"), *HELLO],  # interrupted before the other
        [*HELLO, calls("a"), *HELLO],
    ],
)
def test_a_result_answers_a_call(messages: list[dict[str, Any]]) -> None:
    decode(messages=messages)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([*HELLO, result("a")], "Invalid 'messages[1]': messages with role 'tool' must be a response"),
        ([*HELLO, calls("b"), result("a")], "Invalid 'messages[2]': messages with role 'tool' must be a response"),
        ([*HELLO, result("a"), calls("a")], "Invalid 'messages[1]': messages with role 'tool' must be a response"),
        ([*HELLO, calls("a"), result("a"), result("a")], "Invalid 'messages[3]': a second message of role 'tool'"),
    ],
)
def test_a_result_that_answers_nothing_is_refused(messages: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(ApiError) as caught:
        decode(messages=messages)
    assert (caught.value.status, caught.value.code) == (400, "tool_call_not_found")
    assert caught.value.message.startswith(words)


def test_tools_and_their_choice() -> None:
    assert decode(tools=[WEATHER]).request.tool_choice.mode is ToolMode.AUTO
    assert decode(tools=[WEATHER], tool_choice="required").request.tool_choice.mode is ToolMode.REQUIRED
    named = decode(tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "weather"}})
    assert (named.request.tool_choice.mode, named.request.tool_choice.name) == (ToolMode.NAMED, "weather")
    bare = decode(tools=[{"type": "function", "function": {"name": "f", "strict": None}}])
    assert bare.request.tools[0].parameters == {}


def test_tools_that_are_no_functions_are_left_out_and_never_fail() -> None:
    others = [{"type": "web_search"}, {"type": "mcp", "function": None}]
    call = decode(tools=[*others, WEATHER, {"function": {"name": "f"}}])
    assert [tool.name for tool in call.request.tools] == ["weather", "f"]
    assert call.ignored == ("tools[0].type=web_search", "tools[1].type=mcp")
    assert decode(tools=others).request.tools == ()


GRAMMAR = {"type": "grammar", "grammar": {"syntax": "lark", "definition": 'start: "a"'}}
PATCH = {"type": "custom", "custom": {"name": "patch", "description": "Edits.", "format": GRAMMAR}}


def test_a_custom_tool_is_a_function_with_one_string() -> None:
    call = decode(tools=[WEATHER, PATCH])
    assert call.custom == frozenset({"patch"})
    tool = call.request.tools[1]
    assert (tool.name, tool.parameters["required"]) == ("patch", ["input"])
    assert tool.description == 'Edits.\n\nThe input must match this lark grammar:\nstart: "a"'
    forced = decode(tools=[PATCH], tool_choice={"type": "custom", "custom": {"name": "patch"}}).request.tool_choice
    assert (forced.mode, forced.name) == (ToolMode.NAMED, "patch")
    made = {"id": "c", "type": "custom", "custom": {"name": "patch", "input": 'a "b"'}}
    messages = [{"role": "assistant", "tool_calls": [made]}, {"role": "tool", "tool_call_id": "c", "content": "ok"}]
    (call,) = decode(messages=messages, tools=[PATCH]).request.messages[0].tool_calls
    assert (call.name, orjson.loads(call.arguments)) == ("patch", {"input": 'a "b"'})


@pytest.mark.parametrize(("mode", "wanted"), [("auto", ToolMode.AUTO), ("required", ToolMode.REQUIRED)])
def test_allowed_tools_leave_some_of_those_offered(mode: str, wanted: ToolMode) -> None:
    named = [{"type": "function", "function": {"name": "f"}}, {"type": "custom", "custom": {"name": "patch"}}]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": named}}
    found = decode(tools=[WEATHER, PATCH, {"function": {"name": "f"}}], tool_choice=choice).request
    assert [tool.name for tool in found.tools] == ["patch", "f"]
    assert found.tool_choice.mode is wanted


@pytest.mark.parametrize(
    ("choice", "code"),
    [
        ({"type": "web_search"}, "unsupported_parameter"),
        ({"type": "function", "function": {"name": "gone"}}, "invalid_value"),
        ({"type": "custom", "custom": {"name": "gone"}}, "invalid_value"),
        ({"type": "custom"}, "missing_required_parameter"),
        ({"type": "allowed_tools"}, "missing_required_parameter"),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": []}}, "invalid_value"),
    ],
)
def test_a_choice_that_cannot_be_is_refused(choice: dict[str, Any], code: str) -> None:
    with pytest.raises(ApiError) as caught:
        decode(tools=[WEATHER], tool_choice=choice)
    assert caught.value.code == code


def test_reasoning_is_read_by_both_of_its_names() -> None:
    messages = [
        {"role": "assistant", "content": "a", "reasoning": "by the newer"},
        {"role": "assistant", "content": "b", "reasoning_content": "by the older", "reasoning": "by the older"},
        {"role": "assistant", "content": "c", "reasoning": {"text": "in an unknown form"}},
    ]
    found = [message.reasoning for message in decode(messages=messages).request.messages]
    assert found == ["by the newer", "by the older", None]


def test_formats() -> None:
    assert decode(response_format={"type": "json_object"}).request.output_format.kind is FormatKind.JSON_OBJECT
    schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}}
    found = decode(response_format=schema).request.output_format
    assert (found.kind, found.name, orjson.loads(found.source)) == (FormatKind.JSON_SCHEMA, "s", {"type": "object"})


@pytest.mark.parametrize("name", ["user", "metadata", "store", "service_tier", "prompt_cache_key", "never_heard_of"])
def test_fields_without_effect_pass(name: str) -> None:
    decode(**{name: None})


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"messages": []}, 400, "invalid_value", "messages"),
        ({"messages": "hi"}, 400, "invalid_type", "messages"),
        ({"messages": [{"content": "x"}]}, 400, "missing_required_parameter", "messages[0].role"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "invalid_type", "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, 400, "invalid_type", "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "invalid_value", "messages[0].tool_call_id"),
        ({"model": 3}, 400, "invalid_type", "model"),
        ({"temperature": "hot"}, 400, "invalid_type", "temperature"),
        ({"temperature": 3}, 400, "invalid_value", "temperature"),
        ({"top_p": -0.1}, 400, "invalid_value", "top_p"),
        ({"n": 0}, 400, "invalid_value", "n"),
        ({"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
        ({"max_completion_tokens": -5}, 400, "invalid_value", "max_completion_tokens"),
        ({"stop": ["a", ""]}, 400, "invalid_value", "stop"),
        ({"stop": ["x"] * 17}, 400, "invalid_value", "stop"),
        ({"logit_bias": {"cat": 1}}, 400, "invalid_value", "logit_bias"),
        ({"logit_bias": {"1": 101}}, 400, "invalid_value", "logit_bias"),
        ({"top_logprobs": 2}, 400, "invalid_value", "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "invalid_value", "top_logprobs"),
        ({"tool_choice": "required"}, 400, "invalid_value", "tool_choice"),
        ({"tool_choice": "required", "tools": [{"type": "web_search"}]}, 400, "invalid_value", "tool_choice"),
        ({"tools": [WEATHER, {"type": "function"}]}, 400, "missing_required_parameter", "tools[1].function"),
        ({"response_format": {"type": "poem"}}, 400, "invalid_value", "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, 400, "missing_required_parameter", "response_format.schema"),
        ({"reasoning_effort": "heroic"}, 400, "invalid_value", "reasoning_effort"),
        ({"thinking_budget": -1}, 400, "invalid_value", "thinking_budget"),
        ({"reasoning": {"max_tokens": -1}}, 400, "invalid_value", "reasoning.max_tokens"),
        ({"modalities": ["audio"]}, 400, "unsupported_parameter", "modalities"),
        ({"functions": []}, 400, "unsupported_parameter", "functions"),
        ({"prediction": {}}, 400, "unsupported_parameter", "prediction"),
        (
            {"messages": [{"role": "user", "content": [_image("file:///etc/passwd")]}]},
            400,
            "invalid_value",
            "messages[0].content[0].image_url",
        ),
    ],
)
def test_a_wrong_field_is_named(body: dict[str, Any], status: int, code: str, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        decode(**body)
    assert (caught.value.status, caught.value.code, caught.value.param) == (status, code, param)
    assert caught.value.message


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"text"', b"\xff", b'{"model": "m"', b"{}x"])
def test_what_is_not_a_json_object(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        chat_request.decode(body)
    assert caught.value.status == 400


def test_nan_is_not_a_temperature() -> None:
    with pytest.raises(ApiError):
        chat_request.decode(b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}')


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from(["model", "stream", *(f.name for f in msgspec.structs.fields(chat_request.ChatBody))])


@given(st.dictionaries(FIELDS, JSON, max_size=5))
def test_any_values_decode_or_are_refused(fields: dict[str, Any]) -> None:
    import json

    try:
        chat_request.decode(json.dumps({"model": "m", "messages": HELLO} | fields).encode("utf-8", "surrogatepass"))
    except ApiError as error:
        assert 400 <= error.status < 500


@pytest.mark.parametrize(
    ("body", "thinking", "effort", "budget"),
    [
        ({}, None, "", None),
        ({"reasoning_effort": "none"}, False, "", None),
        ({"reasoning_effort": "minimal", "thinking_budget": 9}, False, "", 9),
        ({"reasoning_effort": "low"}, True, "low", None),
        ({"reasoning": {"effort": "max", "max_tokens": 100}}, True, "max", 100),
        ({"reasoning": {"max_tokens": 100}, "thinking_budget": 0}, None, "", 0),
    ],
)
def test_effort_and_budget(body: dict[str, Any], thinking: bool | None, effort: str, budget: int | None) -> None:
    request = decode(**body).request
    assert (request.thinking, request.effort, request.thinking_budget) == (thinking, effort, budget)
