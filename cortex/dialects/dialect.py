"""A path of a client API as one value: how its bodies are read, its answers written, and its errors.

The ``spec.py`` of each package here has the values of one API, and :mod:`cortex.dialects.registry` lists them all. What
both daemons serve, describe and accept as a name follows from the list. A value knows neither HTTP nor nodes.
"""

import functools
import pathlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from cortex._fast.peek import PeekError, peek
from cortex.dialects.call import GenerationCall
from cortex.dialects.embeddings.request import EmbeddingCall
from cortex.dialects.envelope import OPENAI, Envelope
from cortex.dialects.openai_errors import error_body
from cortex.dialects.parameters import Parameters
from cortex.dialects.schema import Schema
from cortex.dialects.usage import Usage, clean_finish, read_usage
from cortex.wire.errors import ErrorInfo
from cortex.wire.events import Tokens

TAIL_CHUNKS = 4
"""Number of chunks kept of a stream: finish, usage, terminator and the node's own usage may come one by one."""

COMMENT = b": keep-alive\n\n"
"""Only heartbeat that OpenAI's clients accept: an event without their payload is an error to them."""


class JsonObject(msgspec.Struct, frozen=True):
    """An object of any members."""


class WholeAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Minimum content of an answer that is not streamed."""

    usage: msgspec.Raw = msgspec.Raw(b"")
    """Usage object; empty if the answer has none."""

    @property
    def finish(self) -> str | None:
        """Reason for the answer's end, if it has one."""
        return None


class Counted(WholeAnswer, frozen=True):
    """Answer with a count of tokens."""

    input_tokens: Tokens


def data_failure(error: ErrorInfo, first: bytes, last: bytes) -> bytes:
    """Return the SSE event of OpenAI's envelope, which ends a stream in failure. No ``[DONE]`` follows it."""
    return b"data: " + error_body(error) + b"\n\n"


@dataclass(frozen=True, eq=False)
class Dialect:
    """Path of a client API."""

    name: str
    """Name of the API, which all its paths share: in logs, metrics, configuration and discovery."""
    path: str
    summary: str
    """Sentence for the OpenAPI document."""
    parameters: Parameters[Any]
    """Members of a body."""
    decode: Callable[[bytes], GenerationCall | EmbeddingCall]
    """Decoder of a body; raises :class:`InvalidRequestError`."""
    answer: Schema
    """Schema of an answer that is not streamed."""
    minimum: type[WholeAnswer]
    """Minimum content of an answer that is not streamed."""
    finish: "re.Pattern[bytes]" = re.compile(rb'"finish_reason": ?"(\w+)"')
    """Pattern of the finish in a stream's last bytes."""
    heartbeat: bytes = COMMENT
    """SSE event without content, which the dialect's clients accept between any two others."""
    envelope: Envelope = OPENAI
    """Form of errors before the first byte."""
    failure: Callable[[ErrorInfo, bytes, bytes], bytes] = data_failure
    """Encoder of the SSE events that end a stream in failure, given the first and the last bytes sent of it."""
    conversation: str = "messages"
    """Member of a body that has the conversation, for errors."""
    streams: bool = True
    """Whether answers can be streamed."""
    generates: bool = True
    """Whether answers have generated tokens."""
    is_translated: bool = False
    """Whether a node that speaks chat alone can serve it: see :mod:`cortex.dialects.translate`."""
    page: pathlib.Path | None = None
    """Module of the dashboard's playground; see :mod:`cortex.dashboard.assets`."""

    @functools.cached_property
    def target(self) -> bytes:
        """Request target of the path."""
        return self.path.encode()

    @functools.cached_property
    def _decoder(self) -> "msgspec.json.Decoder[WholeAnswer]":
        return msgspec.json.Decoder(self.minimum)

    def read(self, body: bytes) -> tuple[Usage | None, str] | None:
        """Return the usage and the finish of an answer that was not streamed, as far as it has them.

        ``None`` if it is no answer: no complete JSON object, or one of another kind.
        """
        try:
            peek(body)
            answer = self._decoder.decode(body)
        except (PeekError, msgspec.MsgspecError, ValueError, RecursionError):
            return None
        usage = read_usage(bytes(answer.usage)) if answer.usage else None
        return usage, clean_finish(answer.finish) if answer.finish else ""

    def loading(self, model: str, progress: float) -> bytes:
        """Return a heartbeat with the progress of a model's load, where the dialect's heartbeat is a comment."""
        if not self.heartbeat.startswith(b":"):
            return self.heartbeat
        return f": loading {model} {progress:.0%}\n\n".encode()
