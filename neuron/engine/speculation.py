"""Guess what a sequence says next and check the guesses in one step, where that pays.

Checking is exact: every guessed token is sampled as it would have been anyway, from the same logits with the same
number of its sequence, and the first that differs ends what the step makes certain. So the output is the same with and
without, drawn or greedy; only how many tokens a step yields differs. It pays while a row more costs less than the
tokens it is expected to bring: before each step that is computed from :mod:`neuron.engine.step_timer` and from how
often this sequence's guesses were right.

Leviathan et al., arXiv:2211.17192, for a guess that is one token; prompt lookup: the continuation of the last place
where the sequence has said the same three tokens.
"""

from collections.abc import Callable
from typing import Final, Protocol

import numpy as np

from neuron.engine.sequence import NO_TOKENS, Int32Array, Sequence
from neuron.engine.step_timer import StepTimer

MAX_DRAFTS: Final = 8
"""Guesses for one sequence in one step."""
NGRAM: Final = 3
"""Tokens that must have been said before, in this order, for what followed them to be a guess."""
HIT_NEWS: Final = 0.2
"""Weight of one checked guess in a sequence's rate of right ones."""
HIT_RECOVERY: Final = 0.005
"""How much the rate is raised by each step that had a guess and did not check it, so that it is tried again."""
LEAST_GAIN: Final = 1.05
"""Checking must promise so many times the tokens per second: estimates are not exact."""


class Drafter(Protocol):
    """Where guesses come from."""

    def available(self, sequences: list[Sequence], most: int) -> list[int]:
        """Return how many guesses, up to ``most``, it could make for each of ``sequences``."""

    def cost_s(self, num_sequences: int, depth: int) -> float:
        """Return the seconds that ``depth`` guesses for so many sequences take to make."""

    def propose(self, sequences: list[Sequence], counts: list[int]) -> list[Int32Array]:
        """Return at most so many guesses of what comes next in each, as :meth:`available` was just asked."""


class PromptLookup:
    """Guesses what followed the last time: free, and right wherever a text repeats itself."""

    def __init__(self) -> None:
        self._found: dict[int, Int32Array] = {}

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
    """Decides who guesses how much in a step, and learns from what came of it."""

    def __init__(self, drafter: Drafter, step_timer: StepTimer) -> None:
        self._drafter = drafter
        self._step_timer = step_timer
        self.num_proposed = self.num_accepted = 0

    def propose(
        self, num_decoding: int, able: list[Sequence], num_rows: int, make_room: Callable[[Sequence, int], int]
    ) -> None:
        """Give ``able`` guesses, ``num_rows`` in all, if checking them should pay in a step of ``num_decoding``.

        ``make_room`` reserves pages for so many tokens behind a sequence's next and returns how many there are.
        """
        most = min(MAX_DRAFTS, num_rows // max(1, len(able)))
        if not able or most < 1 or self._step_timer.step_s(num_decoding) is None:
            return
        available = self._drafter.available(able, most)
        depth = self._depth(num_decoding, able, available)
        if not depth:
            for sequence, count in zip(able, available, strict=True):
                if count:
                    sequence.hit_rate = min(1.0, sequence.hit_rate + HIT_RECOVERY)
            return
        counts = [make_room(sequence, min(depth, count)) for sequence, count in zip(able, available, strict=True)]
        for sequence, drafts in zip(able, self._drafter.propose(able, counts), strict=True):
            sequence.drafts = drafts

    def _depth(self, num_decoding: int, able: list[Sequence], available: list[int]) -> int:
        """Return how many guesses for each bring the most tokens per second; 0 if none does."""
        best, found = 0.0, 0
        for depth in range(max(available) + 1):
            gain, num_rows = float(num_decoding), num_decoding
            for sequence, count in zip(able, available, strict=True):
                right = 1.0
                for _ in range(min(depth, count)):
                    right *= sequence.hit_rate
                    gain += right
                    num_rows += 1
            seconds = self._step_timer.step_s(num_rows)
            assert seconds is not None
            seconds += self._drafter.cost_s(len(able), depth) if depth else 0.0
            rate = gain / seconds
            if rate > (best if found else best * LEAST_GAIN):
                best, found = rate, depth
        return found

    def learn(self, sequence: Sequence, num_right: int) -> None:
        """Take how many of a sequence's guesses were right: all before the first that was not."""
        proposed = len(sequence.drafts)
        checked = num_right + (num_right < proposed)
        weight = 1.0 - (1.0 - HIT_NEWS) ** checked
        sequence.hit_rate += weight * (num_right / checked - sequence.hit_rate)
        # Behind the first wrong guess what a model keeps of them is wrong too.
        sequence.num_drafted = min(sequence.num_drafted, sequence.num_tokens + num_right)
        self.num_proposed += proposed
        self.num_accepted += num_right
