"""A request in any dialect as a chat, and a chat's answer back in that dialect: for nodes that speak chat alone.

The request is decoded by its dialect as a neuron would decode it, and written as a chat. The node's response is read as
inference events, which the dialect's own encoder writes. Parameters that a chat does not have are refused by name.
"""

import functools
import re

import msgspec

from cortex._fast.chat_events import ChatEvents
from cortex.dialects.call import Answering, Encoder, GenerationCall
from cortex.dialects.chat.body import chat_body
from cortex.dialects.chat.chunks import ChunkReader
from cortex.dialects.dialect import Dialect
from cortex.dialects.embeddings.request import EmbeddingCall
from cortex.dialects.responses.context import NO_CONTEXT, ResponseContext
from cortex.wire.errors import ContextLengthError, ErrorInfo


class Translation:
    """A request as a chat; decoded on first use, as most nodes need no translation."""

    def __init__(self, dialect: Dialect, body: bytes, answering: Answering) -> None:
        self._dialect = dialect
        self._given = body
        self._answering = answering

    @functools.cached_property
    def call(self) -> GenerationCall:
        """The decoded request. Raises :class:`InvalidRequestError`."""
        call = self._dialect.decode(self._given)
        assert not isinstance(call, EmbeddingCall)  # which no dialect that is translated has
        return call

    @functools.cached_property
    def _body(self) -> bytes:
        return chat_body(self.call.request, stream=self.call.stream)

    def body(self) -> bytes:
        """Return the body of the chat request. Raises :class:`InvalidRequestError` if the request is wrong."""
        return self._body

    def begin(self) -> "TranslatedAnswer":
        """Return the reader of a node's response."""
        return TranslatedAnswer(self.call.encoder(self._answering))


class TranslatedAnswer:
    """Translator of a node's response from chat to the caller's dialect."""

    def __init__(self, encoder: Encoder) -> None:
        self._events = ChatEvents()
        self._encoder = encoder

    def sse_events(self, data: bytes) -> bytes:
        """Return the SSE events for some bytes of the node's stream. Raises :class:`UpstreamError`."""
        events = self._events.feed(data)
        return self._encoder.sse_events(events) if events else b""

    def end(self) -> bytes:
        """Return the SSE events for the end of the node's stream: the last ones, if the terminator was missing."""
        return self._encoder.sse_events(self._events.close())

    def whole(self, body: bytes) -> bytes:
        """Return the whole response for a response that is not a stream. Raises :class:`UpstreamError`, RemoteError."""
        self._encoder.sse_events(ChunkReader().read_whole(body))
        return self._encoder.whole()


def to_chat(dialect: Dialect, body: bytes, context: ResponseContext = NO_CONTEXT, name: str = "") -> Translation | None:
    """Return a request as a chat; ``None`` if its dialect is not translated.

    A response repeats ``context``; answers have ``name`` for the model, unless that is empty.
    """
    return Translation(dialect, body, Answering(name, context=context)) if dialect.is_translated else None


def translated_error(error: ErrorInfo) -> ErrorInfo:
    """Return another server's error, with our code if its message is about a prompt that is too long."""
    lengths = _TOO_LONG.search(error.message)
    if lengths is None:
        return error
    context, prompt = lengths["context"], lengths["prompt"]
    return msgspec.structs.replace(
        error,
        status=ContextLengthError.status,
        code=ContextLengthError.code,
        context_tokens=int(context or 0),
        prompt_tokens=int(prompt or 0),
    )


_TOO_LONG = re.compile(
    r"maximum context length(?: is (?P<context>\d{1,9}) tokens)?(?:\D{1,200}(?P<prompt>\d{1,9})(?!\d))?"
    r"|exceeds the available context size"
)
