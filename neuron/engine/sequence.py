"""A sequence: one request inside the engine, from its prompt to its last token.

Plain state without torch and without decisions: the scheduler changes it, the plan reads it.
"""

from enum import StrEnum
from typing import Any, Final, Protocol

import numpy as np

from neuron.device.jobs import Pooling, SamplerSettings

Int32Array = np.ndarray[Any, np.dtype[np.int32]]
Float32Array = np.ndarray[Any, np.dtype[np.float32]]

NO_PAGES: Int32Array = np.empty(0, np.int32)
NO_TOKENS: Int32Array = np.empty(0, np.int32)
FIRST_ACCEPTANCE: Final = 0.7
"""Assumed acceptance rate of a sequence's draft tokens before any was verified."""


class SequenceStatus(StrEnum):
    """Status of a sequence. A running one prefills until all its tokens are computed, then decodes."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    """Waiting again, ahead of new sequences: its pages went to an older one."""
    FINISHED = "finished"


class Constrained(Protocol):
    """Interface of a grammar, see :class:`neuron.engine.constraint.Constraint`."""

    @property
    def free_tokens(self) -> int:
        """Return behind how many of the next tokens, whatever they are, all tokens are allowed."""

    def mask(self) -> Int32Array | None:
        """Return a mask of the next tokens, a bit each; ``None`` for all."""

    def accept(self, token: int) -> bool:
        """Take the next token; return whether the output is complete."""


class Sequence:
    """A request in the engine. ``tokens`` holds prompt and output, with space for ``max_tokens`` of output.

    ``num_computed`` of them are in the cache once all launched steps have run, ``num_settled`` of these are sound. In
    between a step is in flight and samples ``num_awaited`` tokens; the place of each in ``tokens`` holds -1 - i, where
    i is its row among the sampled ones.
    """

    __slots__ = (
        "acceptance_rate",
        "breakpoints",
        "constraint",
        "drafts",
        "eos",
        "keys",
        "max_tokens",
        "num_awaited",
        "num_cached",
        "num_computed",
        "num_drafted",
        "num_fill",
        "num_prompt",
        "num_published",
        "num_rejections",
        "num_replays",
        "num_scored",
        "num_settled",
        "num_tokens",
        "number",
        "pages",
        "pooled",
        "pooling",
        "principal",
        "priority",
        "root",
        "sampler",
        "scores_prompt",
        "slot",
        "status",
        "tokens",
    )  # fmt: skip

    def __init__(
        self,
        number: int,
        prompt: Int32Array,
        max_tokens: int,
        eos: frozenset[int],
        sampler: SamplerSettings,
        principal: str = "",
        priority: int = 0,
        pooling: Pooling | None = None,
        constraint: Constrained | None = None,
        root: bytes = b"",
        breakpoints: tuple[int, ...] = (),
    ) -> None:
        self.number = number
        self.num_prompt = self.num_tokens = self.num_fill = len(prompt)
        self.max_tokens = max_tokens
        self.eos = eos
        self.sampler = sampler
        self.principal = principal
        """Principal of the request; principals share the slots."""
        self.priority = priority
        """Priority of the principal."""
        self.constraint = constraint
        self.pooling = pooling
        """Pooling of an embedding, which ends with its prompt; ``None`` for a generation."""
        self.pooled: Float32Array | None = None
        """Sum of the hidden states so far, of a mean pooling."""
        self.scores_prompt = False
        """Whether the log probabilities of the prompt's tokens are wanted, for which each row is computed."""
        self.num_scored = 0
        """Rows of the prompt whose next token is scored, by steps in flight too."""
        self.tokens: Int32Array = np.empty(len(prompt) + max_tokens, np.int32)
        self.tokens[: len(prompt)] = prompt
        self.drafts: Int32Array = NO_TOKENS
        """Draft tokens, to be verified in its next step."""
        self.acceptance_rate = FIRST_ACCEPTANCE
        self.num_rejections = 0
        """Steps in succession of whose draft tokens none was accepted, up to a bound."""
        self.num_computed = self.num_settled = 0
        self.num_awaited = 0
        self.num_replays = 0
        """Accepted draft tokens of its last step, by which its state is still to be advanced."""
        self.num_cached = 0
        """Tokens of the prompt that were in the cache at first admission."""
        self.num_drafted = 0
        """Tokens in the draft model's cache, where there is one."""
        self.pages: Int32Array = NO_PAGES
        self.root = root
        """Parent of its first key: sequences with different roots share no pages."""
        self.breakpoints = breakpoints or (len(prompt),)
        """Numbers of tokens, ascending, behind which later prompts are expected to part from its own."""
        self.keys: list[bytes] = []
        """Keys of its first full pages, computed as needed."""
        self.num_published = 0
        """Number of its pages that have been published."""
        self.slot = -1
        """Slot of the running batch: row of the page table and of the sampler's tables; -1 if not running."""
        self.status = SequenceStatus.WAITING

    @property
    def num_output(self) -> int:
        """Return how many tokens were generated."""
        return self.num_tokens - self.num_prompt

    @property
    def num_cache_tokens(self) -> int:
        """Return how many tokens the cache must hold at the end: the last generated one is never read back."""
        return self.num_prompt + self.max_tokens - 1

    @property
    def prefills(self) -> bool:
        """Return whether part of the tokens it was admitted with is still to be computed.

        They are ``num_fill``: the prompt, and after a preemption the output so far as well.
        """
        return self.num_computed < self.num_fill

    @property
    def in_flight(self) -> bool:
        """Return whether a step with it has been launched and not settled."""
        return self.num_computed != self.num_settled

    @property
    def decodes(self) -> bool:
        """Return whether it can decode in the next step.

        While its step is in flight it can if only the device needs that token: a grammar and the verification of draft
        tokens need it on the host.
        """
        if self.prefills or self.pooling is not None:
            return False
        if not self.num_awaited:
            return True
        is_free = self.constraint is None or self.constraint.free_tokens > 0
        return self.num_awaited == 1 and is_free and self.num_output + 1 < self.max_tokens

    def num_to_score(self, count: int) -> int:
        """Return how many of its next ``count`` rows precede a token of the prompt that is still to be scored.

        The last row's next token is the first of the output.
        """
        if not self.scores_prompt:
            return 0
        return max(0, min(self.num_computed + count, self.num_prompt - 1) - max(self.num_computed, self.num_scored))

    def await_tokens(self, count: int, row: int) -> None:
        """Record that a launched step samples ``count`` tokens of it, the first in row ``row``."""
        self.tokens[self.num_tokens + self.num_awaited] = -1 - row
        self.num_awaited += count

    def append(self, token: int) -> None:
        """Add one generated token."""
        self.tokens[self.num_tokens] = token
        self.num_tokens += 1
