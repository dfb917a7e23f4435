"""Usage and finish of an answer, as any dialect or node writes them."""

import re

import msgspec

from cortex.wire.events import Tokens


class TokenDetails(msgspec.Struct, frozen=True):
    """Cached part of a prompt."""

    cached_tokens: Tokens | None = 0


class Usage(msgspec.Struct, frozen=True):
    """Token counts as a dialect or a neuron writes them."""

    prompt_tokens: Tokens | None = None
    completion_tokens: Tokens | None = None
    input_tokens: Tokens | None = None
    output_tokens: Tokens | None = None
    cached_tokens: Tokens | None = None
    cache_read_input_tokens: Tokens | None = None
    cache_creation_input_tokens: Tokens | None = None
    prompt_tokens_details: TokenDetails | None = None
    input_tokens_details: TokenDetails | None = None

    @property
    def tokens_in(self) -> int:
        """Number of prompt tokens. Anthropic counts tokens read from or written to a cache separately."""
        beside = (self.cache_read_input_tokens or 0) + (self.cache_creation_input_tokens or 0)
        return self.prompt_tokens or (self.input_tokens or 0) + beside

    @property
    def tokens_out(self) -> int:
        """Number of generated tokens."""
        return self.completion_tokens or self.output_tokens or 0

    @property
    def tokens_cached(self) -> int:
        """Number of prompt tokens found in the node's prefix cache."""
        details = self.prompt_tokens_details or self.input_tokens_details
        in_details = details.cached_tokens if details else 0
        return self.cached_tokens or self.cache_read_input_tokens or in_details or 0

    def counts(self) -> tuple[int, int, int]:
        """Return all three."""
        return self.tokens_in, self.tokens_out, self.tokens_cached


def read_usage(text: bytes) -> Usage | None:
    """Return the counts in a usage object; ``None`` if it is none."""
    try:
        return msgspec.json.decode(text, type=Usage)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


def clean_finish(finish: str) -> str:
    """Return an answer's finish for the log: a node chooses it, so that only a plain word is kept."""
    return finish if _FINISH.fullmatch(finish) else "other"


_FINISH = re.compile(r"[A-Za-z0-9_.-]{1,64}")
