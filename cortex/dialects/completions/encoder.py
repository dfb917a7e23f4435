"""The answers of OpenAI's text completions: SSE events of a stream, or the whole of it.

Clients of this dialect are few and their streams short: the SSE events are made here, without Cython. A chunk that is
not the last of its choice has a null ``finish_reason``, as OpenAI's own have, although the type of its SDK knows none.
A token that is not valid text is named ``bytes:\\xe2``, as OpenAI did, so that no two tokens have one name.
"""

import codecs
import math
from collections.abc import Sequence
from typing import Any

import msgspec

from cortex.dialects.openai_errors import error_body
from cortex.wire.errors import ErrorInfo, InvalidRequestError, RemoteError, UpstreamError
from cortex.wire.events import (
    Failed,
    Finished,
    FinishReason,
    InferenceEvent,
    PromptEcho,
    ReasoningDelta,
    Started,
    TextDelta,
    TokenLogprob,
)

MAX_NUMBERS = 1_000_000
"""Log probabilities in one answer: some 150 MB of them."""

IMPOSSIBLE = -9999.0
"""OpenAI's number for an impossible token: JSON has no infinity."""


class _Scores:
    """The log probabilities of one choice, in the four lists that this dialect has."""

    def __init__(self) -> None:
        self.tokens: list[str] = []
        self.token_logprobs: list[float | None] = []
        self.top_logprobs: list[dict[str, float] | None] = []
        self.text_offset: list[int] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_characters = 0
        self.num_numbers = 0
        """Number of log probabilities so far, alternatives included."""

    def add(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Add tokens; return them as the four lists of a chunk."""
        start = len(self.tokens)
        for token in tokens:
            self.num_numbers += 1 + len(token.top)
            self.text_offset.append(self._num_characters)
            self._num_characters += len(self._decoder.decode(token.utf8))
            self.tokens.append(_name(token))
            self.token_logprobs.append(_number(token.logprob))
            self.top_logprobs.append(_alternatives(token))
        return self.lists(start)

    def add_prompt(self, echo: PromptEcho) -> dict[str, Any]:
        """Add tokens of a prompt; the first has no probability."""
        start = len(self.tokens)
        self.add(echo.logprobs)
        if start == 0 and self.tokens:
            self.token_logprobs[0] = self.top_logprobs[0] = None
            # The text has neither the model's first token nor a space that a tokenizer adds.
            name = _name(echo.logprobs[0])
            if not echo.text.startswith(name):
                without = name.removeprefix(" ")
                excess = 1 if without and without != name and echo.text.startswith(without) else self._width(echo)
                self._num_characters -= excess
                self.text_offset = [max(0, offset - excess) for offset in self.text_offset]
        return self.lists(start)

    @staticmethod
    def _width(echo: PromptEcho) -> int:
        """Return the number of characters of a prompt's first token within a text."""
        return len(echo.logprobs[0].utf8.decode(errors="ignore"))

    def lists(self, start: int = 0) -> dict[str, Any]:
        """Return the lists from the token of that number on."""
        return {
            "tokens": self.tokens[start:],
            "token_logprobs": self.token_logprobs[start:],
            "top_logprobs": self.top_logprobs[start:],
            "text_offset": self.text_offset[start:],
        }


class Completion:
    """Encoder of a completion: as SSE events, or whole for a request that is not streamed.

    ``num_choices`` counts the choices of all prompts; with ``scores`` the answer has log probabilities. Adding events
    raises :exc:`InvalidRequestError` if these are too many for one answer.
    """

    def __init__(
        self,
        id: str,
        model: str,
        created: int,
        num_choices: int = 1,
        include_usage: bool = False,
        report_usage: bool = False,
        scores: bool = False,
    ) -> None:
        self._head = {"id": id, "object": "text_completion", "created": created, "model": model}
        self._include_usage = include_usage
        self._report_usage = report_usage
        self._texts: list[list[str]] = [[] for _ in range(num_choices)]
        self._scores = [_Scores() for _ in range(num_choices)] if scores else None
        self._ends: list[Finished | None] = [None] * num_choices
        self._num_open = num_choices
        self._num_numbers = 0
        self._prompt_tokens = self._cached_tokens = 0
        self._error: ErrorInfo | None = None

    def sse_events(self, events: Sequence[InferenceEvent]) -> bytes:
        """Return the SSE events of a batch of events; events after the end have none."""
        return b"".join([self._sse_event(event) for event in events])

    def whole(self) -> bytes:
        """Return the whole completion.

        Raises :exc:`RemoteError` if the inference failed, :exc:`UpstreamError` if a choice did not come to its end.
        """
        if self._error is not None:
            raise RemoteError(self._error)
        if self._num_open:
            raise UpstreamError("The inference ended without a reason: its answer is not complete.")
        choices = [
            self._choice(index, "".join(texts), end, None if self._scores is None else self._scores[index].lists())
            for index, (texts, end) in enumerate(zip(self._texts, self._ends, strict=True))
        ]
        return msgspec.json.encode(self._head | {"choices": choices, "usage": self._usage()})

    def _sse_event(self, event: InferenceEvent) -> bytes:
        if self._error is not None or not self._num_open:
            return b""
        match event:
            case Started(prompt_tokens, cached_tokens):
                # There is one for each prompt.
                self._prompt_tokens += prompt_tokens
                self._cached_tokens += cached_tokens
            case Failed(error):
                self._error = error
                return b"data: " + error_body(error) + b"\n\n"
            case PromptEcho(text, choice) if self._ends[choice] is None:
                return self._text_chunk(choice, text, self._add(choice, event))
            case TextDelta(text, choice, logprobs) if self._ends[choice] is None and (text or logprobs):
                return self._text_chunk(choice, text, self._add(choice, event))
            # A prompt without a template has no reasoning: what a harness takes for it is output like any other.
            case ReasoningDelta(text, choice) if self._ends[choice] is None and text:
                return self._text_chunk(choice, text, None)
            case Finished(choice=choice) if self._ends[choice] is None:
                self._ends[choice] = event
                self._num_open -= 1
                return self._chunk([self._choice(choice, "", event, None)]) + (b"" if self._num_open else self._last())
        return b""

    def _add(self, choice: int, event: PromptEcho | TextDelta) -> dict[str, Any] | None:
        """Return the log probabilities of a chunk, if they were asked for."""
        if self._scores is None:
            return None
        scores = self._scores[choice]
        before = scores.num_numbers
        logprobs = scores.add_prompt(event) if isinstance(event, PromptEcho) else scores.add(event.logprobs)
        self._num_numbers += scores.num_numbers - before
        if self._num_numbers > MAX_NUMBERS:
            raise InvalidRequestError(
                f"Invalid 'logprobs': the prompts and answers of this call have more than {MAX_NUMBERS} log "
                "probabilities. Ask for fewer alternatives, or for fewer prompts in a call.",
                param="logprobs",
            )
        return logprobs

    def _text_chunk(self, choice: int, text: str, logprobs: dict[str, Any] | None) -> bytes:
        self._texts[choice].append(text)
        return self._chunk([self._choice(choice, text, None, logprobs)])

    def _last(self) -> bytes:
        usage = self._usage()
        last = self._chunk([], {"usage": usage}) if self._include_usage else b""
        if self._report_usage:
            details = usage.pop("prompt_tokens_details")
            last += b": usage " + msgspec.json.encode(usage | details) + b"\n\n"
        return last + b"data: [DONE]\n\n"

    def _chunk(self, choices: list[Any], more: dict[str, Any] | None = None) -> bytes:
        return b"data: " + msgspec.json.encode(self._head | {"choices": choices} | (more or {})) + b"\n\n"

    def _choice(self, index: int, text: str, end: Finished | None, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        reason = (
            None if end is None else FinishReason.LENGTH if end.reason is FinishReason.LENGTH else FinishReason.STOP
        )
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _usage(self) -> dict[str, Any]:
        output_tokens = sum(end.output_tokens for end in self._ends if end is not None)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": output_tokens,
            "total_tokens": self._prompt_tokens + output_tokens,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
        }


def _name(token: TokenLogprob) -> str:
    try:
        return token.utf8.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.utf8)


def _number(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else IMPOSSIBLE


def _alternatives(token: TokenLogprob) -> dict[str, float]:
    """Return a token and its alternatives by name; of two with one name the likelier counts."""
    found: dict[str, float] = {}
    for other in (*token.top, token):
        found.setdefault(_name(other), _number(other.logprob))
    return found
