"""The tools of a chat, and the choice among them, as :mod:`cortex.dialects.responses.tools` has them.

The two dialects differ in how they write a tool down, and in nothing that follows from it.
"""

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from cortex.dialects.fields import needed
from cortex.dialects.responses import tools as response_tools
from cortex.dialects.responses.tools import CALLABLE, OfferedTools
from cortex.wire.request import Tool, ToolChoice


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


class _Function(msgspec.Struct):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(msgspec.Struct):
    """An entry of ``tools``, of any type."""

    function: _Function | None = None
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


def offered(bodies: Sequence[ToolBody]) -> OfferedTools:
    """Return the functions for the model. Of tools of one name the first counts.

    Raises:
        MissingParameterError: a tool has no type or name.
    """
    return response_tools.offered([_tool(body, f"tools[{index}]") for index, body in enumerate(bodies)])


def chosen(
    choice: Literal["auto", "none", "required"] | ChoiceBody | None, parallel: bool, tools: OfferedTools
) -> tuple[ToolChoice, tuple[Tool, ...]]:
    """Return the tool choice and the allowed tools. Raises as :func:`cortex.dialects.responses.tools.chosen`."""
    return response_tools.chosen(_choice(choice) if isinstance(choice, ChoiceBody) else choice, parallel, tools)


def _tool(body: ToolBody, where: str) -> response_tools.ToolBody:
    """Return an entry of ``tools`` as Responses have it."""
    if body.type == "function":
        return response_tools.ToolBody(body.type, **msgspec.structs.asdict(needed(body.function, f"{where}.function")))
    if body.type != "custom":
        return response_tools.ToolBody(body.type)
    custom = needed(body.custom, f"{where}.custom")
    grammar = (custom.format.grammar if custom.format is not None else None) or _Grammar()
    form = response_tools.GrammarBody("grammar", grammar.syntax, grammar.definition)
    return response_tools.ToolBody(body.type, custom.name, custom.description, format=form)


def _choice(choice: ChoiceBody) -> response_tools.ChoiceBody:
    """Return a ``tool_choice`` as Responses have it."""
    if choice.type == "allowed_tools":
        allowed = needed(choice.allowed_tools, "tool_choice.allowed_tools")
        named = [tool.function or tool.custom for tool in allowed.tools]
        tools = [response_tools.ChoiceBody("function", one.name) for one in named if one is not None]
        return response_tools.ChoiceBody(choice.type, mode=allowed.mode, tools=tools)
    if choice.type not in CALLABLE:
        return response_tools.ChoiceBody(choice.type)
    forced = choice.custom if choice.type == "custom" else choice.function
    return response_tools.ChoiceBody(choice.type, needed(forced, f"tool_choice.{choice.type}").name)
