"""Who runs in the next step: continuous batching with chunked prefill, without torch.

The rules. First come, first admitted: a sequence starts when a seat is free and the pool has the pages for its whole
prompt and output, so nothing that runs can run out, and there is no preemption. Every decoding sequence is in every
step; prompts fill what is left of the step's token budget, in order, cut where it ends. Waiting is bounded, since what
runs ends and the first in line is never overtaken.
"""

import dataclasses
import operator

import numpy as np

from neuron.engine.pages import PagePool
from neuron.engine.sequence import NO_PAGES, Int32Array, Sequence, SequenceState


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a step and the sequences in it."""

    num_pages: int
    page_tokens: int
    context_tokens: int
    max_sequences: int
    step_tokens: int
    """Query tokens of a step in which nothing decodes."""
    mixed_step_tokens: int
    """Query tokens of a step in which something does: bounds how long a prompt holds up the others' next token."""


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """Who runs and how many tokens of each: decodes first, longest first, then prompts in order of admission."""

    sequences: tuple[Sequence, ...]
    num_tokens: tuple[int, ...]
    num_decodes: int


class Scheduler:
    """The queue, the seats and the pages of one model."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.pool = PagePool(limits.num_pages)
        self.waiting: dict[int, Sequence] = {}
        self.running: dict[int, Sequence] = {}
        max_pages = -(-limits.context_tokens // limits.page_tokens)
        self.page_table: Int32Array = np.zeros((limits.max_sequences, max_pages), np.int32)
        """``[seats, P]``: written when a sequence is admitted, read by every step's plan."""
        self._seats = list(range(limits.max_sequences))[::-1]

    @property
    def busy(self) -> bool:
        """Return whether there is anything to run."""
        return bool(self.running or self.waiting)

    def num_pages_for(self, sequence: Sequence) -> int:
        """Return the pages that a sequence takes from admission to its end."""
        return -(-sequence.num_cache_tokens // self.limits.page_tokens)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises ``ValueError`` for one that could never be admitted."""
        fits = sequence.num_prompt + sequence.max_tokens <= self.limits.context_tokens
        if not fits or self.num_pages_for(sequence) > self.limits.num_pages:
            raise ValueError(f"sequence {sequence.number} needs {sequence.num_cache_tokens} tokens of cache")
        if sequence.number in self.waiting or sequence.number in self.running:
            raise ValueError(f"sequence {sequence.number} is known already")
        self.waiting[sequence.number] = sequence

    def remove(self, number: int) -> Sequence | None:
        """Take a sequence out in whatever state it is and free what it holds; ``None`` if it is not here."""
        sequence = self.waiting.pop(number, None)
        if sequence is None:
            sequence = self.running.pop(number, None)
            if sequence is None:
                return None
            self.pool.release(sequence.pages)
            self._seats.append(sequence.seat)
            self.page_table[sequence.seat] = 0
            sequence.pages, sequence.seat = NO_PAGES, -1
        sequence.state = SequenceState.FINISHED
        return sequence

    def admit(self) -> list[Sequence]:
        """Start as many of the waiting as seats and pages allow, in order; return those."""
        admitted = []
        while self.waiting and self._seats:
            sequence = next(iter(self.waiting.values()))
            num_pages = self.num_pages_for(sequence)
            if num_pages > self.pool.num_free:
                break
            del self.waiting[sequence.number]
            sequence.pages = self.pool.allocate(num_pages)
            sequence.seat = self._seats.pop()
            self.page_table[sequence.seat, :num_pages] = sequence.pages
            sequence.state = SequenceState.RUNNING
            self.running[sequence.number] = sequence
            admitted.append(sequence)
        return admitted

    def schedule(self) -> Step | None:
        """Return the next step of what runs, ``None`` if nothing does."""
        if not self.running:
            return None
        sequences = [sequence for sequence in self.running.values() if not sequence.prefills]
        sequences.sort(key=operator.attrgetter("num_computed"), reverse=True)
        num_decodes = len(sequences)
        counts = [1] * num_decodes
        if num_decodes < len(self.running):
            limits = self.limits
            # At least a page of prompt per step, however many decode: prompts are never starved either.
            mixed = max(limits.mixed_step_tokens - num_decodes, limits.page_tokens)
            budget = mixed if num_decodes else limits.step_tokens
            for sequence in self.running.values():
                if sequence.prefills:
                    count = min(sequence.num_prompt - sequence.num_computed, budget)
                    sequences.append(sequence)
                    counts.append(count)
                    budget -= count
                    if not budget:
                        break
        return Step(tuple(sequences), tuple(counts), num_decodes)

    def check_integrity(self) -> None:
        """Raise unless seats, pages and the page table agree with the sequences that run."""
        running = list(self.running.values())
        self.pool.check_integrity([sequence.pages for sequence in running])
        if sorted([*self._seats, *(sequence.seat for sequence in running)]) != list(range(self.limits.max_sequences)):
            raise RuntimeError("seats are lost or held twice")
        expected = np.zeros_like(self.page_table)
        for sequence in running:
            expected[sequence.seat, : len(sequence.pages)] = sequence.pages
        if not np.array_equal(expected, self.page_table):
            raise RuntimeError("the page table differs from the sequences' pages")
