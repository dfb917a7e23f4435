"""The grammar that an answer must follow, from which the engine computes its masks.

A request asks for JSON (any object, or by a schema), for a regular expression or a grammar, or that tools be called, in
the model's own form (:mod:`neuron.text.forms`). All of it becomes one Lark grammar for llguidance, compiled once here,
before the request is admitted, so that what cannot be compiled is an error of the request.
"""

import json
import re
from collections.abc import Callable

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

from cortex.wire.errors import InvalidRequestError, InvalidSchemaError
from cortex.wire.request import FormatKind, InferenceRequest, OutputFormat, Tool, ToolMode
from neuron.text.forms.form import CallForm, ForcedTool
from neuron.text.forms.registry import HERMES
from neuron.text.history import is_deeper
from neuron.text.schema import MAX_SCHEMA_DEPTH, MAX_SOURCE_BYTES, PreparedSchema, json_rule


def constraint_of(
    request: InferenceRequest,
    form: CallForm = HERMES,
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
            return "answer: " + json_rule({"type": "object"}, {})
        case FormatKind.JSON_SCHEMA:
            try:
                schema = json.loads(asked.source)
            except (ValueError, RecursionError) as error:
                raise InvalidSchemaError(f"it is not JSON: {error}", param="response_format") from None
            _check_depth(schema, "response_format")
            prepared = PreparedSchema(schema, strict=bool(asked.strict))
            return "answer: " + json_rule(prepared.schema, prepared.definitions)
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
    forced = []
    for tool in tools:
        _check_depth(tool.parameters, "tools")
        prepared = PreparedSchema({"type": "object", **tool.parameters}, strict=bool(tool.strict), param="tools")
        forced.append(ForcedTool(tool.name, tool.parameters, prepared))
    return form.grammar(forced, parallel)


def _plain(problem: str) -> str:
    """Return a compiler's message without its listing of the grammar, which is not what the client wrote."""
    return re.sub(r"\n *\d+ \|.*", "", problem, flags=re.DOTALL).removesuffix(".")[:500]


def _check_depth(schema: object, param: str) -> None:
    """Raise for a schema that is nested too deeply."""
    if is_deeper(schema, MAX_SCHEMA_DEPTH):
        raise InvalidSchemaError(f"it is nested deeper than {MAX_SCHEMA_DEPTH} levels", param=param)
