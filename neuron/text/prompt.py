"""A request to prompt token ids: the chat template, with messages in the shape templates expect.

Templates mostly take one leading system message, arguments of tool calls as objects, and text as strings: that is made
so before rendering. Where a template knows nothing of tools, the tools and calls are written into the messages in the
``<tool_call>`` form that :mod:`neuron.text.tools` reads back. A template that refuses two turns of one role in a row is
given them as one. One that fails is an error, never a retry with less.
"""

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox

from cortex.wire.errors import InvalidRequestError, UnsupportedParameterError
from cortex.wire.request import ImagePart, InferenceRequest, Message, Role, TextPart, Tool, ToolMode
from neuron.errors import NoTemplateError, TemplateError
from neuron.text.reasoning import ReasoningTags
from neuron.text.tokenizer import TextFiles
from neuron.text.tools import MARKERS, form_of

_TEMPLATE_FAILURES = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
"""What a template raises of itself, or what it does with a conversation it was not written for."""


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """A rendered prompt: its ids, and whether the template left a reasoning tag open at its end."""

    ids: list[int]
    starts_in_reasoning: bool
    ends_reasoning: bool = False
    """Whether the template closed the reasoning itself, as it does where thinking is turned off."""


class PromptFormat:
    """How one model wants its prompts. Immutable after construction; safe to use from several threads."""

    def __init__(self, files: TextFiles) -> None:
        self._files = files
        source = files.chat_template
        try:
            self._template = _environment().from_string(source) if source else None
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(
                f"The chat template has a syntax error in line {error.lineno}: {error.message}."
            ) from None
        self.renders_tools = source is not None and "tools" in source
        """Whether the template has a place of its own for tools."""
        self.tags = ReasoningTags() if source is not None and "<think>" in source else None
        """The tags around this model's reasoning, ``None`` for a model that does not reason."""
        self.call_form = form_of(source)
        """How this model writes calls."""
        marked = {*MARKERS, *((self.tags.start, self.tags.end) if self.tags else ())}
        self.markers = {
            id: token.content
            for id, token in files.tokenizer.get_added_tokens_decoder().items()
            if token.special and token.content in marked
        }
        """The special tokens that a reader of answers looks for, by id."""

    @property
    def can_chat(self) -> bool:
        """Whether there is a chat template."""
        return self._template is not None

    def build(self, request: InferenceRequest, *, whole: bool = False) -> Prompt:
        """Render and tokenise. A prompt that is ``whole`` is not gone on with, but read, as for an embedding.

        Raises:
            NoTemplateError: messages were sent to a model without a chat template.
            TemplateError: the template refused the conversation, with its own words.
        """
        text = request.prompt if request.prompt is not None else self.render(request)
        ids = self._files.tokenizer.encode(text, add_special_tokens=False).ids
        if request.prompt is not None and (before := self._files.before) and tuple(ids[: len(before)]) != before:
            ids = [*before, *ids]
        if whole and (behind := self._files.behind) and tuple(ids[-len(behind) :]) != behind:
            ids = [*ids, *behind]
        if not ids:
            raise InvalidRequestError("Invalid 'messages': the prompt is empty.", param="messages")
        opened = self.tags is not None and text.rstrip().endswith(self.tags.start)
        closed = self.tags is not None and text.rstrip().endswith(self.tags.end)
        return Prompt(ids, opened, closed)

    def render(self, request: InferenceRequest) -> str:
        """Return the prompt's text."""
        if self._template is None:
            raise NoTemplateError(f"The model '{request.model}' has no chat template; it can complete text only.")
        tools = request.tools if request.tool_choice.mode is not ToolMode.NONE else ()
        messages = list(request.messages)
        if not self.renders_tools:
            messages = _write_tools_as_text(messages, tools)
        tools_seen = [_tool_schema(tool) for tool in tools] if tools and self.renders_tools else None
        arguments: dict[str, Any] = {**self._files.special_tokens, **request.template_arguments}
        if request.thinking is not None:
            arguments.setdefault("enable_thinking", request.thinking)
        turns = _one_system_message(messages)
        try:
            try:
                return self._rendered(turns, tools_seen, arguments)
            except _TEMPLATE_FAILURES:
                joined = _one_turn_each(turns)
                if len(joined) == len(turns):
                    raise
                return self._rendered(joined, tools_seen, arguments)
        except _TEMPLATE_FAILURES as error:
            # A template is a program of the model's author: what it raises is about the conversation.
            with_tools = " with tools" if tools else ""
            raise TemplateError(f"The chat template of '{request.model}' failed{with_tools}: {error}.") from error

    def _rendered(self, turns: Sequence[Message], tools: Sequence[Any] | None, arguments: Mapping[str, Any]) -> str:
        assert self._template is not None
        return self._template.render(
            messages=[_as_template_sees(message) for message in turns],
            tools=tools,
            add_generation_prompt=True,
            **arguments,
        )


def _one_system_message(messages: Sequence[Message]) -> list[Message]:
    """Merge all system messages into one at the front; most templates refuse any other."""
    system = [_text(message) for message in messages if message.role is Role.SYSTEM]
    others = [message for message in messages if message.role is not Role.SYSTEM]
    merged = "\n\n".join(text for text in system if text)
    return [Message(Role.SYSTEM, merged), *others] if merged else others


def _one_turn_each(messages: Sequence[Message]) -> list[Message]:
    """Join turns of one role that follow one another; results of tools stay apart, as each answers its own call."""
    joined: list[Message] = []
    for message in messages:
        before = joined[-1] if joined else None
        if before is None or before.role is not message.role or message.role is Role.TOOL:
            joined.append(message)
            continue
        joined[-1] = Message(
            message.role,
            "\n\n".join(text for text in (_text(before), _text(message)) if text),
            (*before.tool_calls, *message.tool_calls),
            name=before.name,
            reasoning="\n\n".join(text for text in (before.reasoning, message.reasoning) if text) or None,
        )
    return joined


def _as_template_sees(message: Message) -> dict[str, Any]:
    seen: dict[str, Any] = {"role": str(message.role), "content": _text(message)}
    if message.name is not None:
        seen["name"] = message.name
    if message.reasoning:
        seen["reasoning_content"] = message.reasoning
    if message.tool_calls:
        seen["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": _arguments_object(call.arguments)},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        seen["tool_call_id"] = message.tool_call_id
    return seen


def _text(message: Message) -> str:
    if isinstance(message.content, str):
        return message.content
    texts = []
    for part in message.content:
        match part:
            case TextPart(text):
                texts.append(text)
            case ImagePart():
                raise UnsupportedParameterError("This model takes no images.", param="messages")
    return "".join(texts)


def _arguments_object(arguments: str) -> Any:
    try:
        return json.loads(arguments) if arguments.strip() else {}
    except ValueError:
        return arguments


def _tool_schema(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}


def _write_tools_as_text(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """Put tools, calls and results into plain turns, for a template that has no place for them."""
    written: list[Message] = []
    if tools:
        listed = "\n".join(json.dumps(_tool_schema(tool), ensure_ascii=False) for tool in tools)
        written.append(
            Message(
                Role.SYSTEM,
                "You can call functions. These are their signatures, one JSON object a line:\n"
                f"<tools>\n{listed}\n</tools>\n\n"
                "To call one, answer with a JSON object of its name and its arguments within these tags:\n"
                '<tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call>',
            )
        )
    for message in messages:
        if message.tool_calls:
            bodies = [{"name": c.name, "arguments": _arguments_object(c.arguments)} for c in message.tool_calls]
            calls = "\n".join(f"<tool_call>\n{json.dumps(body)}\n</tool_call>" for body in bodies)
            text = _text(message)
            written.append(Message(Role.ASSISTANT, f"{text}\n{calls}" if text else calls))
        elif message.role is Role.TOOL:
            written.append(Message(Role.USER, f"<tool_response>\n{_text(message)}\n</tool_response>"))
        else:
            written.append(message)
    return written


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The environment chat templates are written for: blocks trimmed, loop controls, and three helpers."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON for a model to read: jinja's own filter would escape it for HTML."""
    known: Mapping[str, Any] = {name: options[name] for name in ("separators", "sort_keys") if name in options}
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **known)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
