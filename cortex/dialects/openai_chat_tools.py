"""The tools of a chat: the functions for the model, and the choice among them.

The model is offered functions only. A custom tool becomes one with a single string, its input, and is called by the
client's name for it. Tools that run on a server (``web_search``, ...) cannot run here: they are named in the answer's
header, and refused where one is forced.
"""

from collections.abc import Sequence
from typing import Literal

import msgspec

from cortex.dialects import openai_fields as fields
from cortex.dialects.openai_tools import INPUT_SCHEMA, custom_description, required
from cortex.wire.errors import InvalidRequestError, MissingParameterError
from cortex.wire.request import Tool, ToolChoice, ToolMode


class _Grammar(msgspec.Struct):
    syntax: str | None = None
    definition: str | None = None


class _CustomFormat(msgspec.Struct):
    type: str
    grammar: _Grammar | None = None


class _Custom(msgspec.Struct):
    name: str
    description: str | None = None
    format: _CustomFormat | None = None


class ToolBody(msgspec.Struct):
    """An entry of ``tools``, of any type."""

    function: fields.FunctionBody | None = None
    custom: _Custom | None = None
    type: str = "function"


class _Named(msgspec.Struct):
    name: str


class _AllowedTool(msgspec.Struct):
    type: str = "function"
    function: _Named | None = None
    custom: _Named | None = None


class _Allowed(msgspec.Struct):
    tools: list[_AllowedTool]
    mode: Literal["auto", "required"] = "auto"


class ChoiceBody(msgspec.Struct):
    """A ``tool_choice`` that is an object."""

    type: str = "function"
    function: _Named | None = None
    custom: _Named | None = None
    allowed_tools: _Allowed | None = None


class ChatTools(msgspec.Struct, frozen=True):
    """The tools of a chat by name, those that take an input, and the places of those that cannot run here."""

    by_name: dict[str, Tool] = {}
    custom: frozenset[str] = frozenset()
    hosted: tuple[str, ...] = ()


def offered(bodies: Sequence[ToolBody]) -> ChatTools:
    """Return the functions for the model. Of tools of one name the first counts.

    Raises:
        MissingParameterError: a tool has no type or name.
    """
    by_name: dict[str, Tool] = {}
    custom: set[str] = set()
    hosted: list[str] = []
    for index, body in enumerate(bodies):
        where = f"tools[{index}]"
        if body.type == "function":
            if body.function is None:
                raise _missing(f"{where}.function")
            by_name.setdefault(body.function.name, body.function.tool())
        elif body.type == "custom":
            if body.custom is None:
                raise _missing(f"{where}.custom")
            name = body.custom.name
            if name not in by_name:
                by_name[name] = Tool(name, _description(body.custom), INPUT_SCHEMA)
                custom.add(name)
        else:
            hosted.append(f"{where}.type={body.type}")
    return ChatTools(by_name, frozenset(custom), tuple(hosted))


def chosen(
    choice: Literal["auto", "none", "required"] | ChoiceBody | None, parallel: bool, tools: ChatTools
) -> tuple[ToolChoice, tuple[Tool, ...]]:
    """Return the tool choice and the allowed tools; ``allowed_tools`` leaves a subset.

    Raises:
        InvalidRequestError: a tool is forced that is not there.
        UnsupportedParameterError: a tool is forced that cannot run here.
    """
    everything = tuple(tools.by_name.values())
    match choice:
        case None | "auto":
            return ToolChoice(ToolMode.AUTO, parallel=parallel), everything
        case "none":
            return ToolChoice(ToolMode.NONE, parallel=parallel), everything
        case "required":
            return required(everything, parallel), everything
    if choice.type == "allowed_tools":
        if choice.allowed_tools is None:
            raise _missing("tool_choice.allowed_tools")
        named = (tool.function or tool.custom for tool in choice.allowed_tools.tools)
        allowed = {tool.name for tool in named if tool is not None}
        left = tuple(tool for tool in everything if tool.name in allowed)
        if choice.allowed_tools.mode == "required":
            return required(left, parallel), left
        return ToolChoice(ToolMode.AUTO, parallel=parallel), left
    fields.refuse([(f"tool_choice.type={choice.type}", choice.type not in ("function", "custom"))])
    forced = choice.custom if choice.type == "custom" else choice.function
    if forced is None:
        raise _missing(f"tool_choice.{choice.type}")
    if forced.name not in tools.by_name:
        raise InvalidRequestError(
            f"Invalid 'tool_choice': there is no tool named '{forced.name}'.", param="tool_choice"
        )
    return ToolChoice(ToolMode.NAMED, forced.name, parallel), everything


def _description(custom: _Custom) -> str:
    grammar = custom.format.grammar if custom.format is not None else None
    definition = grammar.definition if grammar is not None else None
    return custom_description(custom.description, grammar.syntax if grammar is not None else None, definition)


def _missing(name: str) -> MissingParameterError:
    return MissingParameterError(f"Missing required parameter: '{name}'.", param=name)
