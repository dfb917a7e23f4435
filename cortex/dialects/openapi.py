"""OpenAPI description of a daemon, generated from the types that it decodes.

A daemon lists its operations; request bodies are the structs of the dialects, so that the description matches the
decoder. Responses that are encoded by hand are described by the members that clients rely on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from cortex.dialects.envelope import OPENAI, Envelope
from cortex.dialects.schema import TEXT, Schema, object_with

PATH = "/openapi.json"


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
    envelope: Envelope = OPENAI
    """Form of its errors."""


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
            "components": {"schemas": components | {one.envelope.name: one.envelope.schema for one in operations}},
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
    error = {
        "description": "An error, in the words of the path's dialect.",
        "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{one.envelope.name}"}}},
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


VERSION_ANSWER = object_with(name=TEXT, version=TEXT, commit=TEXT)
