"""``InferenceEvent``: the output of one inference, in order, whatever the client's dialect.

A stream is ``Started``, then the prompt if it was asked for, then deltas, then one ``Finished`` for each choice; or it
ends early with one ``Failed``.
Nothing follows ``Failed`` or the last ``Finished``. Events carry text, never SSE events or token ids.
"""

from enum import StrEnum
from typing import Annotated

import msgspec

from cortex.wire.errors import ErrorInfo

Tokens = Annotated[int, msgspec.Meta(ge=0, le=10**12)]
"""Count of tokens as another process writes it, which can be added to counters and budgets; any other is none."""


class FinishReason(StrEnum):
    """Reason for the end of a choice."""

    STOP = "stop"
    """An end-of-turn token or a stop string."""
    LENGTH = "length"
    """The token limit of the request or of the context."""
    TOOL_CALLS = "tool_calls"
    """The model stopped to have tools called."""


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """A sampled or alternative token: its text, its UTF-8 bytes and its natural-log probability."""

    token: str
    utf8: bytes
    logprob: float
    top: tuple["TokenLogprob", ...] = ()


class Started(msgspec.Struct, frozen=True, tag="started", tag_field="event"):
    """The engine accepted the request. ``cached_tokens`` of the prompt were already in the KV cache."""

    prompt_tokens: int
    cached_tokens: int = 0


class PromptEcho(msgspec.Struct, frozen=True, tag="prompt", tag_field="event"):
    """The prompt, for a request with ``echo``. Comes before any text of its choice.

    ``logprobs`` are of its tokens, if those were asked for; nothing stands before the first, whose own says 0. They may
    come in several pieces, of which the first has the text.
    """

    text: str
    choice: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


class TextDelta(msgspec.Struct, frozen=True, tag="text", tag_field="event"):
    """A piece of the answer."""

    text: str
    choice: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


class ReasoningDelta(msgspec.Struct, frozen=True, tag="reasoning", tag_field="event"):
    """A piece of the model's reasoning."""

    text: str
    choice: int = 0


class ToolCallDelta(msgspec.Struct, frozen=True, tag="tool_call", tag_field="event"):
    """A piece of a tool call.

    ``call`` counts the calls of a choice from 0. ``id`` and ``name`` are set on the first piece of a call and empty
    after it; ``arguments`` pieces concatenate to one JSON object.
    """

    call: int
    id: str = ""
    name: str = ""
    arguments: str = ""
    choice: int = 0


class Finished(msgspec.Struct, frozen=True, tag="finished", tag_field="event"):
    """A choice ended. Token counts are of this choice; ``reasoning_tokens`` is part of ``output_tokens``."""

    reason: FinishReason
    output_tokens: int
    reasoning_tokens: int = 0
    stop_string: str | None = None
    choice: int = 0


class Failed(msgspec.Struct, frozen=True, tag="failed", tag_field="event"):
    """The inference ended with an error after it had been accepted."""

    error: ErrorInfo


InferenceEvent = Started | PromptEcho | TextDelta | ReasoningDelta | ToolCallDelta | Finished | Failed
