"""The answer of a chat that is not streamed: inference events gathered into one ``chat.completion``.

Equals the chunks of :class:`cortex._fast.chat_stream.ChatStream` as a client joins them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, assert_never

import msgspec

from cortex.wire.custom_tools import custom_input
from cortex.wire.errors import RemoteError, UpstreamError
from cortex.wire.events import (
    Failed,
    Finished,
    InferenceEvent,
    PromptEcho,
    ReasoningDelta,
    Started,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
)

# As in the stream: what stands for the logarithm of zero.
_IMPOSSIBLE = -9999.0


@dataclass(slots=True)
class _Call:
    id: str
    name: str
    arguments: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Choice:
    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[_Call] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finished: Finished | None = None


class ChatReply:
    """Gathers the events of one chat."""

    def __init__(
        self, id: str, model: str, created: int, num_choices: int = 1, custom_tools: frozenset[str] = frozenset()
    ) -> None:
        """``custom_tools`` are names of tools whose calls carry an input."""
        self._id = id
        self._model = model
        self._created = created
        self._custom_tools = custom_tools
        self._choices = [_Choice() for _ in range(num_choices)]
        self._started = Started(0)

    def add(self, events: Sequence[InferenceEvent]) -> None:
        """Take a batch of events. Raises :exc:`RemoteError` for an inference that failed."""
        for event in events:
            match event:
                case Started():
                    self._started = event
                case Failed():
                    raise RemoteError(event.error)
                case TextDelta():
                    choice = self._choices[event.choice]
                    choice.text.append(event.text)
                    choice.logprobs.extend(event.logprobs)
                case ReasoningDelta():
                    self._choices[event.choice].reasoning.append(event.text)
                case ToolCallDelta():
                    calls = self._choices[event.choice].calls
                    if event.call == len(calls):
                        calls.append(_Call(event.id, event.name))
                    calls[event.call].arguments.append(event.arguments)
                case Finished():
                    self._choices[event.choice].finished = event
                case PromptEcho():
                    pass  # a chat does not echo its prompt
                case _:
                    assert_never(event)

    def body(self) -> bytes:
        """Return the ``chat.completion``. Raises :exc:`UpstreamError` if a choice did not come to its end."""
        ends = [choice.finished for choice in self._choices if choice.finished is not None]
        if len(ends) < len(self._choices):
            raise UpstreamError("The inference ended without a reason: its answer is not complete.")
        output_tokens = sum(end.output_tokens for end in ends)
        return msgspec.json.encode(
            {
                "id": self._id,
                "object": "chat.completion",
                "created": self._created,
                "model": self._model,
                "choices": [
                    _choice(index, choice, end, self._custom_tools)
                    for index, (choice, end) in enumerate(zip(self._choices, ends, strict=True))
                ],
                "usage": {
                    "prompt_tokens": self._started.prompt_tokens,
                    "completion_tokens": output_tokens,
                    "total_tokens": self._started.prompt_tokens + output_tokens,
                    "prompt_tokens_details": {"cached_tokens": self._started.cached_tokens},
                    "completion_tokens_details": {"reasoning_tokens": sum(end.reasoning_tokens for end in ends)},
                },
            }
        )


def _choice(index: int, choice: _Choice, end: Finished, custom_tools: frozenset[str]) -> dict[str, Any]:
    text = "".join(choice.text)
    message: dict[str, Any] = {
        "role": "assistant",
        "content": None if choice.calls and not text else text,
        "refusal": None,
    }
    if choice.reasoning:
        message["reasoning_content"] = message["reasoning"] = "".join(choice.reasoning)
    if choice.calls:
        message["tool_calls"] = [_call(call, call.name in custom_tools) for call in choice.calls]
    logprobs = None
    if choice.logprobs:
        logprobs = {
            "content": [
                _token(token) | {"top_logprobs": [_token(other) for other in token.top]} for token in choice.logprobs
            ],
            "refusal": None,
        }
    fields = {"index": index, "message": message, "logprobs": logprobs, "finish_reason": end.reason}
    return fields if end.stop_string is None else fields | {"stop_reason": end.stop_string}


def _call(call: _Call, is_custom: bool) -> dict[str, Any]:
    arguments = "".join(call.arguments)
    if is_custom:
        return {"id": call.id, "type": "custom", "custom": {"name": call.name, "input": custom_input(arguments)}}
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _token(token: TokenLogprob) -> dict[str, Any]:
    logprob = token.logprob if math.isfinite(token.logprob) else _IMPOSSIBLE
    return {"token": token.token, "bytes": list(token.utf8), "logprob": logprob}
