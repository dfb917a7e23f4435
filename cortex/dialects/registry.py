"""The dialects: from this list come the routes of both daemons, the names in configuration and discovery, and more."""

from cortex.dialects.chat.spec import CHAT
from cortex.dialects.completions.spec import COMPLETIONS
from cortex.dialects.dialect import Dialect
from cortex.dialects.embeddings.spec import EMBEDDINGS
from cortex.dialects.envelope import OPENAI, Envelope
from cortex.dialects.messages.spec import COUNT_TOKENS, MESSAGES
from cortex.dialects.openapi import Operation
from cortex.dialects.responses.spec import COMPACT, INPUT_TOKENS, RESPONSES

__all__ = [
    "CHAT",
    "COMPACT",
    "COMPLETIONS",
    "COUNT_TOKENS",
    "DIALECTS",
    "EMBEDDINGS",
    "INPUT_TOKENS",
    "MESSAGES",
    "RESPONSES",
    "envelope_for",
    "names",
    "operations",
]

DIALECTS: tuple[Dialect, ...] = (
    CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, COMPACT, INPUT_TOKENS, MESSAGES, COUNT_TOKENS,
)  # fmt: skip
"""Every path of inference."""


def names() -> tuple[str, ...]:
    """Return the names of the APIs."""
    return tuple(dict.fromkeys(dialect.name for dialect in DIALECTS))


def envelope_for(path: str) -> Envelope:
    """Return the form of errors at ``path``, whether or not it exists: OpenAI's, but below another API's path."""
    below = (one for one in DIALECTS if path == one.path or path.startswith(f"{one.path}/"))
    return next((one.envelope for one in below), OPENAI)


def operations() -> tuple[Operation, ...]:
    """Return the operations of inference, for the OpenAPI document."""
    return tuple(
        Operation("POST", one.path, one.summary, one.answer, one.parameters.body, one.streams, envelope=one.envelope)
        for one in DIALECTS
    )
