"""A request to prompt token ids: the chat template, with messages in the shape templates expect.

Templates mostly take one leading system message, arguments of tool calls as objects, and text as strings: that is made
so before rendering. Where a template has no place for tools, the tools and calls are written into the messages in the
``<tool_call>`` form that :mod:`neuron.text.tools` reads back. A template that refuses two messages of one role in a row
gets them joined. One that fails is an error, never a retry with less. What a client wrote stays text
(:mod:`neuron.text.client_text`), unless the model's entry says otherwise; a raw prompt is its author's own template.
"""

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import jinja2
import msgspec

from cortex.wire.errors import InvalidRequestError, UnsupportedParameterError
from cortex.wire.node import SpecialTokensInText
from cortex.wire.request import InferenceRequest, Message, Role, TextPart, Tool, ToolCall, ToolMode
from neuron.errors import NoTemplateError, TemplateError
from neuron.text import pieces
from neuron.text.breakpoints import common_prefix, following
from neuron.text.chat_template import ChatTemplate
from neuron.text.client_text import ControlTokens, Marking, texts_in
from neuron.text.forms.registry import MARKERS, form_of, reasoning_of
from neuron.text.history import (
    arguments_object,
    merge_adjacent,
    one_system_message,
    template_message,
    tool_schema,
    with_results_named,
    with_short_ids,
    with_tools_as_text,
)
from neuron.text.infill import infill_form
from neuron.text.reasoning import EFFORTS, nearest_effort
from neuron.text.tokenizer import TextFiles

_TEMPLATE_FAILURES = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
"""Exceptions that a template raises, by itself or for a conversation it was not written for."""
_RESERVED: Final = frozenset({"messages", "tools"})
_SURROGATES: Final = re.compile("[\ud800-\udfff]")
_SHORT_IDS: Final = re.compile(r"length\s*[!=]=\s*9\b")
"""Check in Mistral's templates that refuses ids of other lengths."""


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """A rendered prompt: its ids, and whether the template left a reasoning tag open at its end."""

    ids: list[int]
    starts_in_reasoning: bool = False
    ends_reasoning: bool = False
    """Whether the template closed the reasoning itself, as it does where thinking is turned off."""
    breakpoints: tuple[int, ...] = ()
    """Numbers of tokens, ascending, behind which prompts that may come next part from this one, where it is known."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Chat:
    """A conversation as its template takes it, with the other ``arguments`` of the template."""

    model: str
    messages: list[Message]
    arguments: Mapping[str, Any]
    tools: tuple[Tool, ...]
    marking: Marking | None


class PromptFormat:
    """Prompt format of a model. Immutable after construction; safe to use from several threads."""

    def __init__(
        self,
        files: TextFiles,
        special: SpecialTokensInText = SpecialTokensInText.TEXT,
        *,
        finds_breakpoints: bool = False,
    ) -> None:
        self._files = files
        self._finds_breakpoints = finds_breakpoints
        source = files.chat_template
        self._template = ChatTemplate(source) if source else None
        literals = self._template.literals if self._template else ""
        self._control = ControlTokens(files.tokenizer, literals)
        self._marks_text = special is SpecialTokensInText.TEXT
        self._wants_short_ids = source is not None and _SHORT_IDS.search(source) is not None
        self.renders_tools = source is not None and "tools" in source
        """Whether the template has a place of its own for tools."""
        self.tags = reasoning_of(source)
        """The tags around this model's reasoning, ``None`` for a model that does not reason."""
        self._efforts = self._taken_efforts() if source is not None and "reasoning_effort" in source else None
        self.call_form = form_of(source)
        """Form in which the model writes calls."""
        marked = {*MARKERS, *((self.tags.start, self.tags.end) if self.tags else ())}
        self.markers = {
            id: token.content
            for id, token in files.tokenizer.get_added_tokens_decoder().items()
            if token.special and token.content in marked
        }
        """The special tokens that a reader of answers looks for, by id."""
        self._infill = infill_form(files.tokenizer)

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
        if request.suffix:
            return Prompt(self._infilled(request))
        if isinstance(request.prompt, tuple):
            return Prompt(list(request.prompt))
        breakpoints: tuple[int, ...] = ()
        if request.prompt is None:
            chat = self._chat(request, self._control.marking(_texts_of(request)) if self._marks_text else None)
            text = self._text(chat)
            ids = self._encode(text) if chat.marking is None else chat.marking.encode(text)
            if self._finds_breakpoints:
                breakpoints = self._breakpoints(chat, text, ids)
        else:
            text = _sound(request.prompt)
            # A reader's text is no template of its own, as the prompt of a completion often is.
            ids = self._control.encode_text(text) if whole and self._marks_text else self._encode(text)
            if (before := self._files.before) and tuple(ids[: len(before)]) != before:
                ids = [*before, *ids]
            if whole and (behind := self._files.behind) and tuple(ids[-len(behind) :]) != behind:
                ids = [*ids, *behind]
        if not ids:
            param = "messages" if request.prompt is None else "prompt"
            raise InvalidRequestError(f"Invalid '{param}': the prompt is empty.", param=param)
        opened = self.tags is not None and text.rstrip().endswith(self.tags.start)
        closed = self.tags is not None and text.rstrip().endswith(self.tags.end)
        return Prompt(ids, opened, closed, breakpoints)

    def _infilled(self, request: InferenceRequest) -> list[int]:
        """Return a prompt that asks for what is between two texts, which are no templates of their own.

        Raises:
            UnsupportedParameterError: the model was not made to fill in.
        """
        if self._infill is None:
            raise UnsupportedParameterError(
                f"Unsupported parameter: '{request.model}' has no tokens to fill in what stands before a 'suffix'.",
                param="suffix",
            )
        encode = self._control.encode_text if self._marks_text else self._encode
        before = list(request.prompt) if isinstance(request.prompt, tuple) else encode(_sound(request.prompt or ""))
        return self._infill.ids(before, encode(_sound(request.suffix)))

    def render(self, request: InferenceRequest) -> str:
        """Return the prompt's text."""
        return self._text(self._chat(request, None))

    def _encode(self, text: str) -> list[int]:
        return pieces.encode(self._files.tokenizer, text)

    def _breakpoints(self, chat: _Chat, text: str, ids: list[int]) -> tuple[int, ...]:
        """Return the breakpoints of a prompt in tokens, each a token or two early where text is cut there."""
        found: set[int] = set()
        for messages in following(chat.messages, chat.tools[0].name if chat.tools else None):
            written = messages if self.renders_tools else with_tools_as_text(messages, ())
            try:
                other = self._rendered(written, chat.arguments)
            except _TEMPLATE_FAILURES:
                continue  # no such conversation can follow
            found.add(common_prefix(text, _sound(other)))
        mark = "" if chat.marking is None else chat.marking.mark
        return tuple(sorted({self._control.count_before(text, mark, ids, at) for at in found} - {0}))

    def _chat(self, request: InferenceRequest, marking: Marking | None) -> _Chat:
        if self._template is None:
            raise NoTemplateError(f"The model '{request.model}' has no chat template; it can complete text only.")
        if reserved := _RESERVED & request.template_arguments.keys():
            names = " and ".join(f"'{name}'" for name in sorted(reserved))
            raise InvalidRequestError(
                f"Invalid 'chat_template_kwargs': {names} cannot be given there.", param="chat_template_kwargs"
            )
        tools = request.tools if request.tool_choice.mode is not ToolMode.NONE else ()
        messages = with_results_named(request.messages)
        if self._wants_short_ids:
            messages = with_short_ids(messages)
        own = dict(request.template_arguments)
        if marking is not None:
            tools = tuple(_tool_marked(tool, marking) for tool in tools)
            messages = [self._message_marked(message, marking) for message in messages]
            own = marking.value(own)
        if not self.renders_tools:
            messages = with_tools_as_text(messages, tools)
        arguments: dict[str, Any] = {
            "documents": None,
            "add_generation_prompt": True,
            **self._files.special_tokens,
            **own,
            "tools": [tool_schema(tool) for tool in tools] if tools and self.renders_tools else None,
        }
        if request.thinking is not None:
            arguments.setdefault("enable_thinking", request.thinking)
        if request.effort and self._efforts is not None:
            arguments.setdefault("reasoning_effort", nearest_effort(request.effort, self._efforts))
        return _Chat(request.model, one_system_message(messages), arguments, tools, marking)

    def _text(self, chat: _Chat) -> str:
        """Return the text of the prompt, marked. Raises :class:`TemplateError`."""
        try:
            return _sound(self._rendered(chat.messages, chat.arguments))
        except _TEMPLATE_FAILURES as error:
            # A template is a program of the model's author: what it raises is about the conversation.
            with_tools = " with tools" if chat.tools else ""
            raise TemplateError(f"The chat template of '{chat.model}' failed{with_tools}: {error}.") from error

    def _taken_efforts(self) -> tuple[str, ...]:
        """Return the efforts with which the template takes the least conversation: some raise for all but their own."""
        taken = []
        for effort in EFFORTS:
            arguments = {**self._files.special_tokens, "tools": None, "documents": None, "reasoning_effort": effort}
            with contextlib.suppress(*_TEMPLATE_FAILURES):
                self._rendered([Message(Role.USER, "x")], {"add_generation_prompt": True, **arguments})
                taken.append(effort)
        return tuple(taken)

    def _rendered(self, messages: Sequence[Message], arguments: Mapping[str, Any]) -> str:
        """Return a conversation rendered, with messages of one role joined if the template refuses it otherwise."""
        assert self._template is not None
        try:
            return self._template.render(messages=[template_message(message) for message in messages], **arguments)
        except _TEMPLATE_FAILURES:
            joined = merge_adjacent(messages)
            if len(joined) == len(messages):
                raise
            return self._template.render(messages=[template_message(message) for message in joined], **arguments)

    def _message_marked(self, message: Message, marking: Marking) -> Message:
        # A template cuts the reasoning out of its model's messages by these tags.
        kept = (self.tags.start, self.tags.end) if self.tags and message.role is Role.ASSISTANT else ()
        content = message.content
        return msgspec.structs.replace(
            message,
            content=marking.text(content, kept)
            if isinstance(content, str)
            else tuple(
                TextPart(marking.text(part.text, kept)) if isinstance(part, TextPart) else part for part in content
            ),
            tool_calls=tuple(
                ToolCall(marking.text(call.id), marking.text(call.name), _arguments_marked(call.arguments, marking))
                for call in message.tool_calls
            ),
            tool_call_id=message.tool_call_id and marking.text(message.tool_call_id),
            name=message.name and marking.text(message.name),
            reasoning=message.reasoning and marking.text(message.reasoning),
        )


def _arguments_marked(arguments: str, marking: Marking) -> str:
    return json.dumps(marking.value(arguments_object(arguments)), ensure_ascii=False)


def _tool_marked(tool: Tool, marking: Marking) -> Tool:
    return msgspec.structs.replace(
        tool,
        name=marking.text(tool.name),
        description=marking.text(tool.description),
        parameters=marking.value(tool.parameters),
    )


def _texts_of(request: InferenceRequest) -> Iterator[str]:
    """Yield every text that the client has sent for a template."""
    for message in request.messages:
        yield from texts_in(msgspec.to_builtins(message))
        for call in message.tool_calls:
            yield from texts_in(arguments_object(call.arguments))
    for tool in request.tools:
        yield from (tool.name, tool.description)
        yield from texts_in(tool.parameters)
    yield from texts_in(request.template_arguments)


def _sound(text: str) -> str:
    """Return ``text`` without lone surrogates, which JSON can hold and no tokenizer reads."""
    return text if text.isascii() else _SURROGATES.sub("\ufffd", text)
