"""Decoded bodies, and the encoders of their answers: what the dialects have in common of both."""

from collections.abc import Sequence
from typing import Protocol

import msgspec

from cortex.dialects.responses.context import NO_CONTEXT, ResponseContext
from cortex.wire.events import InferenceEvent
from cortex.wire.request import InferenceRequest


class Answering(msgspec.Struct, frozen=True):
    """Wishes about an answer that are not in the body."""

    name: str = ""
    """Model's name in the answer, where that is not the request's."""
    report_usage: bool = False
    """Whether a stream ends with its usage as a comment."""
    context: ResponseContext = NO_CONTEXT
    """Members that a response repeats."""


class Encoder(Protocol):
    """Encoder of one answer, from inference events."""

    def sse_events(self, events: Sequence[InferenceEvent], /) -> bytes:
        """Return the SSE events of a batch of events."""

    def whole(self) -> bytes:
        """Return the answer of a request that is not streamed, from all events so far.

        Raises :class:`RemoteError` if the inference failed, :class:`UpstreamError` if it has not come to its end.
        """


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """A decoded body of any dialect."""

    ignored: tuple[str, ...] = ()
    """Unknown members of the body."""
    num_omitted: int = 0
    """Number of content parts of earlier messages that were replaced by text."""


class GenerationCall(Call, frozen=True):
    """A decoded body that a model answers with events."""

    request: InferenceRequest
    stream: bool

    @property
    def requests(self) -> tuple[InferenceRequest, ...]:
        """The requests to the model, which are answered together."""
        return (self.request,)

    def encoder(self, answering: Answering) -> Encoder:
        """Return the encoder of the answer."""
        raise NotImplementedError
