"""OpenAPI description of a daemon, generated from the types that it decodes.

A daemon lists its operations; request bodies are the structs of the dialects, so that the description matches the
decoder. Responses that are encoded by hand are described by the members that clients rely on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from cortex.dialects import anthropic_messages, openai_chat, openai_completions, openai_embeddings, openai_responses
from cortex.dialects.passthrough import (
    CHAT,
    COMPACT,
    COMPLETIONS,
    COUNT_TOKENS,
    EMBEDDINGS,
    INPUT_TOKENS,
    MESSAGES,
    RESPONSES,
)

PATH = "/openapi.json"

Schema = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Operation:
    """A method of a path. Path parameters are in braces; ``query`` maps query parameters to schemas."""

    method: str
    path: str
    summary: str
    answer: Any
    """A type or a schema; ``None`` for text."""
    body: Any = None
    streams: bool = False
    query: Mapping[str, Schema] = field(default_factory=dict)


def document(title: str, version: str, operations: Sequence[Operation]) -> bytes:
    """Return the description as JSON."""
    types = [kind for one in operations for kind in (one.body, one.answer) if isinstance(kind, type)]
    schemas, components = msgspec.json.schema_components(
        types, schema_hook=_anything, ref_template="#/components/schemas/{name}"
    )
    by_type = dict(zip(types, schemas, strict=True))
    paths: dict[str, Schema] = {}
    for one in operations:
        paths.setdefault(one.path, {})[one.method.lower()] = _operation(one, by_type)
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {"title": title, "version": version},
            "paths": paths,
            "components": {"schemas": {**components, "Error": _ERROR, "AnthropicError": _ANTHROPIC_ERROR}},
        }
    )


def _operation(one: Operation, by_type: Mapping[type, Schema]) -> Schema:
    def schema(kind: Any) -> Schema:
        found: Schema = by_type[kind] if isinstance(kind, type) else kind
        return found

    if one.answer is None:
        content: Schema = {"text/plain": {"schema": {"type": "string"}}}
    else:
        content = {"application/json": {"schema": schema(one.answer)}}
    if one.streams:
        content["text/event-stream"] = {}  # 3.1 has no schema for what comes event by event
    is_anthropic = one.path == MESSAGES.path or one.path.startswith(f"{MESSAGES.path}/")
    error_name = "AnthropicError" if is_anthropic else "Error"
    error = {
        "description": "An error, in the words of the path's dialect.",
        "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{error_name}"}}},
    }
    operation: Schema = {
        "summary": one.summary,
        "responses": {"200": {"description": "The answer.", "content": content}, "4XX": error, "5XX": error},
    }
    names = [part[1:-1] for part in one.path.split("/") if part.startswith("{")]
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}} for name in names
    ]
    parameters += [{"name": name, "in": "query", "schema": value} for name, value in one.query.items()]
    if parameters:
        operation["parameters"] = parameters
    if one.body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema(one.body)}}}
    return operation


def _anything(kind: type) -> Schema:
    """Return the schema of a raw value."""
    if kind in (object, msgspec.Raw):
        return {"description": "JSON of any kind; what it must be depends on what stands beside it."}
    raise NotImplementedError


def object_with(**fields: Schema) -> Schema:
    """Return the schema of an object with at least these members."""
    return {"type": "object", "required": list(fields), "properties": fields}


TEXT: Schema = {"type": "string"}
TEXT_OR_NULL: Schema = {"type": ["string", "null"]}
COUNT: Schema = {"type": "integer", "minimum": 0}
LIST: Schema = {"type": "array"}
OBJECT: Schema = {"type": "object"}

_ERROR = object_with(error=object_with(message=TEXT, type=TEXT, param=TEXT_OR_NULL, code=TEXT_OR_NULL))
_ANTHROPIC_ERROR = object_with(type={"const": "error"}, error=object_with(type=TEXT, message=TEXT), request_id=TEXT)
CHAT_ANSWER = object_with(
    id=TEXT, object={"const": "chat.completion"}, created=COUNT, model=TEXT, choices=LIST, usage=OBJECT
)
COMPLETION_ANSWER = object_with(
    id=TEXT, object={"const": "text_completion"}, created=COUNT, model=TEXT, choices=LIST, usage=OBJECT
)
EMBEDDINGS_ANSWER = object_with(object={"const": "list"}, data=LIST, model=TEXT, usage=OBJECT)
RESPONSE_ANSWER = object_with(
    id=TEXT, object={"const": "response"}, created_at={"type": "number"}, model=TEXT, status=TEXT, output=LIST,
    parallel_tool_calls={"type": "boolean"}, tool_choice={}, tools=LIST,
)  # fmt: skip
MESSAGE_ANSWER = object_with(
    id=TEXT, type={"const": "message"}, role={"const": "assistant"}, model=TEXT, content=LIST, usage=OBJECT,
    stop_reason=TEXT_OR_NULL, stop_sequence=TEXT_OR_NULL,
)  # fmt: skip
COMPACTION_ANSWER = object_with(
    id=TEXT, object={"const": "response.compaction"}, created_at=COUNT, output=LIST, usage=OBJECT
)
INPUT_TOKENS_ANSWER = object_with(object={"const": "response.input_tokens"}, input_tokens=COUNT)
TOKENS_ANSWER = object_with(input_tokens=COUNT)
VERSION_ANSWER = object_with(name=TEXT, version=TEXT, commit=TEXT)

INFERENCE = (
    Operation("POST", EMBEDDINGS.path, "Embed texts.", EMBEDDINGS_ANSWER, openai_embeddings.EmbeddingBody),
    Operation("POST", CHAT.path, "Answer a chat.", CHAT_ANSWER, openai_chat.ChatBody, streams=True),
    Operation(
        "POST", COMPLETIONS.path, "Go on with a text.", COMPLETION_ANSWER, openai_completions.CompletionBody, True
    ),
    Operation(
        "POST", RESPONSES.path, "Make a response.", RESPONSE_ANSWER, openai_responses.ResponsesBody, streams=True
    ),
    Operation("POST", COMPACT.path, "Sum a conversation up.", COMPACTION_ANSWER, openai_responses.ResponsesBody),
    Operation(
        "POST", INPUT_TOKENS.path, "Count a response's prompt.", INPUT_TOKENS_ANSWER, openai_responses.ResponsesBody
    ),
    Operation("POST", MESSAGES.path, "Answer messages.", MESSAGE_ANSWER, anthropic_messages.MessagesBody, streams=True),
    Operation("POST", COUNT_TOKENS.path, "Count a prompt.", TOKENS_ANSWER, anthropic_messages.MessagesBody),
)
"""Operations that both daemons have."""
