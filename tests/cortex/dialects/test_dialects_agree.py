"""A conversation is the same request in every dialect, and no body, however broken, is anything but a typed error."""

import copy
from typing import Any

import msgspec
import orjson
import pytest
from bodies import DECODERS, IMAGE, SCHEMA, WHOLE, check
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cortex.dialects.responses.sealed import seal
from cortex.wire.request import ImagePart, InferenceRequest, Message, Role

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(lambda text: text.strip())
NAME = st.sampled_from(["read", "write", "run"])
ARGUMENTS = st.dictionaries(TEXT, TEXT | st.integers(-9, 9) | st.booleans() | st.none(), max_size=2)


def compact(value: Any) -> str:
    return msgspec.json.encode(value).decode()


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Messages without a dialect: a user's text, an assistant's reasoning, text and calls, and the results of tools."""
    conversation: list[dict[str, Any]] = []
    num_calls = 0
    for _ in range(draw(st.integers(1, 4))):
        content = draw(st.lists(TEXT | st.just(ImagePart(IMAGE)), min_size=1, max_size=3))
        conversation.append({"role": "user", "content": content})
        for _ in range(draw(st.integers(0, 2))):
            calls = []
            for _ in range(draw(st.integers(0, 2))):
                num_calls += 1
                calls.append((f"call_{num_calls}", draw(NAME), draw(ARGUMENTS), draw(TEXT)))
            text = draw(st.none() | TEXT) if calls else draw(TEXT)
            conversation.append(
                {"role": "assistant", "thought": draw(st.none() | TEXT), "content": text, "calls": calls}
            )
            if not calls:
                break
    return conversation


def as_chat(conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for entry in conversation:
        if entry["role"] == "user":
            parts = [
                {"type": "image_url", "image_url": {"url": part.url}}
                if isinstance(part, ImagePart)
                else {"type": "text", "text": part}
                for part in entry["content"]
            ]
            messages.append({"role": "user", "content": parts})
            continue
        message = {"role": "assistant", "content": entry["content"], "reasoning_content": entry["thought"]}
        if entry["calls"]:
            message["tool_calls"] = [
                {"id": id, "type": "function", "function": {"name": name, "arguments": compact(arguments)}}
                for id, name, arguments, _ in entry["calls"]
            ]
        messages.append(message)
        messages += [{"role": "tool", "tool_call_id": id, "content": result} for id, _, _, result in entry["calls"]]
    return messages


def as_responses(conversation: list[dict[str, Any]], sealed: bool) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    for entry in conversation:
        if entry["role"] == "user":
            parts = [
                {"type": "input_image", "image_url": part.url}
                if isinstance(part, ImagePart)
                else {"type": "input_text", "text": part}
                for part in entry["content"]
            ]
            items.append({"role": "user", "content": parts})
            continue
        if entry["thought"] is not None:
            content = {"encrypted_content": seal(entry["thought"])} if sealed else {
                "content": [{"type": "reasoning_text", "text": entry["thought"]}]
            }  # fmt: skip
            items.append({"type": "reasoning", "summary": [], **content})
        if entry["content"] is not None:
            items.append({"role": "assistant", "content": [{"type": "output_text", "text": entry["content"]}]})
        for id, name, arguments, _ in entry["calls"]:
            call = {"type": "function_call", "call_id": id, "name": name, "arguments": compact(arguments)}
            items.append(call)
        items += [{"type": "function_call_output", "call_id": id, "output": out} for id, _, _, out in entry["calls"]]
    return items


def as_messages(conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for entry in conversation:
        if entry["role"] == "user":
            source = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
            blocks: list[Any] = [
                {"type": "image", "source": source} if isinstance(part, ImagePart) else {"type": "text", "text": part}
                for part in entry["content"]
            ]
            if (
                messages and messages[-1]["content"][-1]["type"] == "tool_result"
            ):  # the results of tools: one message of both, as clients send
                messages[-1]["content"] += blocks
            else:
                messages.append({"role": "user", "content": blocks})
            continue
        blocks = []
        if entry["thought"] is not None:
            blocks.append({"type": "thinking", "thinking": entry["thought"], "signature": "x"})
        if entry["content"] is not None:
            blocks.append({"type": "text", "text": entry["content"]})
        for id, name, arguments, _ in entry["calls"]:
            blocks.append({"type": "tool_use", "id": id, "name": name, "input": arguments})
        messages.append({"role": "assistant", "content": blocks})
        results = [{"type": "tool_result", "tool_use_id": id, "content": out} for id, _, _, out in entry["calls"]]
        if results:
            messages.append({"role": "user", "content": results})
    return messages


@given(conversations(), TEXT, st.booleans())
def test_a_conversation_is_the_same_request_in_every_dialect(
    conversation: list[dict[str, Any]], system: str, sealed: bool
) -> None:
    tools = [{"name": name, "description": "d", "parameters": SCHEMA} for name in ("read", "write", "run")]
    common = {"model": "m", "temperature": 0.5, "top_p": 0.25}
    found: dict[str, InferenceRequest] = {}
    chat = {
        **common,
        "messages": [{"role": "developer", "content": system}, *as_chat(conversation)],
        "tools": [{"type": "function", "function": tool} for tool in tools],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_completion_tokens": 99,
        "reasoning_effort": "high",
    }
    responses = {
        **common,
        "instructions": system,
        "input": as_responses(conversation, sealed),
        "tools": [{"type": "function", **tool} for tool in tools],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_output_tokens": 99,
        "reasoning": {"effort": "high"},
    }
    messages = {
        **common,
        "system": [{"type": "text", "text": system, "cache_control": {"type": "ephemeral"}}],
        "messages": as_messages(conversation),
        "tools": [{"name": t["name"], "description": "d", "input_schema": SCHEMA} for t in tools],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        "max_tokens": 99,
        "thinking": {"type": "enabled"},
        "output_config": {"effort": "high"},
    }
    for name, body in (("chat", chat), ("responses", responses), ("messages", messages)):
        found[name] = DECODERS[name](orjson.dumps(body)).request
    assert found["responses"] == found["chat"]
    assert found["messages"] == found["chat"]
    assert found["chat"].messages[0] == Message(Role.SYSTEM, system)


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.integers(1 << 60, 1 << 70),
    st.floats(),
    st.text(max_size=4),
    st.sampled_from([[], {}, [None], [[]], {"type": None}, {"type": "x"}, "auto", "none", "message"]),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of everything within a document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in inner for place in places(part, (*path, key)))]


@st.composite
def mutated(draw: st.DrawFn, dialect: str) -> bytes:
    """A body in which something is replaced, taken away or doubled, a few times; then perhaps a byte of it too."""
    body = orjson.loads(orjson.dumps(draw(st.sampled_from(WHOLE[dialect]))))
    for _ in range(draw(st.integers(0, 3))):
        path = draw(st.sampled_from(places(body)))
        if not path:
            continue
        parent = body
        for key in path[:-1]:
            parent = parent[key]
        match draw(st.sampled_from(["replace", "remove", "double"])):
            case "replace":
                parent[path[-1]] = copy.deepcopy(draw(ODD))
            case "remove":
                del parent[path[-1]]
            case "double" if isinstance(parent, list):
                parent.append(copy.deepcopy(parent[path[-1]]))
    text = msgspec.json.encode(body)
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(text)))
        piece = draw(st.binary(max_size=2) | st.sampled_from([b"\\ud800", b"\\u0000", b"1e999", b"NaN", b"[" * 2000]))
        text = text[:at] + piece + text[at + draw(st.integers(0, 2)) :]
    return text


@pytest.mark.parametrize("dialect", list(WHOLE))
def test_the_whole_bodies_decode(dialect: str) -> None:
    for body in WHOLE[dialect]:
        assert DECODERS[dialect](orjson.dumps(body)).request.model == "m"


@settings(max_examples=400)
@given(st.data())
@pytest.mark.parametrize("dialect", list(WHOLE))
def test_no_body_is_anything_but_a_request_or_a_typed_error(dialect: str, data: st.DataObject) -> None:
    check(dialect, data.draw(mutated(dialect)))


@given(st.sampled_from(list(WHOLE)), st.binary(max_size=40))
@example("chat", b"[" * 100_000)
@example("responses", b'{"model":"m","input":' + b"[" * 100_000)
@example("messages", b'{"a":' * 100_000)
def test_no_bytes_are(dialect: str, body: bytes) -> None:
    check(dialect, body)
