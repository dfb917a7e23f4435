"""Who runs in the next step: continuous batching with chunked prefill, without torch.

The rules. First come, first admitted, among principals the one of the highest priority first, and of
those the one with the fewest running. A sequence starts when a
slot is free and the pool has the pages for what it has so far and a margin for everyone to grow; pages of a beginning
that is in the cache are shared. Every decoding sequence is in every step; prompts fill what is left of the step's token
budget, in order, cut where it ends. When pages run out, the youngest gives its own back, waits ahead of everyone, and
is computed again, mostly from the cache. The oldest is never preempted and always advances, and the first in line is
never overtaken for want of room, so waiting is bounded but for those whom higher priorities keep out of every slot.

Full pages are shared, the last part of a prompt is not: two sequences of one prompt each compute its last 1 to 16
tokens, and no page is ever copied. One whose beginning is being computed by another just now waits for it.

A step may be scheduled while the one before it runs: :meth:`Scheduler.begin` notes what was launched,
:meth:`Scheduler.settle` what came of it. Only what is settled is shared, and nobody is preempted in mid-step.
"""

import collections
import dataclasses
import operator
from collections.abc import Callable
from typing import Final

import numpy as np

from neuron.device.jobs import Pooling
from neuron.engine.pages import PagePool
from neuron.engine.prefix import extend_keys
from neuron.engine.sequence import NO_PAGES, NO_TOKENS, Int32Array, Sequence, SequenceState

GROWTH_PAGES: Final = 4
"""Pages that must be free, for each running sequence that may still need them, to admit one more."""
SCORED_BESIDE_TOKENS: Final = 16
"""Of a prompt that is scored, in a step in which something decodes: each takes the whole vocabulary's logits."""
AWAITED_PAGES: Final = 4
"""A shared beginning of fewer pages is computed twice rather than waited for: 64 tokens cost about one step."""


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
    prefix_cache: bool = True
    sampled_rows: int = 1 << 30
    """Rows of a step that may have logits: a prompt that is scored takes one for each of its tokens."""


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """The sequences of a step and the tokens of each: decodes first, longest first; then sequences with draft tokens,
    and prompts in order of admission."""

    sequences: tuple[Sequence, ...]
    num_tokens: tuple[int, ...]
    num_decodes: int
    """The sequences with one token each, at the front."""
    num_drafting: int = 0
    """The sequences after them whose draft tokens are verified."""
    num_steps: int = 1
    """Number of decode steps, each with the tokens of the one before; more than one only if all sequences decode."""


class Scheduler:
    """The queue, the slots and the pages of one model."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.pool = PagePool(limits.num_pages)
        self.waiting: dict[int, Sequence] = {}
        """In order of arrival, after those that were preempted."""
        self.running: dict[int, Sequence] = {}
        """In order of admission."""
        max_pages = -(-limits.context_tokens // limits.page_tokens)
        self.page_table: Int32Array = np.zeros((limits.max_sequences, max_pages), np.int32)
        """``[slots, P]``: written when a sequence is admitted or grows, read by every step's plan."""
        self.num_preemptions = 0
        self._slots = list(range(limits.max_sequences))[::-1]
        # Keys of the pages that running sequences are about to fill, and by whom.
        self._promised: dict[bytes, int] = {}

    @property
    def busy(self) -> bool:
        """Return whether there is anything to run."""
        return bool(self.running or self.waiting)

    @property
    def num_without_slot(self) -> int:
        """Return how many sequences wait beyond those that the free slots will take; negative if slots stay free."""
        return len(self.waiting) - len(self._slots)

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.limits.page_tokens)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises ``ValueError`` for one that could never be admitted."""
        fits = sequence.num_prompt + sequence.max_tokens <= self.limits.context_tokens
        if not fits or self._num_pages(sequence.num_cache_tokens) > self.limits.num_pages:
            raise ValueError(f"sequence {sequence.number} needs {sequence.num_cache_tokens} tokens of cache")
        if sequence.number in self.waiting or sequence.number in self.running:
            raise ValueError(f"sequence {sequence.number} is known already")
        self.waiting[sequence.number] = sequence

    def remove(self, number: int) -> Sequence | None:
        """Take a sequence out in whatever state it is and free what it holds; ``None`` if it is not here."""
        sequence = self.waiting.pop(number, None)
        if sequence is None:
            sequence = self.running.get(number)
            if sequence is None:
                return None
            self._vacate(sequence)
        sequence.state = SequenceState.FINISHED
        return sequence

    def _vacate(self, sequence: Sequence) -> None:
        """Take back slot, pages and promises of a running sequence."""
        del self.running[sequence.number]
        for key in sequence.keys[sequence.num_published :]:
            if self._promised.get(key) == sequence.number:
                del self._promised[key]
        self.pool.release(sequence.pages)
        self._slots.append(sequence.slot)
        self.page_table[sequence.slot] = 0
        sequence.pages, sequence.slot = NO_PAGES, -1
        sequence.num_computed = sequence.num_settled = sequence.num_published = sequence.num_awaited = 0
        sequence.num_drafted = 0
        sequence.drafts, sequence.pooled = NO_TOKENS, None

    # -------------------------------------------------------------- admission

    def admit(self) -> list[Sequence]:
        """Start as many of the waiting as slots and pages allow; return those, in order."""
        admitted: list[Sequence] = []
        while self._slots and self.waiting:
            sequence = self._next_in_line()
            if sequence is None or not self._place(sequence):
                break
            admitted.append(sequence)
        return admitted

    def _next_in_line(self) -> Sequence | None:
        """Return who is admitted next, ``None`` if nobody waits but for what another is computing."""
        num_running = collections.Counter(sequence.principal for sequence in self.running.values())
        first: Sequence | None = None
        best = (0, 0)
        seen: set[str] = set()
        for sequence in self.waiting.values():
            if sequence.state is SequenceState.PREEMPTED:
                return sequence
            if sequence.principal in seen or self._awaits_another(sequence):
                continue
            seen.add(sequence.principal)
            rank = -sequence.priority, num_running[sequence.principal]
            if first is None or rank < best:
                first, best = sequence, rank
        return first

    def _awaits_another(self, sequence: Sequence) -> bool:
        """Return whether a running sequence is about to fill pages that this one could share."""
        if not self._promised:
            return False
        keys = self._sharable_keys(sequence)
        farthest = len(self.pool.find(keys)) + AWAITED_PAGES - 1
        return farthest < len(keys) and keys[farthest] in self._promised

    def _sharable_keys(self, sequence: Sequence) -> list[bytes]:
        """Return the keys of the full pages that it may share: at least one token is left to compute."""
        # A mean needs every row, and so do scores; what is shared is not computed.
        if not self.limits.prefix_cache or sequence.pooling is Pooling.MEAN or sequence.scores_prompt:
            return []
        count = (sequence.num_tokens - 1) // self.limits.page_tokens
        extend_keys(sequence.keys, sequence.tokens, count, self.limits.page_tokens, sequence.root)
        return sequence.keys[:count]

    def _place(self, sequence: Sequence) -> bool:
        """Give a sequence its slot and its pages; return whether there is room."""
        keys = self._sharable_keys(sequence)
        shared = self.pool.find(keys)
        num_pages = self._num_pages(sequence.num_tokens)
        margin = min(GROWTH_PAGES, self._num_pages(sequence.num_cache_tokens) - num_pages)
        for other in self.running.values():
            margin += min(GROWTH_PAGES, self._num_pages(other.num_cache_tokens) - len(other.pages))
        needed = num_pages - len(shared) + margin
        if needed > self.pool.num_free - self.pool.count_idle(shared):
            return False
        del self.waiting[sequence.number]
        self.pool.share(shared)
        sequence.pages = np.concatenate((shared, self.pool.allocate(num_pages - len(shared))))
        sequence.slot = self._slots.pop()
        self.page_table[sequence.slot, :num_pages] = sequence.pages
        sequence.num_computed = sequence.num_settled = sequence.num_drafted = len(shared) * self.limits.page_tokens
        sequence.num_published = len(shared)
        sequence.num_fill = sequence.num_tokens
        if sequence.state is SequenceState.WAITING:
            sequence.num_cached = sequence.num_computed
        for key in keys[len(shared) :]:
            self._promised.setdefault(key, sequence.number)
        sequence.state = SequenceState.RUNNING
        self.running[sequence.number] = sequence
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Take everything from a running sequence and put it before all that wait."""
        self._vacate(sequence)
        sequence.state = SequenceState.PREEMPTED
        self.waiting = {sequence.number: sequence, **self.waiting}
        self.num_preemptions += 1

    # -------------------------------------------------------------- a step

    def schedule(
        self,
        mixed_step_tokens: Callable[[int], int] | None = None,
        propose: Callable[[list[Sequence]], None] | None = None,
    ) -> Step | None:
        """Return the next step of what runs, ``None`` if nothing can. May preempt.

        ``propose`` may give decoding sequences draft tokens, for which it has reserved pages. ``mixed_step_tokens``
        takes the number of decoding rows and bounds this step below the limit of that name.
        """
        decoding = [
            sequence
            for sequence in list(self.running.values())
            if sequence.state is SequenceState.RUNNING and sequence.decodes and self._grow(sequence)
        ]
        if propose is not None and decoding:
            propose(decoding)
        drafting = [sequence for sequence in decoding if len(sequence.drafts)]
        sequences = [sequence for sequence in decoding if not len(sequence.drafts)]
        sequences.sort(key=operator.attrgetter("num_computed"), reverse=True)
        num_decodes = len(sequences)
        counts = [1] * num_decodes
        for sequence in drafting:
            sequences.append(sequence)
            counts.append(1 + len(sequence.drafts))
        if any(sequence.prefills for sequence in self.running.values()):
            limits = self.limits
            budget = limits.step_tokens
            if sequences:
                # At least one token of a prompt per step, however many decode: prompts are never starved either.
                num_rows = sum(counts)
                mixed = limits.mixed_step_tokens
                mixed = mixed if mixed_step_tokens is None else min(mixed, mixed_step_tokens(num_rows))
                budget = max(mixed - num_rows, 1)
            prefilling = [sequence for sequence in self.running.values() if sequence.prefills]
            # Each may come to the end of its prompt, where a row is sampled.
            spare_rows = limits.sampled_rows - sum(counts) - len(prefilling)
            if sequences:
                spare_rows = min(spare_rows, SCORED_BESIDE_TOKENS - 1)
            for sequence in prefilling:
                if not budget:
                    break
                count = min(sequence.num_fill - sequence.num_computed, budget)
                if sequence.num_to_score(count):
                    count = min(count, 1 + max(0, spare_rows))
                    spare_rows -= count - 1
                sequences.append(sequence)
                counts.append(count)
                budget -= count
        return Step(tuple(sequences), tuple(counts), num_decodes, len(drafting)) if sequences else None

    def _grow(self, sequence: Sequence) -> bool:
        """Make room for the next token of ``sequence``, by preemption of the youngest, itself included, if need be.

        Returns whether there is. There is not, for the moment, if the youngest is in a step that is under way.
        """
        if sequence.num_computed < len(sequence.pages) * self.limits.page_tokens:
            return True
        while not self.pool.num_free:
            youngest = next(reversed(self.running.values()))
            if youngest.in_flight:
                return False
            self._preempt(youngest)
            if youngest is sequence:
                return False
        self._add_page(sequence)
        return True

    def _add_page(self, sequence: Sequence) -> None:
        page = self.pool.allocate(1)
        self.page_table[sequence.slot, len(sequence.pages)] = page[0]
        sequence.pages = np.concatenate((sequence.pages, page))

    def make_room(self, sequence: Sequence, count: int) -> int:
        """Return how many tokens behind the next one of ``sequence`` have room, ``count`` at the most.

        They are draft tokens, or tokens of the same multi-step decode. Their pages come from what admission leaves
        free: the growth margin of the running sequences is not for these.
        """
        count = min(count, sequence.max_tokens - sequence.num_output - 1)
        while (room := len(sequence.pages) * self.limits.page_tokens - sequence.num_computed - 1) < count:
            if self.pool.num_free <= GROWTH_PAGES * len(self.running):
                return room
            self._add_page(sequence)
        return count

    def begin(self, step: Step) -> None:
        """Note that ``step`` has been launched; its plan was built before."""
        row = 0
        for index, (sequence, count) in enumerate(zip(step.sequences, step.num_tokens, strict=True)):
            if index < step.num_decodes + step.num_drafting:
                # The cache entries of its draft tokens count once these are accepted.
                sequence.num_computed += 1
                sequence.await_tokens(count, row)
                row += count
                continue
            row += sequence.num_to_score(count)
            sequence.num_computed += count
            sequence.num_scored = max(sequence.num_scored, sequence.num_computed)
            if not sequence.prefills and sequence.pooling is None:
                sequence.await_tokens(1, row)
                row += 1

    def settle(self, sequence: Sequence, num_tokens: int, num_sampled: int) -> None:
        """Note that a step of a running sequence came out sound: ``num_tokens`` more are in the cache for good.

        ``num_sampled`` rows of it were sampled. The tokens that became certain have been appended; all but the last are
        in the cache as well, and counted: accepted draft tokens, or a multi-step decode. Publishes the pages filled.
        """
        sequence.num_settled += num_tokens
        sequence.num_computed = max(sequence.num_computed, sequence.num_settled)
        sequence.num_awaited -= num_sampled
        if not self.limits.prefix_cache or sequence.pooling is Pooling.MEAN:
            return
        full = sequence.num_settled // self.limits.page_tokens
        if full > sequence.num_published:
            extend_keys(sequence.keys, sequence.tokens, full, self.limits.page_tokens, sequence.root)
            for index in range(sequence.num_published, full):
                key = sequence.keys[index]
                self.pool.publish(int(sequence.pages[index]), key)
                if self._promised.get(key) == sequence.number:
                    del self._promised[key]
            sequence.num_published = full

    def check_integrity(self) -> None:
        """Raise unless slots, pages, promises and the page table agree with the sequences that run."""
        running = list(self.running.values())
        self.pool.check_integrity([sequence.pages for sequence in running])
        if sorted([*self._slots, *(sequence.slot for sequence in running)]) != list(range(self.limits.max_sequences)):
            raise RuntimeError("slots are lost or held twice")
        expected = np.zeros_like(self.page_table)
        for sequence in running:
            expected[sequence.slot, : len(sequence.pages)] = sequence.pages
        if not np.array_equal(expected, self.page_table):
            raise RuntimeError("the page table differs from the sequences' pages")
        if not set(self._promised.values()) <= self.running.keys():
            raise RuntimeError("pages are promised by a sequence that does not run")
