"""A body of ``/v1/lines`` to an ``InferenceRequest``, and the encoder of its answer."""

from collections.abc import Sequence

import msgspec

from cortex.dialects.call import Answering, GenerationCall
from cortex.dialects.openai_errors import error_body
from cortex.dialects.parameters import Parameters
from cortex.wire.errors import ErrorInfo, RemoteError
from cortex.wire.events import Failed, Finished, InferenceEvent, Started, TextDelta
from cortex.wire.request import InferenceRequest, Message, Role


class LinesBody(msgspec.Struct):
    """A request body."""

    model: str
    text: str
    stream: bool = False


PARAMETERS = Parameters(LinesBody)


class LinesCall(GenerationCall, frozen=True):
    """A decoded call."""

    def encoder(self, answering: Answering) -> "LinesEncoder":
        """Return the encoder of the answer."""
        return LinesEncoder(answering.name or self.request.model)


class LinesEncoder:
    """Encoder of an answer: a line for each piece of text."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._texts: list[str] = []
        self._tokens = [0, 0]
        self._error: ErrorInfo | None = None

    def sse_events(self, events: Sequence[InferenceEvent], /) -> bytes:
        """Return the SSE events of a batch of events."""
        return b"".join(map(self._sse_event, events))

    def _sse_event(self, event: InferenceEvent) -> bytes:
        match event:
            case Started(prompt_tokens):
                self._tokens[0] = prompt_tokens
            case TextDelta(text):
                self._texts.append(text)
                return b"data: " + msgspec.json.encode({"text": text}) + b"\n\n"
            case Failed(error):
                self._error = error
                return b"data: " + error_body(error) + b"\n\n"
            case Finished():
                self._tokens[1] = event.output_tokens
                end = msgspec.json.encode({"usage": self._usage(), "end": event.reason})
                return b"data: " + end + b"\n\ndata: [DONE]\n\n"
        return b""

    def whole(self) -> bytes:
        """Return the answer. Raises :class:`RemoteError` if the inference failed."""
        if self._error is not None:
            raise RemoteError(self._error)
        return msgspec.json.encode({"model": self._model, "lines": self._texts, "usage": self._usage()})

    def _usage(self) -> dict[str, int]:
        return dict(zip(("prompt_tokens", "completion_tokens"), self._tokens, strict=True))


def decode(body: bytes) -> LinesCall:
    """Decode a request body. Raises :class:`InvalidRequestError`."""
    parsed, ignored = PARAMETERS.decode(body)
    request = InferenceRequest(parsed.model, (Message(Role.USER, parsed.text),))
    return LinesCall(request, parsed.stream, ignored=ignored)
