"""The grammar that an answer must follow, from which the engine computes its masks.

A request asks for JSON (any object, or by a schema), for a regular expression or a grammar, or that tools be called, in
a form that :mod:`neuron.text.tools` reads back: Llama's own for such models, else the tagged one (Mistral's marker is a
special token, which a grammar of text cannot ask for). All of it becomes one Lark grammar for llguidance, compiled once
here, before the request is admitted, so that what cannot be compiled is an error of the request.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

from cortex.wire.errors import InvalidRequestError, InvalidSchemaError
from cortex.wire.request import FormatKind, InferenceRequest, OutputFormat, Tool, ToolMode
from neuron.text.history import is_deeper
from neuron.text.schema import MAX_SCHEMA_DEPTH, MAX_SOURCE_BYTES, PreparedSchema
from neuron.text.tools import END, START, CallForm

JSON_OPTIONS: Final = {"whitespace_flexible": True, "whitespace_pattern": r"[ \n]{0,16}"}
"""White space is free but bounded: a model that is unsure likes to write it for ever."""


def constraint_of(
    request: InferenceRequest,
    form: CallForm = CallForm.TAGGED,
    problem_with: Callable[[str], str] = LLMatcher.validate_grammar,
) -> str | None:
    """Return the grammar that the answer to ``request`` must follow, ``None`` if it is free.

    With tools on offer, an answer in the format asked for may be a call instead. ``problem_with`` returns
    the error of a grammar. Raises :class:`InvalidSchemaError`.
    """
    mode = request.tool_choice.mode
    tools = request.tools if mode is not ToolMode.NONE else ()
    forced = mode in {ToolMode.REQUIRED, ToolMode.NAMED}
    if forced:
        tools = tuple(tool for tool in tools if mode is ToolMode.REQUIRED or tool.name == request.tool_choice.name)
        if not tools:
            raise InvalidRequestError("Invalid 'tool_choice': it names no tool of this request.", param="tool_choice")
        grammar = "start: calls\n" + _calls(tools, form, parallel=request.tool_choice.parallel)
        param = "tools"
    elif request.output_format.kind is FormatKind.TEXT:
        return None
    else:
        param = "response_format"
        body = _format(request.output_format)
        alternatives = "answer | calls" if tools else "answer"
        calls = _calls(tools, form, parallel=request.tool_choice.parallel) if tools else ""
        # A whole grammar has a start of its own.
        grammar = f"start: {alternatives}\n{calls}{body}" if not body.startswith("start:") else body
    if len(grammar) > MAX_SOURCE_BYTES:
        raise InvalidSchemaError(f"it is longer than {MAX_SOURCE_BYTES} bytes", param=param)
    if (problem := problem_with(grammar)) and not problem.startswith("WARNING"):
        raise InvalidSchemaError(_plain(problem), param=param)
    return grammar


def _format(asked: OutputFormat) -> str:
    """Return a rule ``answer``, or a whole grammar."""
    match asked.kind:
        case FormatKind.JSON_OBJECT:
            return "answer: " + _json_rule({"type": "object"}, {})
        case FormatKind.JSON_SCHEMA:
            try:
                schema = json.loads(asked.source)
            except (ValueError, RecursionError) as error:
                raise InvalidSchemaError(f"it is not JSON: {error}", param="response_format") from None
            _check_depth(schema, "response_format")
            prepared = PreparedSchema(schema, strict=bool(asked.strict))
            return "answer: " + _json_rule(prepared.schema, prepared.definitions)
        case FormatKind.REGEX:
            pattern = re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", asked.source).replace("\n", r"\n")
            return f"answer: /{pattern}/\n"
        case _:
            source = asked.source
            if "::=" in source:
                try:
                    source = gbnf_to_lark(source)
                except (GbnfToLarkError, ValueError, RecursionError) as error:
                    raise InvalidSchemaError(f"the grammar cannot be read: {error}", param="response_format") from None
            if not re.match(r"\s*start\s*:", source):
                found = re.search(r"^\s*start\s*:", source, re.MULTILINE)
                if found is None:
                    raise InvalidSchemaError("the grammar has no rule 'start'", param="response_format")
                source = source[found.start() :] + "\n" + source[: found.start()]
            return source.lstrip()


def _calls(tools: tuple[Tool, ...], form: CallForm, *, parallel: bool) -> str:
    """Return the rules of one or more calls of ``tools``."""
    key_of_arguments = "parameters" if form is CallForm.LLAMA else "arguments"
    bodies = []
    for index, tool in enumerate(tools):
        _check_depth(tool.parameters, "tools")
        prepared = PreparedSchema({"type": "object", **tool.parameters}, strict=bool(tool.strict), param="tools")
        schema: dict[str, Any] = {
            "type": "object",
            "properties": {"name": {"const": tool.name}, key_of_arguments: prepared.schema},
            "required": ["name", key_of_arguments],
            "additionalProperties": False,
        }
        bodies.append(f"call_{index}: {_json_rule(schema, prepared.definitions)}")
    names = " | ".join(f"call_{index}" for index in range(len(tools)))
    if form is CallForm.LLAMA:
        more = ' ("; " call)*' if parallel else ""
        return f"calls: call{more}\ncall: {names}\n" + "".join(bodies)
    more = ' ("\\n" call)*' if parallel else ""
    return f'calls: call{more}\ncall: "{START}\\n" ({names}) "\\n{END}"\n' + "".join(bodies)


def _json_rule(schema: Any, definitions: Mapping[str, Any]) -> str:
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    return "%json " + json.dumps({**schema, "$defs": definitions, "x-guidance": JSON_OPTIONS}) + "\n"


def _plain(problem: str) -> str:
    """Return a compiler's message without its listing of the grammar, which is not what the client wrote."""
    return re.sub(r"\n *\d+ \|.*", "", problem, flags=re.DOTALL).removesuffix(".")[:500]


def _check_depth(schema: object, param: str) -> None:
    """Raise for a schema that is nested too deeply."""
    if is_deeper(schema, MAX_SCHEMA_DEPTH):
        raise InvalidSchemaError(f"it is nested deeper than {MAX_SCHEMA_DEPTH} levels", param=param)
