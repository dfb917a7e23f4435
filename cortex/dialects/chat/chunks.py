"""Reader of other servers' chat responses, as inference events; tolerant of their differences.

Servers leave out indices, repeat names, send empty lists, call reasoning ``reasoning`` or ``reasoning_content``, and
report usage with the last choice, after it, or not at all. A finish is held back until usage can have come.
"""

import secrets
from typing import Annotated, Any

import msgspec

from cortex.wire.errors import ErrorInfo, UpstreamError
from cortex.wire.events import (
    Failed,
    Finished,
    FinishReason,
    InferenceEvent,
    ReasoningDelta,
    Started,
    TextDelta,
    TokenLogprob,
    Tokens,
    ToolCallDelta,
)

DONE = b"[DONE]"


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | dict[str, Any] | None = None


class _Call(msgspec.Struct):
    index: int | None = None
    id: str | None = None
    function: _Function | None = None


class _Alternative(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[Annotated[int, msgspec.Meta(ge=0, le=255)]] | None = None

    def token_logprob(self) -> TokenLogprob:
        """Return the token as a ``TokenLogprob``."""
        utf8 = bytes(self.bytes) if self.bytes is not None else self.token.encode("utf-8", "replace")
        return TokenLogprob(self.token, utf8, self.logprob)


class _Token(_Alternative):
    top_logprobs: list[_Alternative] | None = None

    def token_logprob(self) -> TokenLogprob:
        """Return the token as a ``TokenLogprob``."""
        alternatives = tuple(token.token_logprob() for token in self.top_logprobs or ())
        return msgspec.structs.replace(super().token_logprob(), top=alternatives)


class _Logprobs(msgspec.Struct):
    content: list[_Token] | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[_Call] | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    delta: _Delta | None = None
    message: _Delta | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: _Logprobs | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: Tokens | None = None


class _OutputDetails(msgspec.Struct):
    reasoning_tokens: Tokens | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: Tokens | None = None
    completion_tokens: Tokens | None = None
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _OutputDetails | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: msgspec.Raw = msgspec.Raw(b"null")


class _ErrorBody(msgspec.Struct):
    message: str | None = None
    code: str | int | None = None
    param: str | None = None


_DECODER = msgspec.json.Decoder(_Chunk)
_ERROR_DECODER = msgspec.json.Decoder(_ErrorBody | str)


class ChunkReader:
    """Reads the data of a stream's SSE events, one after another, or one whole answer."""

    def __init__(self) -> None:
        self.ended = False
        self.plain: tuple[str, str] | None = None
        """Kind and text of the last chunk, if it held a piece of text alone."""
        self._usage: _Usage | None = None
        self._begun = False
        self._finish: _Choice | None = None
        self._calls: list[str] = []
        self._by_index: dict[int, int] = {}
        self._by_id: dict[str, int] = {}

    def read(self, data: bytes) -> list[InferenceEvent]:
        """Return the events of one SSE event's data.

        Raises:
            UpstreamError: it is no chunk of a chat.
        """
        self.plain = None
        if self.ended:
            return []
        if data.strip() == DONE:
            return self.close()
        chunk = _decode(data)
        if bytes(chunk.error) != b"null":
            self.ended = True
            return [Failed(_error(chunk.error))]
        events: list[InferenceEvent] = []
        if chunk.usage is not None:
            self._usage = chunk.usage
        if not self._begun:
            self._begun = True
            events.append(self._started())
        for choice in chunk.choices or ():
            if choice.index == 0:
                self._read_choice(choice, events)
        if len(events) == 1 and chunk.usage is None and chunk.choices is not None and len(chunk.choices) == 1:
            only = events[0]
            if isinstance(only, TextDelta) and not only.logprobs:
                self.plain = ("text", only.text)
            elif isinstance(only, ReasoningDelta):
                self.plain = ("reasoning", only.text)
        return events

    def read_whole(self, body: bytes) -> list[InferenceEvent]:
        """Return the events of a response that was not streamed. Raises as :meth:`read` does."""
        events = self.read(body)
        if self._finish is None and not self.ended:
            raise UpstreamError("The node's answer has no choice that has finished.")
        return events + self.close()

    def close(self) -> list[InferenceEvent]:
        """Return the last events; none if the response has not finished."""
        if self._finish is None or self.ended:
            return []
        self.ended = True
        usage = self._usage or _Usage()
        details = usage.completion_tokens_details
        end = Finished(
            _reason(self._finish.finish_reason, bool(self._calls)),
            usage.completion_tokens or 0,
            (details.reasoning_tokens if details else 0) or 0,
            self._finish.stop_reason if isinstance(self._finish.stop_reason, str) else None,
        )
        # Sent again: at the start the counts were not known yet.
        return [self._started(), end]

    def _started(self) -> Started:
        usage = self._usage or _Usage()
        details = usage.prompt_tokens_details
        return Started(usage.prompt_tokens or 0, (details.cached_tokens if details else 0) or 0)

    def _read_choice(self, choice: _Choice, events: list[InferenceEvent]) -> None:
        delta = choice.delta or choice.message or _Delta()
        if thought := delta.reasoning_content or delta.reasoning:
            events.append(ReasoningDelta(thought))
        logprobs = choice.logprobs.content if choice.logprobs is not None else None
        if (text := delta.content or delta.refusal or "") or logprobs:
            events.append(TextDelta(text, logprobs=tuple(token.token_logprob() for token in logprobs or ())))
        for place, call in enumerate(delta.tool_calls or ()):
            if call.index is None and choice.message is not None:
                call.index = place  # a whole answer has each call once
            self._read_call(call, events)
        if choice.finish_reason is not None and self._finish is None:
            self._finish = choice

    def _read_call(self, call: _Call, events: list[InferenceEvent]) -> None:
        """Add a piece of a call."""
        function = call.function or _Function()
        given = function.arguments
        arguments = given if isinstance(given, str) else msgspec.json.encode(given).decode() if given else ""
        number = self._number(call, function)
        if number is None:
            if not function.name:
                return  # a piece of a call that has no name: there is nothing to call
            number = len(self._calls)
            # Ids that a server leaves out or gives twice are replaced: results refer to them.
            id = call.id if call.id and call.id not in self._by_id else f"call_{secrets.token_hex(12)}"
            self._calls.append(call.id or "")
            self._by_id.setdefault(call.id or id, number)
            if call.index is not None:
                self._by_index[call.index] = number
            events.append(ToolCallDelta(number, id, function.name, arguments))
        elif arguments:
            events.append(ToolCallDelta(number, arguments=arguments))

    def _number(self, call: _Call, function: _Function) -> int | None:
        """Return the call that a piece continues; ``None`` if it begins one.

        That is the call of its index, unless another id says otherwise: some servers count every call from zero, some
        make an id for each piece. Without an index it is that of its id, else the last one, unless it has a name.
        """
        by_id = self._by_id.get(call.id) if call.id else None
        if call.index is None:
            if by_id is not None:
                return by_id
            return len(self._calls) - 1 if self._calls and not function.name else None
        number = self._by_index.get(call.index)
        if number is None:
            return None if function.name else by_id
        if call.id and call.id != self._calls[number]:
            return by_id if by_id is not None or function.name else number
        return number


def _decode(data: bytes) -> _Chunk:
    try:
        return _DECODER.decode(data)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        raise UpstreamError("The node answered with something else than a chat.") from None


def _error(raw: msgspec.Raw) -> ErrorInfo:
    try:
        body = _ERROR_DECODER.decode(raw)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        body = "The node failed."
    if isinstance(body, str):
        body = _ErrorBody(body)
    status = body.code if isinstance(body.code, int) and 400 <= body.code < 600 else UpstreamError.status
    code = body.code if isinstance(body.code, str) else UpstreamError.code
    return ErrorInfo(status, code, body.message or "The node failed.", body.param)


def _reason(reported: str | None, called: bool) -> FinishReason:
    if reported == "length":
        return FinishReason.LENGTH
    return FinishReason.TOOL_CALLS if called or reported in ("tool_calls", "function_call") else FinishReason.STOP
