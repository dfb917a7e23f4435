"""``InferenceRequest``: a request to a model, independent of the dialect.

Absent sampling fields are ``None``: the model's own generation config fills them in, not a house default.
A dialect's own concerns (streaming, usage chunks, echoing of fields) are not here.
"""

from enum import StrEnum
from typing import Any

import msgspec


class Role(StrEnum):
    """Role of a message's author. ``developer`` of the OpenAI dialects is ``system`` here."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


class TextPart(msgspec.Struct, frozen=True, tag="text"):
    """Text within a message of mixed content."""

    text: str


class ImagePart(msgspec.Struct, frozen=True, tag="image"):
    """An image by ``data:`` or ``http(s):`` address."""

    url: str
    detail: str = "auto"


class MediaPart(msgspec.Struct, frozen=True, tag="media"):
    """A content part that no model supports; only used while a body is decoded, where ``param`` is its place."""

    kind: str
    param: str


Part = TextPart | ImagePart | MediaPart


class ToolCall(msgspec.Struct, frozen=True):
    """A call that the model made in an earlier message; ``arguments`` is JSON text."""

    id: str
    name: str
    arguments: str


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """A message of a chat. Text-only content is one string; mixed content keeps its parts in order."""

    role: Role
    content: str | tuple[Part, ...] = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    reasoning: str | None = None


class Tool(msgspec.Struct, frozen=True, omit_defaults=True):
    """A function the model may call; ``parameters`` is a JSON schema."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = {}
    strict: bool | None = None
    """Whether calls must follow the schema; ``None`` if the client did not state it."""


class ToolMode(StrEnum):
    """Whether the model may, must or must not call tools."""

    AUTO = "auto"
    NONE = "none"
    REQUIRED = "required"
    NAMED = "named"


class ToolChoice(msgspec.Struct, frozen=True, omit_defaults=True):
    """Choice of the tools that may be called; ``name`` is set for ``NAMED`` only."""

    mode: ToolMode = ToolMode.AUTO
    name: str | None = None
    parallel: bool = True


class FormatKind(StrEnum):
    """Kind of constraint on the answer."""

    TEXT = "text"
    JSON_OBJECT = "json_object"
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    GRAMMAR = "grammar"


class OutputFormat(msgspec.Struct, frozen=True, omit_defaults=True):
    """A constraint on the answer: a JSON schema, a regular expression or a grammar, as text."""

    kind: FormatKind = FormatKind.TEXT
    source: str = ""
    name: str = ""
    strict: bool | None = None
    """Whether a schema that cannot be enforced completely is refused; ``None``, as not stated, is false."""


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """Sampling of the next token. ``None`` takes the model's generation config."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    bad_words: tuple[str, ...] = ()
    """Texts of one token each that are never generated."""


class Ending(msgspec.Struct, frozen=True, omit_defaults=True):
    """End conditions of an answer, beside its stop strings."""

    ignore_eos: bool = False
    """Whether the model's own end tokens are tokens like any other."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer beside the model's own end tokens."""
    min_tokens: int = 0
    """Least number of tokens of the answer."""
    includes_stop: bool = False
    """Whether the answer includes the stop string that ended it."""


class InferenceRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """A request for one model.

    ``max_tokens`` bounds the output, reasoning included; ``None`` leaves it to the context. ``thinking`` turns a
    reasoning model's thinking on or off; ``None`` leaves it to the template, as "" does with its ``effort``,
    and ``thinking_budget`` bounds its tokens.
    ``prompt`` is raw text, or token ids, that no chat template touches (text completions) and excludes ``messages``;
    ``suffix`` is what comes behind the answer, for a model that fills in. With ``echo`` the answer repeats the prompt,
    and with ``top_logprobs`` the log probabilities of its tokens. ``max_tokens`` 0 evaluates the prompt alone.
    """

    model: str
    messages: tuple[Message, ...] = ()
    prompt: str | tuple[int, ...] | None = None
    suffix: str = ""
    echo: bool = False
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = ToolChoice()
    sampling: Sampling = Sampling()
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    ending: Ending = Ending()
    num_choices: int = 1
    top_logprobs: int | None = None
    output_format: OutputFormat = OutputFormat()
    thinking: bool | None = None
    effort: str = ""
    thinking_budget: int | None = None
    template_arguments: dict[str, Any] = {}
    principal: str = ""
    """Name of the principal, by the gateway; slots are shared out among principals."""
    priority: int = 0
    """Priority of the principal: among waiting requests, the highest goes first."""
    cache_salt: str = ""
    """Salt of the prefix cache: only requests with the same salt share prefixes."""


class EmbeddingRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """Texts, or token ids in their place, to be embedded by one model."""

    model: str
    inputs: tuple[str | tuple[int, ...], ...]
    dimensions: int | None = None
    principal: str = ""
    priority: int = 0
