"""The tools of a Responses request: the functions for the model, and the client's names for them.

The model is offered functions only. A custom tool becomes one with a single string, its input; the tools of a namespace
become functions whose names begin with it. Hosted tools (``web_search``, ``image_generation``, ...) are sent by agents
to every server: they are echoed, not offered, and named in the answer's header.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec

from cortex.dialects import fields
from cortex.wire.errors import InvalidRequestError
from cortex.wire.request import Tool, ToolChoice, ToolMode

INPUT_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
    "additionalProperties": False,
}

CALLABLE = ("function", "custom")
"""Types of tools that the client runs."""

# Members that a function tool of a response always has.
_FUNCTION_DEFAULTS = {
    "description": msgspec.Raw(b"null"),
    "parameters": msgspec.Raw(b"null"),
    "strict": msgspec.Raw(b"false"),
}

_ECHO_DECODER = msgspec.json.Decoder(list[dict[str, msgspec.Raw]])


class GrammarBody(msgspec.Struct):
    """Format of the input of a custom tool."""

    type: str
    syntax: str | None = None
    definition: str | None = None


class ToolBody(msgspec.Struct):
    """An entry of ``tools``, of any type."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    format: GrammarBody | None = None
    tools: "list[ToolBody] | None" = None


class ChoiceBody(msgspec.Struct):
    """A ``tool_choice`` that is an object."""

    type: str
    name: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: list["ChoiceBody"] | None = None


class OfferedTools(msgspec.Struct, frozen=True):
    """The tools of a request, by the names that the model uses.

    ``custom`` names those whose arguments wrap an input; ``namespaces`` maps a tool of a namespace to that
    and its own name.
    """

    tools: tuple[Tool, ...] = ()
    custom: frozenset[str] = frozenset()
    namespaces: dict[str, tuple[str, str]] = {}
    flat_names: dict[str, str] = {}
    """Model's names of tools of a namespace by their own, unless a tool without a namespace has that name."""
    hosted: tuple[str, ...] = ()
    """Places of hosted tools, which cannot run here."""

    def known_as(self, name: str, namespace: str | None = None) -> str:
        """Return the model's name for a tool of the client."""
        if namespace:
            return flat_name(namespace, name)
        return self.flat_names.get(name, name)


def flat_name(namespace: str, name: str) -> str:
    """Return the name of a function that stands for a tool of a namespace."""
    return f"{namespace}{name}" if namespace.endswith("_") else f"{namespace}__{name}"


def offered(bodies: Sequence[ToolBody]) -> OfferedTools:
    """Return the functions for the model. Of tools that get the same name the first counts.

    Raises:
        MissingParameterError: a tool has no name.
    """
    tools: dict[str, Tool] = {}
    custom: set[str] = set()
    namespaces: dict[str, tuple[str, str]] = {}
    hosted: list[str] = []
    for namespace, body, where in _flatten(bodies):
        if body.type not in CALLABLE:
            hosted.append(f"{where}.type={body.type}")
            continue
        own_name = fields.needed(body.name, f"{where}.name")
        name = flat_name(namespace, own_name) if namespace else own_name
        if name in tools:
            continue
        if namespace:
            namespaces[name] = (namespace, own_name)
        if body.type == "custom":
            custom.add(name)
            tools[name] = Tool(name, _custom_description(body), INPUT_SCHEMA)
        else:
            tools[name] = Tool(name, body.description or "", body.parameters or {}, body.strict)
    flat_names: dict[str, str] = {}
    for flat, (_, own_name) in namespaces.items():
        if own_name not in tools:
            flat_names.setdefault(own_name, flat)
    return OfferedTools(tuple(tools.values()), frozenset(custom), namespaces, flat_names, tuple(hosted))


def _flatten(bodies: Sequence[ToolBody]) -> Iterator[tuple[str, ToolBody, str]]:
    """Yield each tool with its namespace and its place in the body."""
    for index, body in enumerate(bodies):
        where = f"tools[{index}]"
        if body.type == "namespace" and body.tools is not None:
            for number, inner in enumerate(body.tools):
                yield body.name or "", inner, f"{where}.tools[{number}]"
        else:
            yield "", body, where


def _custom_description(body: ToolBody) -> str:
    """Return the description of a custom tool for the model; a grammar is described, not enforced."""
    description, form = body.description or "", body.format
    if form is None or not form.definition:
        return description
    return f"{description}\n\nThe input must match this {form.syntax or 'given'} grammar:\n{form.definition}".lstrip()


def chosen(
    choice: Literal["auto", "none", "required"] | ChoiceBody | None, parallel: bool, tools: OfferedTools
) -> tuple[ToolChoice, tuple[Tool, ...]]:
    """Return the tool choice and the allowed tools; ``allowed_tools`` leaves a subset.

    Raises:
        InvalidRequestError: a tool is forced that is not there.
        UnsupportedParameterError: a hosted tool is forced.
    """
    match choice:
        case None | "auto":
            return ToolChoice(ToolMode.AUTO, parallel=parallel), tools.tools
        case "none":
            return ToolChoice(ToolMode.NONE, parallel=parallel), tools.tools
        case "required":
            return _required(tools.tools, parallel), tools.tools
        case ChoiceBody(type="allowed_tools"):
            allowed = {tools.known_as(tool.name or "") for tool in choice.tools or ()}
            left = tuple(tool for tool in tools.tools if tool.name in allowed)
            if choice.mode == "required":
                return _required(left, parallel), left
            return ToolChoice(ToolMode.AUTO, parallel=parallel), left
    fields.refuse([(f"tool_choice.type={choice.type}", choice.type not in CALLABLE)])
    name = tools.known_as(choice.name or "")
    if all(tool.name != name for tool in tools.tools):
        raise InvalidRequestError(
            f"Invalid 'tool_choice': there is no tool named '{choice.name}'.", param="tool_choice"
        )
    return ToolChoice(ToolMode.NAMED, name, parallel), tools.tools


def _required(tools: Sequence[Tool], parallel: bool) -> ToolChoice:
    """Return the choice that forces a tool. Raises :class:`InvalidRequestError` if the tool is absent."""
    if not tools:
        raise InvalidRequestError("Invalid 'tool_choice': it needs 'tools'.", param="tool_choice")
    return ToolChoice(ToolMode.REQUIRED, parallel=parallel)


def echoed(tools: bytes) -> bytes:
    """Return ``tools`` as a response repeats them, with the members of functions that strict clients require."""
    bodies = _ECHO_DECODER.decode(tools)
    for body in bodies:
        if bytes(body["type"]) == b'"function"':
            for name, value in _FUNCTION_DEFAULTS.items():
                body.setdefault(name, value)
    return msgspec.json.encode(bodies)
