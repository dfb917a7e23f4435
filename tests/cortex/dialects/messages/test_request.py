"""Bodies of /v1/messages: what agents send, how they flatten into a chat, and the errors of wrong ones."""

import base64
from typing import Any

import orjson
import pytest

from cortex.dialects.messages import errors as anthropic_errors
from cortex.dialects.messages import request as messages_request
from cortex.wire.errors import ApiError
from cortex.wire.request import (
    FormatKind,
    ImagePart,
    InferenceRequest,
    Message,
    Role,
    TextPart,
    Tool,
    ToolCall,
    ToolChoice,
    ToolMode,
)

HI = {"role": "user", "content": "hi"}
TOOL = {"name": "f", "description": "d", "input_schema": {"type": "object"}}
BILLING = "x-anthropic-billing-header: cc_version=2.1.181; cc_entrypoint=cli; cch=1a2b3;"


def decode(**body: Any) -> InferenceRequest:
    return messages_request.decode(orjson.dumps({"model": "m", "max_tokens": 9, "messages": [HI]} | body)).request


def converted(*messages: dict[str, Any]) -> tuple[Message, ...]:
    return decode(messages=list(messages)).messages


def user(*blocks: dict[str, Any]) -> tuple[Message, ...]:
    """Return a user message converted, behind an assistant message with a call for each of its results."""
    calls = [
        {"type": "tool_use", "id": block["tool_use_id"], "name": "f", "input": {}}
        for block in blocks
        if block["type"] == "tool_result"
    ]
    before = [{"role": "assistant", "content": calls}] if calls else []
    return converted(*before, {"role": "user", "content": list(blocks)})[len(before) :]


def refused(body: bytes | dict[str, Any]) -> ApiError:
    whole = body if isinstance(body, bytes) else orjson.dumps({"model": "m", "max_tokens": 9, "messages": [HI]} | body)
    with pytest.raises(ApiError) as caught:
        messages_request.decode(whole)
    return caught.value


def text(content: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": content, **more}


def test_a_plain_request() -> None:
    call = messages_request.decode(b'{"model":"m","max_tokens":9,"messages":[{"role":"user","content":"hi"}]}')
    assert not call.stream
    assert call.request == InferenceRequest("m", (Message(Role.USER, "hi"),), max_tokens=9, thinking=False)


def test_as_claude_code_sends_it() -> None:
    ephemeral = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    body = {
        "model": "claude-x",
        "max_tokens": 32000,
        "stream": True,
        "temperature": 1,
        "system": [text(BILLING), text("You are an agent.", **ephemeral), text("Rules.", **ephemeral)],
        "messages": [
            {"role": "user", "content": [text("<reminder>"), text("list files", **ephemeral)]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "use ls", "signature": "any"},
                    {"type": "redacted_thinking", "data": "x"},
                    text("Looking."),
                    {
                        "type": "tool_use",
                        "id": "t1",
                        "name": "Bash",
                        "input": {"c": "ls"},
                        "caller": {"type": "direct"},
                    },
                    {"type": "tool_use", "id": "t2", "name": "Read", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    text("and"),
                    {"type": "tool_result", "tool_use_id": "t1", "content": [text("a"), text("b")], **ephemeral},
                    {"type": "tool_result", "tool_use_id": "t2", "content": "no such file", "is_error": True},
                    text(" go on"),
                ],
            },
            {"role": "system", "content": [text("Be brief.")]},
        ],
        "tools": [
            TOOL | {"strict": True, "defer_loading": True, "eager_input_streaming": True} | ephemeral,
            {"type": "custom", "name": "g", "input_schema": {"type": "object"}},
            {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
            {"type": "mcp_toolset", "mcp_server_name": "s"},
        ],
        "tool_choice": {"type": "auto"},
        "metadata": {"user_id": '{"device_id":"d","session_id":"s"}'},
        "thinking": {"type": "adaptive", "budget_tokens": 0, "display": "omitted"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
        "betas": ["x"],
        "something_new": {"a": [1]},
    }
    call = messages_request.decode(orjson.dumps(body))
    assert call.stream
    assert call.request.messages == (
        Message(Role.SYSTEM, "You are an agent."),
        Message(Role.SYSTEM, "Rules."),
        Message(Role.USER, "<reminder>list files"),
        Message(
            Role.ASSISTANT,
            "Looking.",
            (ToolCall("t1", "Bash", '{"c":"ls"}'), ToolCall("t2", "Read", "{}")),
            reasoning="use ls",
        ),
        Message(Role.TOOL, "ab", tool_call_id="t1"),
        Message(Role.TOOL, "Error: no such file", tool_call_id="t2"),
        Message(Role.USER, "and go on"),
        Message(Role.SYSTEM, "Be brief."),
    )
    assert call.request.tools == (Tool("f", "d", {"type": "object"}, True), Tool("g", "", {"type": "object"}))
    assert call.request.tool_choice == ToolChoice()
    assert (call.request.max_tokens, call.request.thinking) == (32000, None)


@pytest.mark.parametrize("system", [BILLING, f"{BILLING}\n", [text(BILLING)], [], "", None])
def test_a_billing_header_is_no_system_prompt(system: Any) -> None:
    assert decode(system=system).messages == (Message(Role.USER, "hi"),)


def test_text_after_a_billing_header_is_kept() -> None:
    assert decode(system=f"{BILLING}\nBe kind.").messages[0] == Message(Role.SYSTEM, "Be kind.")


class TestUserBlocks:
    def test_a_result_alone_leaves_no_user_message(self) -> None:
        assert user({"type": "tool_result", "tool_use_id": "t"}) == (Message(Role.TOOL, "", tool_call_id="t"),)

    def test_an_empty_message_is_kept(self) -> None:
        assert user() == (Message(Role.USER, ""),)

    def test_images_keep_their_place(self) -> None:
        address = "https://example.org/a.png"
        found = user(
            text("see "),
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}},
            {"type": "image", "source": {"type": "url", "url": address}},
        )
        parts = (TextPart("see "), ImagePart("data:image/png;base64,AAAA"), ImagePart(address))
        assert found == (Message(Role.USER, parts),)

    def test_an_image_within_a_result(self) -> None:
        image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
        (found,) = user({"type": "tool_result", "tool_use_id": "t", "content": [text("shot"), image]})
        assert found.content == (TextPart("shot"), ImagePart("data:image/png;base64,AAAA"))

    @pytest.mark.parametrize(
        "source",
        [
            {"type": "text", "media_type": "text/plain", "data": "words"},
            {"type": "base64", "media_type": "text/plain", "data": base64.b64encode(b"words").decode()},
            {"type": "content", "content": "words"},
            {"type": "content", "content": [text("wo"), text("rds")]},
        ],
    )
    def test_documents_are_text(self, source: dict[str, Any]) -> None:
        assert user({"type": "document", "title": "T", "source": source}) == (Message(Role.USER, "T\nwords"),)

    def test_search_results_and_tool_references(self) -> None:
        result = {"type": "search_result", "title": "T", "source": "https://a", "content": [text("one")]}
        reference = {"type": "tool_reference", "tool_name": "f"}
        found = user(result, {"type": "tool_result", "tool_use_id": "t", "content": [reference]})
        assert found == (Message(Role.TOOL, "f", tool_call_id="t"), Message(Role.USER, "T\none"))

    def test_a_result_with_error_in_its_text_is_unchanged(self) -> None:
        (found,) = user({"type": "tool_result", "tool_use_id": "t", "content": "<error>x</error>", "is_error": True})
        assert found.content == "<error>x</error>"


@pytest.mark.parametrize("thread", [{"type": "create"}, {"type": "continue", "previous_message_id": "msg_1"}, 3])
def test_a_thread_is_refused_as_its_clients_understand(thread: Any) -> None:
    error = refused({"thread": thread, "messages": [result("a")]})
    body = orjson.loads(anthropic_errors.error_body(error.info()))
    assert error.status == 400
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["details"] == {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}


@pytest.mark.parametrize("thread", [None, False])
def test_no_thread_is_none(thread: Any) -> None:
    assert decode(thread=thread).messages == (Message(Role.USER, "hi"),)


def use(call_id: str) -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id, "name": "f", "input": {}}


def result(*call_ids: str) -> dict[str, Any]:
    blocks = [{"type": "tool_result", "tool_use_id": call_id, "content": "x"} for call_id in call_ids]
    return {"role": "user", "content": blocks}


def called(*call_ids: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [text("so"), *map(use, call_ids)]}


@pytest.mark.parametrize(
    "messages",
    [
        [HI, called("a"), result("a")],
        [HI, called("a", "b"), result("b", "a")],
        [HI, called("a", "b"), result("a")],  # interrupted before the other
        [HI, called("a"), result("a"), called("a"), result("a")],  # ids counted from zero in each message
        [HI, called("a"), result("a"), HI, called("b")],
        [HI, called("a"), called("b"), result("a", "b")],  # messages of one role are one
        [HI, called("a", "b"), result("a"), result("b")],
        [HI, called("a"), {"role": "system", "content": "s"}, result("a")],
        [HI, called("a"), HI],  # interrupted before any
    ],
)
def test_a_result_answers_a_call_of_the_message_before_it(messages: list[dict[str, Any]]) -> None:
    converted(*messages)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([result("a")], "messages.0.content.0: unexpected `tool_use_id`"),
        ([HI, called("b"), result("a")], "messages.2.content.0: unexpected `tool_use_id`"),
        ([HI, called("a"), result("a", "a")], "messages.2.content.1: each tool_use must have a single result"),
        ([HI, called("a"), result("a"), called("b"), result("a")], "messages.4.content.0: unexpected"),
        ([HI, called("a"), HI, {"role": "assistant", "content": "x"}, result("a")], "messages.4.content.0: unexpected"),
        ([HI, {"role": "user", "content": [use("a")]}, result("a")], "has no meaning here"),
    ],
)
def test_a_result_that_answers_nothing_is_refused(messages: list[dict[str, Any]], words: str) -> None:
    error = refused({"messages": messages})
    assert error.status == 400
    assert words in error.message


def test_traces_of_hosted_tools_drop() -> None:
    trace = {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "x"}}
    result = {"type": "web_search_tool_result", "tool_use_id": "s", "content": {"type": "error", "error_code": "x"}}
    assert converted(HI, {"role": "assistant", "content": [trace, result, text("so")]})[1].content == "so"


@pytest.mark.parametrize(
    ("asked", "choice"),
    [
        ({"type": "auto", "disable_parallel_tool_use": True}, ToolChoice(parallel=False)),
        ({"type": "any"}, ToolChoice(ToolMode.REQUIRED)),
        ({"type": "any", "disable_parallel_tool_use": True}, ToolChoice(ToolMode.REQUIRED, parallel=False)),
        ({"type": "tool", "name": "f"}, ToolChoice(ToolMode.NAMED, "f")),
        ({"type": "none"}, ToolChoice(ToolMode.NONE)),
    ],
)
def test_tool_choice(asked: dict[str, Any], choice: ToolChoice) -> None:
    assert decode(tools=[TOOL], tool_choice=asked).tool_choice == choice


@pytest.mark.parametrize(
    ("asked", "thinking", "budget"),
    [
        (None, False, None),
        ({"type": "disabled", "budget_tokens": 500}, False, None),
        ({"type": "enabled", "budget_tokens": 500}, True, 500),
        ({"type": "enabled"}, True, None),
        ({"type": "adaptive", "budget_tokens": 0}, None, None),
    ],
)
def test_thinking(asked: dict[str, Any] | None, thinking: bool | None, budget: int | None) -> None:
    request = decode(thinking=asked, output_config={"effort": "high"})
    assert (request.thinking, request.thinking_budget) == (thinking, budget)
    assert request.effort == ("" if thinking is False else "high")


def test_sampling_and_stops() -> None:
    request = decode(temperature=0.5, top_p=0.9, top_k=40, stop_sequences=["a", "</block>"])
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.top_k) == (0.5, 0.9, 40)
    assert request.stop == ("a", "</block>")


@pytest.mark.parametrize("field", ["output_config", "output_format"])
def test_a_schema_for_the_answer(field: str) -> None:
    asked = {"type": "json_schema", "schema": {"type": "object"}}
    found = decode(**{field: {"format": asked} if field == "output_config" else asked}).output_format
    assert (found.kind, found.source) == (FormatKind.JSON_SCHEMA, '{"type":"object"}')


def test_no_limit_leaves_it_to_the_context() -> None:
    assert decode(max_tokens=None).max_tokens is None


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b"{", "invalid_json", None),
        (b"[]", "invalid_json", None),
        (b'{"model":"\xff","messages":[]}', "invalid_json", None),
        (b'{"messages":[]}', "missing_required_parameter", "model"),
        (b'{"model":"m"}', "missing_required_parameter", "messages"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": [{"role": "tool", "content": ""}]}, "invalid_type", "messages[0].role"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"temperature": 3}, "invalid_value", "temperature"),
        ({"temperature": "hot"}, "invalid_type", "temperature"),
        ({"stop_sequences": [""]}, "invalid_value", "stop_sequences"),
        ({"tools": [{"input_schema": {}}]}, "missing_required_parameter", "tools[0].name"),
        ({"tool_choice": {"type": "any"}}, "invalid_value", "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}}, "invalid_value", "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "missing_required_parameter", "tool_choice.name"),
        ({"thinking": {"type": "often"}}, "invalid_type", "thinking.type"),
        ({"thinking": {"type": "enabled", "budget_tokens": -1}}, "invalid_value", "thinking.budget_tokens"),
        ({"output_config": {"effort": "heroic"}}, "invalid_value", "output_config.effort"),
        ({"output_config": {"format": {"type": "xml"}}}, "invalid_value", "output_config.format.type"),
        ({"system": [{"type": "image"}]}, "invalid_type", "system[0]"),
    ],
)
def test_a_wrong_field_is_named(body: bytes | dict[str, Any], code: str, param: str | None) -> None:
    error = refused(body)
    assert (error.code, error.param) == (code, param)


@pytest.mark.parametrize(
    ("block", "code", "param"),
    [
        ({"type": "hologram"}, "invalid_type", ""),
        ({"type": "text"}, "missing_required_parameter", ".text"),
        ({"type": "tool_result"}, "missing_required_parameter", ".tool_use_id"),
        ({"type": "tool_result", "tool_use_id": "t", "content": {}}, "invalid_type", ".content"),
        ({"type": "image"}, "missing_required_parameter", ".source"),
        ({"type": "image", "source": "x"}, "invalid_type", ".source"),
        ({"type": "image", "source": {"type": "file", "file_id": "f"}}, "unsupported_parameter", ".source.type=file"),
        ({"type": "image", "source": {"type": "url", "url": "file:///etc/passwd"}}, "invalid_value", ".source"),
        (
            {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": ""}},
            "unsupported_parameter",
            ".source.type=application/pdf",
        ),
        (
            {"type": "document", "source": {"type": "base64", "media_type": "text/plain", "data": "!"}},
            "invalid_value",
            ".source.data",
        ),
    ],
)
def test_a_wrong_block_is_named(block: dict[str, Any], code: str, param: str) -> None:
    error = refused({"messages": [HI, {"role": "user", "content": [text("a"), block]}]})
    assert (error.code, error.param) == (code, f"messages[1].content[1]{param}")


# ------------------------------------------------------------------ tools that clients run


def called(**body: Any) -> messages_request.MessagesCall:
    return messages_request.decode(orjson.dumps({"model": "m", "max_tokens": 9, "messages": [HI]} | body))


@pytest.mark.parametrize(
    ("type", "name", "needed", "known"),
    [
        ("bash_20241022", "bash", [], {"command", "restart"}),
        ("bash_20250124", "bash", [], {"command", "restart"}),
        ("bash_20990101", "bash", [], {"command", "restart"}),
        ("text_editor_20241022", "str_replace_editor", ["command", "path"], {"old_str", "new_str", "insert_line"}),
        ("text_editor_20250124", "str_replace_editor", ["command", "path"], {"file_text", "view_range"}),
        ("text_editor_20250429", "str_replace_based_edit_tool", ["command", "path"], {"new_str"}),
        ("text_editor_20250728", "str_replace_based_edit_tool", ["command", "path"], {"insert_text"}),
        ("memory_20250818", "memory", ["command"], {"old_path", "new_path", "insert_text", "file_text"}),
        ("computer_20241022", "computer", ["action"], {"coordinate", "text"}),
        ("computer_20250124", "computer", ["action"], {"scroll_direction", "scroll_amount", "duration"}),
        ("computer_20251124", "computer", ["action"], {"region"}),
    ],
)
def test_a_dated_tool_has_its_published_schema(type: str, name: str, needed: list[str], known: set[str]) -> None:
    asked = {"tools": [{"type": type, "name": name}], "tool_choice": {"type": "tool", "name": name}}
    call = called(**asked)
    (tool,) = call.request.tools
    assert (tool.name, tool.parameters["required"], call.ignored) == (name, needed, ())
    assert known <= set(tool.parameters["properties"])
    assert tool.description
    assert (call.request.tool_choice.mode, call.request.tool_choice.name) == (ToolMode.NAMED, name)


def test_an_editors_commands_match_its_date() -> None:
    def commands(type: str) -> list[str]:
        found: list[str] = (
            called(tools=[{"type": type, "name": "e"}]).request.tools[0].parameters["properties"]["command"]["enum"]
        )
        return found

    assert "undo_edit" in commands("text_editor_20250124")
    assert "undo_edit" not in commands("text_editor_20250728")


def test_a_computer_has_the_size_of_its_screen() -> None:
    screen = {"type": "computer_20250124", "name": "computer", "display_width_px": 1024, "display_height_px": 768}
    assert "1024 pixels wide and 768 high" in called(tools=[screen]).request.tools[0].description


def test_tools_that_cannot_run_here_are_named() -> None:
    hosted = [{"type": "web_search_20250305", "name": "web_search"}, {"type": "code_execution_20250825", "name": "x"}]
    call = called(tools=[*hosted, {"name": "f", "input_schema": {}}])
    assert [tool.name for tool in call.request.tools] == ["f"]
    assert call.ignored == ("tools[0].type=web_search_20250305", "tools[1].type=code_execution_20250825")
    with pytest.raises(ApiError, match="no tool named 'web_search'"):
        decode(tools=hosted, tool_choice={"type": "tool", "name": "web_search"})
