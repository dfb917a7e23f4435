"""A whole body of each dialect, every field of it, and what must hold of whatever such a body is changed into."""

import copy
import json
import random
from collections.abc import Callable
from typing import Any

import msgspec
import orjson

from cortex.dialects.chat import request as chat_request
from cortex.dialects.completions import request as completions_request
from cortex.dialects.messages import request as messages_request
from cortex.dialects.responses import request as responses_request
from cortex.dialects.responses.sealed import seal
from cortex.dialects.translate import chat_body
from cortex.wire.errors import ApiError
from cortex.wire.request import FormatKind

DECODERS: dict[str, Callable[[bytes], Any]] = {
    "chat": chat_request.decode,
    "responses": responses_request.decode,
    "messages": messages_request.decode,
    "completions": completions_request.decode,
}
SCHEMA = {"type": "object", "properties": {"x": {"type": "string"}}}
IMAGE = "data:image/png;base64,AAAA"

WHOLE: dict[str, list[dict[str, Any]]] = {
    "chat": [
        {
            "model": "m",
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": [{"type": "text", "text": "t"},
                                             {"type": "image_url", "image_url": {"url": IMAGE}}]},
                {"role": "assistant", "content": None, "reasoning_content": "r",
                 "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
                {"role": "tool", "tool_call_id": "c", "content": "x"},
            ],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMA, "strict": True}}],
            "tool_choice": {"type": "function", "function": {"name": "f"}}, "stream": True,
            "stream_options": {"include_usage": True}, "temperature": 1, "logit_bias": {"1": 2}, "stop": ["a"], "n": 2,
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
            "logprobs": True, "top_logprobs": 2, "seed": 1, "max_tokens": 5, "reasoning_effort": "low",
        }
    ],
    "responses": [
        {
            "model": "m", "instructions": "i",
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "t"},
                                             {"type": "input_image", "image_url": IMAGE}]},
                {"type": "reasoning", "id": "rs", "summary": [{"type": "summary_text", "text": "t"}],
                 "encrypted_content": seal("t")},
                {"type": "function_call", "call_id": "c", "name": "f", "namespace": "n", "arguments": "{}"},
                {"type": "custom_tool_call", "call_id": "d", "name": "p", "input": "x"},
                {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "t"}]},
                {"type": "custom_tool_call_output", "call_id": "d", "output": "x"},
            ],
            "tools": [{"type": "function", "name": "f", "parameters": SCHEMA},
                      {"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "f"}]},
                      {"type": "custom", "name": "p", "format": {"type": "grammar", "definition": "x"}},
                      {"type": "web_search"}],
            "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
            "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}, "verbosity": "low"},
            "reasoning": {"effort": "low", "summary": "auto"}, "include": ["reasoning.encrypted_content"],
            "truncation": "auto", "max_output_tokens": 4, "metadata": {"a": "b"}, "top_logprobs": 1,
        }
    ],
    "messages": [
        {
            "model": "m", "max_tokens": 5, "system": [{"type": "text", "text": "s"}],
            "messages": [
                {"role": "user", "content": [
                    {"type": "text", "text": "t"},
                    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA"}},
                    {"type": "document", "title": "T", "source": {"type": "text", "data": "x"}},
                    {"type": "document", "source": {"type": "base64", "media_type": "text/plain", "data": "aGk="}},
                    {"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "t"}]}},
                    {"type": "search_result", "source": "s", "title": "t", "content": [{"type": "text", "text": "t"}]},
                ]},
                {"role": "assistant", "content": [
                    {"type": "thinking", "thinking": "t", "signature": "s"},
                    {"type": "server_tool_use", "id": "s", "name": "n", "input": {}},
                    {"type": "tool_use", "id": "c", "name": "f", "input": {"x": [1]}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "is_error": True,
                                              "content": [{"type": "tool_reference", "tool_name": "f"}]}]},
                {"role": "system", "content": "s"},
            ],
            "tools": [{"name": "f", "input_schema": SCHEMA}, {"type": "web_search_20250305", "name": "w"}],
            "tool_choice": {"type": "tool", "name": "f"}, "stop_sequences": ["a"], "temperature": 1, "top_k": 3,
            "thinking": {"type": "enabled", "budget_tokens": 9}, "stream": True,
            "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
        }
    ],
    "completions": [
        {"model": "m", "prompt": ["t"], "max_tokens": 5, "n": 2, "stop": "x", "logit_bias": {"1": 1}, "stream": True}
    ],
}  # fmt: skip

ODD: list[Any] = [
    None, True, False, 0, -1, 2, 1 << 70, 1e999, 0.5, "", "x", "auto", "none", "message", "\ud800", [], {}, [None],
    [[]], {"type": None}, {"type": "x"}, {"a": {"b": [1]}},
]  # fmt: skip
PIECES = [b"\\ud800", b"\\u0000", b"1e999", b"NaN", b"[" * 2000, b"\xff", b'"', b"}", b",", b""]


def check(dialect: str, body: bytes) -> None:
    """Decode a body: it is a request, which can be written as a chat, or an error with a status and a name."""
    try:
        call = DECODERS[dialect](body)
    except ApiError as error:
        assert 400 <= error.status < 500
        msgspec.json.encode(error.info())
        return
    # An accepted body can be forwarded and logged: its text is valid.
    msgspec.json.encode(call.request)
    if dialect == "responses":
        orjson.loads(call.echo)
    if dialect != "completions" and call.request.output_format.kind is not FormatKind.JSON_SCHEMA:
        chat_request.decode(chat_body(call.request, stream=True))


def mutated(chance: random.Random) -> tuple[str, bytes]:
    """Return a dialect, and its whole body with a few things replaced, taken away or doubled, and at times broken."""
    dialect = chance.choice(list(WHOLE))
    body = orjson.loads(orjson.dumps(chance.choice(WHOLE[dialect])))
    for _ in range(chance.choice([0, 1, 1, 2, 4])):
        parent, key = _place(body, chance)
        match chance.randrange(4):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, list):
                parent.append(copy.deepcopy(parent[key]))
            case _:
                parent[key] = copy.deepcopy(chance.choice(ODD))
    text = json.dumps(body).encode("utf-8", "surrogatepass")
    if chance.randrange(4) == 0:
        at = chance.randrange(len(text) + 1)
        text = text[:at] + chance.choice(PIECES) + text[at + chance.randrange(3) :]
    return dialect, text


def _place(value: Any, chance: random.Random) -> tuple[Any, Any]:
    """Return a container within a body, and the key of something in it."""
    while True:
        key = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
        inner = value[key]
        if not isinstance(inner, dict | list) or not inner or chance.randrange(3) == 0:
            return value, key
        value = inner
