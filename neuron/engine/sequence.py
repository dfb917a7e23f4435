"""A sequence: one request inside the engine, from its prompt to its last token.

Plain state without torch and without decisions: the scheduler moves it, the plan reads it.
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


class SequenceState(StrEnum):
    """Where a sequence is. A running one prefills until all it has is computed, then decodes."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    """Waiting again, ahead of those who never ran: its pages went to an older one."""
    FINISHED = "finished"


class Constrained(Protocol):
    """What the engine asks of a grammar: see :class:`neuron.engine.constraint.Constraint`."""

    def mask(self) -> Int32Array | None:
        """Return which tokens may come next, a bit each; ``None`` if all may."""

    def accept(self, token: int) -> bool:
        """Take the next token; return whether the output is complete."""


class Sequence:
    """``tokens`` holds prompt and output with room for ``max_tokens`` of output.

    ``num_computed`` of them are in the cache once all that was launched has run, ``num_settled`` of these are known to
    be sound. In between a step is under way, and ``num_awaited`` tokens are being sampled; each one's place in
    ``tokens`` holds -1 - i meanwhile, where i is its row among those that its step samples.
    """

    __slots__ = (
        "acceptance_rate",
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
        "state",
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
    ) -> None:
        self.number = number
        self.num_prompt = self.num_tokens = self.num_fill = len(prompt)
        self.max_tokens = max_tokens
        self.eos = eos
        self.sampler = sampler
        self.principal = principal
        """On whose behalf it runs: slots are shared out among principals."""
        self.priority = priority
        """The principal's."""
        self.constraint = constraint
        self.pooling = pooling
        """It ends with its prompt, as one vector, if this is set."""
        self.pooled: Float32Array | None = None
        """The sum of its hidden states so far, where their mean is wanted."""
        self.scores_prompt = False
        """Whether the log probabilities of its prompt's tokens are wanted, so that each row of it must be computed."""
        self.num_scored = 0
        """The rows of its prompt whose next token was scored, or is being in a step under way."""
        self.tokens: Int32Array = np.empty(len(prompt) + max_tokens, np.int32)
        self.tokens[: len(prompt)] = prompt
        self.drafts: Int32Array = NO_TOKENS
        """Draft tokens, to be verified in its next step."""
        self.acceptance_rate = FIRST_ACCEPTANCE
        self.num_computed = self.num_settled = 0
        self.num_awaited = 0
        self.num_cached = 0
        """How much of the prompt was in the cache when it first ran."""
        self.num_drafted = 0
        """Tokens in the draft model's cache, where there is one."""
        self.pages: Int32Array = NO_PAGES
        self.root = root
        """What stands before the first of its keys: with another root no page is shared."""
        self.keys: list[bytes] = []
        """Of its first full pages, as far as anyone asked."""
        self.num_published = 0
        """How many of its pages have been offered to the pool."""
        self.slot = -1
        """Row of the page table and of the sampler's tables while running."""
        self.state = SequenceState.WAITING

    @property
    def num_output(self) -> int:
        """Return how many tokens were generated."""
        return self.num_tokens - self.num_prompt

    @property
    def num_cache_tokens(self) -> int:
        """Return how many tokens the cache must hold in the end: the last one generated is never read back."""
        return self.num_prompt + self.max_tokens - 1

    @property
    def prefills(self) -> bool:
        """Return whether part of what it had when it was admitted is still to be computed.

        That is ``num_fill`` tokens: the prompt, and after a preemption the output so far as well.
        """
        return self.num_computed < self.num_fill

    @property
    def in_flight(self) -> bool:
        """Return whether a step with it has been launched whose outcome is not known yet."""
        return self.num_computed != self.num_settled

    @property
    def decodes(self) -> bool:
        """Return whether it can take part in the next step with its next token.

        While its step is in flight it can if only the device needs that token: a grammar and the verification of draft
        tokens need it on the host.
        """
        if self.prefills or self.pooling is not None:
            return False
        if not self.num_awaited:
            return True
        return self.num_awaited == 1 and self.constraint is None and self.num_output + 1 < self.max_tokens

    def num_to_score(self, count: int) -> int:
        """Return how many of its next ``count`` rows are followed by a token of the prompt that is still to be scored.

        The last row's next token is the first of the output.
        """
        if not self.scores_prompt:
            return 0
        return max(0, min(self.num_computed + count, self.num_prompt - 1) - max(self.num_computed, self.num_scored))

    def await_tokens(self, count: int, row: int) -> None:
        """Note that a launched step samples ``count`` tokens of it, the first as its ``row``."""
        self.tokens[self.num_tokens + self.num_awaited] = -1 - row
        self.num_awaited += count

    def append(self, token: int) -> None:
        """Add one generated token."""
        self.tokens[self.num_tokens] = token
        self.num_tokens += 1
