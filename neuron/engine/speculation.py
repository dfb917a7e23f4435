"""Speculative decoding: draft tokens are proposed and verified in one step, where that pays.

Verification is exact: the token at each draft's place is sampled as without it, from the same logits with the same
random number, and the first that differs rejects the rest. So the output is the same with and without, drawn or greedy;
only the number of tokens a step yields differs. It pays while a further row costs less than the tokens it is expected
to bring, which is computed before each step from :mod:`neuron.engine.step_timer` and the sequence's acceptance rate.

Leviathan et al., arXiv:2211.17192, for drafts of one token; prompt lookup (Saxena, 2023) proposes the continuation of
the last place where the sequence has the same three tokens.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from neuron.engine.plan import StepPlan
from neuron.engine.scheduler import Step
from neuron.engine.sequence import FIRST_ACCEPTANCE, NO_TOKENS, Int32Array, Sequence
from neuron.engine.step_timer import StepTimer
from neuron.layers.cache import MAX_DRAFTS

if TYPE_CHECKING:
    from neuron.engine.executor import Executor

NGRAM: Final = 3
"""Tokens that must have occurred before, in this order, for their continuation to be proposed."""
NEW_WEIGHT: Final = 0.2
"""Weight of one verified draft token in a sequence's acceptance rate."""
ACCEPTANCE_RECOVERY: Final = 0.0015
"""Increase of the rate by each step that had draft tokens and did not verify them, so that they are tried again: once
in some 60 steps, of which a try in vain costs 1 %. It is divided by the tries in vain so far."""
MOST_REJECTIONS: Final = 4
"""Most tries in vain that count, so that a text that begins to repeat is noticed within some 400 steps."""
USUAL_WEIGHT: Final = 0.05
"""Weight of one step of a sequence in the rate with which others begin."""
LEAST_USUAL: Final = 0.4
"""Least rate to begin with: another text may be more predictable."""
PLAIN_EVERY: Final = 16
"""Steps with draft tokens behind which comes one without, so that its time is known."""
RETRY_STEPS: Final = 32
"""Steps launched ahead of the one before them, and so without draft tokens, after which drafts are tried again: the try
costs a step's host work, which is 1 % of so many steps."""
LEAST_GAIN: Final = 1.05
"""Least expected gain in tokens per second for which drafts are verified: estimates are not exact."""


class Drafter(Protocol):
    """A source of draft tokens."""

    @property
    def executors(self) -> tuple["Executor", ...]:
        """Return the executors beside the model's own, whose samplers and caches know the same sequences."""

    def prepare(self, step: Step, plan: StepPlan) -> StepPlan:
        """Return the plan of a step with what the drafter wants of it."""

    def follow(self, step: Step) -> None:
        """Take note of a step that has been launched."""

    def available(self, sequences: list[Sequence], most: int) -> list[int]:
        """Return the number of draft tokens, up to ``most``, available for each of ``sequences``."""

    def cost_s(self, num_sequences: int, depth: int) -> float:
        """Return the seconds that ``depth`` draft tokens for each of ``num_sequences`` take to make."""

    def propose(self, sequences: list[Sequence], counts: list[int]) -> list[Int32Array]:
        """Return up to ``counts`` draft tokens of each sequence; :meth:`available` was called just before."""


class PromptLookup:
    """Prompt lookup: proposes the continuation of an earlier occurrence, at no cost."""

    executors: Final = ()

    def __init__(self) -> None:
        self._found: dict[int, Int32Array] = {}

    def prepare(self, step: Step, plan: StepPlan) -> StepPlan:
        """Return the plan: it reads the sequences alone."""
        return plan

    def follow(self, step: Step) -> None:
        """Do nothing."""

    def available(self, sequences: list[Sequence], most: int) -> list[int]:
        """See :class:`Drafter`."""
        self._found = {s.number: lookup(s.tokens[: s.num_tokens], most) for s in sequences}
        return [len(self._found[s.number]) for s in sequences]

    def cost_s(self, num_sequences: int, depth: int) -> float:
        """See :class:`Drafter`."""
        return 0.0

    def propose(self, sequences: list[Sequence], counts: list[int]) -> list[Int32Array]:
        """See :class:`Drafter`."""
        return [self._found[s.number][:count] for s, count in zip(sequences, counts, strict=True)]


def lookup(tokens: Int32Array, count: int) -> Int32Array:
    """Return up to ``count`` tokens that followed the last earlier place of the ``NGRAM`` tokens at the end."""
    if len(tokens) <= NGRAM:
        return NO_TOKENS
    ends = np.flatnonzero(tokens[NGRAM - 1 : -1] == tokens[-1]) + NGRAM - 1
    for back in range(1, NGRAM):
        ends = ends[tokens[ends - back] == tokens[-1 - back]]
    return tokens[ends[-1] + 1 :][:count] if len(ends) else NO_TOKENS


class Speculation:
    """Decides the number of draft tokens in a step, and learns from how many were accepted.

    A sequence gets at most ``max_drafts`` in a step; with 0 there is no speculation.
    """

    def __init__(self, drafter: Drafter, step_timer: StepTimer, max_drafts: int = MAX_DRAFTS) -> None:
        self.drafter = drafter
        self._step_timer = step_timer
        self._max_drafts = max_drafts
        self.num_proposed = self.num_accepted = 0
        self.usual_rate = FIRST_ACCEPTANCE
        """Acceptance rate with which a new sequence begins."""
        self._num_drafting = 0
        """Steps in succession with draft tokens."""
        self._num_ahead = RETRY_STEPS
        """Steps since drafts were tried last, or did pay."""

    def waits(self) -> bool:
        """Return whether to settle the step in flight before the next is scheduled, as draft tokens may pay in it.

        Their verification begins with a token that the host knows.
        """
        self._num_ahead += 1
        return bool(self._max_drafts) and self._num_ahead > RETRY_STEPS

    def propose(
        self,
        decoding: list[Sequence],
        can_verify: Callable[[int], bool],
        num_rows: int,
        reserve: Callable[[Sequence, int], int],
    ) -> None:
        """Give sequences of a step that are ``decoding`` up to ``num_rows`` draft tokens in all, if that should pay.

        ``can_verify`` takes a slot and returns whether several of its rows may be sampled at once. ``reserve`` reserves
        pages for so many tokens behind a sequence's next and returns how many there are.
        """
        num_decoding = len(decoding)
        if any(not sequence.num_awaited for sequence in decoding):
            self._num_ahead = 0
        if not self._max_drafts or self._step_timer.step_s(num_decoding) is None:
            return
        able = [sequence for sequence in decoding if not sequence.num_awaited and can_verify(sequence.slot)]
        most = min(self._max_drafts, num_rows // max(1, len(able)))
        if not able or most < 1:
            return
        available = self.drafter.available(able, most)
        is_plain = self._num_drafting == PLAIN_EVERY
        depth = 0 if is_plain else self._depth(num_decoding, able, available)
        self._num_drafting = self._num_drafting + 1 if depth else 0
        if depth or is_plain:
            self._num_ahead = RETRY_STEPS
        if not depth:
            for sequence, count in zip(able, available, strict=True):
                if count:
                    recovery = ACCEPTANCE_RECOVERY / (1 + sequence.num_rejections)
                    sequence.acceptance_rate = min(1.0, sequence.acceptance_rate + recovery)
            return
        counts = [reserve(sequence, min(depth, count)) for sequence, count in zip(able, available, strict=True)]
        for sequence, drafts in zip(able, self.drafter.propose(able, counts), strict=True):
            sequence.drafts = drafts

    def _depth(self, num_decoding: int, able: list[Sequence], available: list[int]) -> int:
        """Return the draft tokens for each that bring the most tokens per second; 0 if none do."""
        best, found = 0.0, 0
        for depth in range(max(available) + 1):
            gain, num_rows = float(num_decoding), num_decoding
            for sequence, count in zip(able, available, strict=True):
                likely = 1.0
                for _ in range(min(depth, count)):
                    likely *= sequence.acceptance_rate
                    gain += likely
                    num_rows += 1
            seconds = self._step_timer.step_s(num_rows)
            assert seconds is not None
            # A step with drafts is not launched ahead, so that it waits for the host.
            seconds += self.drafter.cost_s(len(able), depth) + self._step_timer.host_s if depth else 0.0
            rate = gain / seconds
            if rate > (best if found else best * LEAST_GAIN):
                best, found = rate, depth
        return found

    def verify(self, sequence: Sequence, sampled: list[int]) -> list[int]:
        """Return the first of the tokens ``sampled`` in a step, and those behind accepted draft tokens."""
        if len(sampled) == 1:
            return sampled
        drafts, num_accepted = sequence.drafts.tolist(), 0
        while num_accepted < len(drafts) and sampled[num_accepted] == drafts[num_accepted]:
            num_accepted += 1
        self.learn(sequence, num_accepted)
        sequence.drafts, sequence.num_replays = NO_TOKENS, num_accepted
        return sampled[: num_accepted + 1]

    def learn(self, sequence: Sequence, num_accepted: int) -> None:
        """Record that the first ``num_accepted`` of a sequence's draft tokens were accepted."""
        proposed = len(sequence.drafts)
        verified = num_accepted + (num_accepted < proposed)
        weight = 1.0 - (1.0 - NEW_WEIGHT) ** verified
        sequence.acceptance_rate += weight * (num_accepted / verified - sequence.acceptance_rate)
        sequence.num_rejections = 0 if num_accepted else min(sequence.num_rejections + 1, MOST_REJECTIONS)
        # Behind the first rejected token the draft model's cache is wrong too.
        sequence.num_drafted = min(sequence.num_drafted, sequence.num_tokens + num_accepted)
        usual = self.usual_rate + USUAL_WEIGHT * (sequence.acceptance_rate - self.usual_rate)
        self.usual_rate = max(usual, LEAST_USUAL)
        self.num_proposed += proposed
        self.num_accepted += num_accepted
