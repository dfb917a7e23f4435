"""The scheduler: continuous batching with chunked prefill, without torch.

Admission is by priority, then to the principal with the fewest running sequences, then in order of arrival. A sequence
is admitted when a slot is free and the pool has pages for its tokens and a growth margin for every running one; cached
pages of its prefix are shared. Every decoding sequence is in every step; prompts fill the rest of the step's token
budget, in order, cut where it ends or a checkpoint of their state is due. When pages run out, the youngest sequence is
preempted, waits ahead of all others, and is computed again, mostly from the cache. The oldest is never preempted and
always advances, and the head of the queue is never overtaken for lack of pages, so waiting is bounded unless higher
priorities occupy every slot.

Full pages are shared, the last part of a prompt is not: two sequences of one prompt each compute its last 1 to 16
tokens, and no page is ever copied. A sequence whose prefix is being computed by another waits for it.

A step may be scheduled while the one before it runs: :meth:`Scheduler.begin` records a launch, :meth:`Scheduler.settle`
its outcome. Only settled pages are shared, and no sequence is preempted while its step is in flight.
"""

import collections
import dataclasses
import operator
from collections.abc import Callable
from typing import Final

from neuron.device.jobs import Pooling
from neuron.engine.cache import Cache
from neuron.engine.prefix import extend_keys
from neuron.engine.sequence import NO_TOKENS, Sequence, SequenceStatus
from neuron.layers.cache import StateSlots, WindowTable

GROWTH_PAGES: Final = 4
"""Free pages that admission leaves to each running sequence that may still need them."""
SCORED_BESIDE_TOKENS: Final = 16
"""Tokens of a scored prompt in a step with decodes: each takes logits of the whole vocabulary."""
AWAITED_PAGES: Final = 4
"""Least pages of a prefix to wait for; fewer are computed twice: 64 tokens cost about one step."""


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a step and the sequences in it."""

    num_pages: int
    page_tokens: int
    context_tokens: int
    max_sequences: int
    step_tokens: int
    """Query tokens of a step without decodes."""
    mixed_step_tokens: int
    """Query tokens of a step with decodes: bounds how long a prompt delays the others' next token."""
    prefix_cache: bool = True
    sampled_rows: int = 1 << 30
    """Rows of a step that may have logits; a scored prompt takes a row for each of its tokens."""
    windows: tuple[WindowTable, ...] = ()
    """Page tables of layers with a window, beside the one of ``num_pages``."""
    states: StateSlots | None = None
    """Slots for states, where layers keep one."""


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
    is_single: bool = False
    """Whether there may be one decode step only, as the state behind it is kept."""


class Scheduler:
    """The queue, the slots and the pages of one model."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.cache = Cache(
            num_pages=limits.num_pages,
            page_tokens=limits.page_tokens,
            context_tokens=limits.context_tokens,
            num_slots=limits.max_sequences,
            step_tokens=limits.step_tokens,
            windows=limits.windows,
            states=limits.states,
        )
        self.waiting: dict[int, Sequence] = {}
        """Waiting sequences in order of arrival, behind preempted ones."""
        self.running: dict[int, Sequence] = {}
        """Running sequences in order of admission."""
        self.num_preemptions = 0
        self._slots = list(range(limits.max_sequences))[::-1]
        # Keys of the pages behind which others may begin once running sequences have filled them, and whose they are.
        self._promised: dict[bytes, int] = {}

    @property
    def busy(self) -> bool:
        """Return whether there is anything to run."""
        return bool(self.running or self.waiting)

    @property
    def num_without_slot(self) -> int:
        """Return how many sequences wait beyond the free slots; negative if slots stay free."""
        return len(self.waiting) - len(self._slots)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises ``ValueError`` for one that could never be admitted."""
        fits = sequence.num_prompt + sequence.max_tokens <= self.limits.context_tokens
        if not fits or self.cache.num_pages(sequence.num_cache_tokens) > self.limits.num_pages:
            raise ValueError(f"sequence {sequence.number} needs {sequence.num_cache_tokens} tokens of cache")
        if sequence.number in self.waiting or sequence.number in self.running:
            raise ValueError(f"sequence {sequence.number} exists already")
        self.waiting[sequence.number] = sequence

    def remove(self, number: int) -> Sequence | None:
        """Remove a sequence in any state and free its slot and pages; ``None`` if it is not here."""
        sequence = self.waiting.pop(number, None)
        if sequence is None:
            sequence = self.running.get(number)
            if sequence is None:
                return None
            self._vacate(sequence)
        sequence.status = SequenceStatus.FINISHED
        return sequence

    def _vacate(self, sequence: Sequence) -> None:
        """Free the slot, pages and promised pages of a running sequence."""
        del self.running[sequence.number]
        for key in sequence.keys[sequence.num_published :]:
            if self._promised.get(key) == sequence.number:
                del self._promised[key]
        self._slots.append(sequence.slot)
        self.cache.remove(sequence)
        sequence.num_computed = sequence.num_settled = sequence.num_awaited = sequence.num_drafted = 0
        sequence.num_replays = 0
        sequence.drafts, sequence.pooled = NO_TOKENS, None

    # -------------------------------------------------------------- admission

    def admit(self) -> list[Sequence]:
        """Admit as many waiting sequences as slots and pages allow; return them, in order."""
        admitted: list[Sequence] = []
        while self._slots and self.waiting:
            sequence = self._next_in_line()
            if sequence is None or not self._place(sequence):
                break
            admitted.append(sequence)
        return admitted

    def _next_in_line(self) -> Sequence | None:
        """Return the next sequence to admit, ``None`` if all that wait await pages of another."""
        num_running = collections.Counter(sequence.principal for sequence in self.running.values())
        first: Sequence | None = None
        best = (0, 0)
        seen: set[str] = set()
        for sequence in self.waiting.values():
            if sequence.status is SequenceStatus.PREEMPTED:
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
        return not self._promised.keys().isdisjoint(keys[len(self.cache.find(keys)) + AWAITED_PAGES - 1 :])

    def _sharable_keys(self, sequence: Sequence) -> list[bytes]:
        """Return the keys of the full pages that ``sequence`` may share, with at least a token left to compute."""
        # A mean and scores need every row computed; shared pages are not.
        if not self.limits.prefix_cache or sequence.pooling is Pooling.MEAN or sequence.scores_prompt:
            return []
        count = (sequence.num_tokens - 1) // self.limits.page_tokens
        extend_keys(sequence.keys, sequence.tokens, count, self.limits.page_tokens, sequence.root)
        return sequence.keys[:count]

    def _place(self, sequence: Sequence) -> bool:
        """Give a sequence its slot and its pages; return whether there are enough."""
        keys = self._sharable_keys(sequence)
        num_pages = self.cache.num_pages
        margin = min(GROWTH_PAGES, num_pages(sequence.num_cache_tokens) - num_pages(sequence.num_tokens))
        for other in self.running.values():
            margin += min(GROWTH_PAGES, num_pages(other.num_cache_tokens) - len(other.pages))
        if not self.cache.admit(sequence, self._slots[-1], keys, margin):
            return False
        del self.waiting[sequence.number]
        self._slots.pop()
        num_shared = sequence.num_published
        sequence.num_computed = sequence.num_settled = sequence.num_drafted = num_shared * self.limits.page_tokens
        sequence.num_fill = sequence.num_tokens
        if sequence.status is SequenceStatus.WAITING:
            sequence.num_cached = sequence.num_computed
        for count in self.cache.resumable(sequence, len(keys)):
            self._promised.setdefault(keys[count - 1], sequence.number)
        sequence.status = SequenceStatus.RUNNING
        self.running[sequence.number] = sequence
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Preempt a running sequence: free all it has and put it at the head of the queue."""
        self._vacate(sequence)
        sequence.status = SequenceStatus.PREEMPTED
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
            if sequence.status is SequenceStatus.RUNNING and sequence.decodes and self._grow(sequence)
        ]
        if propose is not None and decoding:
            propose(decoding)
        drafting = [sequence for sequence in decoding if len(sequence.drafts)]
        sequences = [sequence for sequence in decoding if not len(sequence.drafts)]
        sequences.sort(key=operator.attrgetter("num_computed"), reverse=True)
        num_decodes = len(sequences)
        states = self.cache.states
        has_checkpoint = states is not None and sum(map(states.follow, sequences)) > 0
        counts = [1] * num_decodes
        for sequence in drafting:
            sequences.append(sequence)
            counts.append(1 + len(sequence.drafts))
        if any(sequence.prefills for sequence in self.running.values()):
            limits = self.limits
            budget = limits.step_tokens
            if sequences:
                # At least one prompt token per step, however many decode, so that prompts are not starved.
                num_rows = sum(counts)
                mixed = limits.mixed_step_tokens
                mixed = mixed if mixed_step_tokens is None else min(mixed, mixed_step_tokens(num_rows))
                budget = max(mixed - num_rows, 1)
            prefilling = [sequence for sequence in self.running.values() if sequence.prefills]
            # Each prompt may end in this step, where a row is sampled.
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
                count = self.cache.extend(sequence, count)
                sequences.append(sequence)
                counts.append(count)
                budget -= count
        if not sequences:
            return None
        return Step(tuple(sequences), tuple(counts), num_decodes, len(drafting), is_single=has_checkpoint)

    def _grow(self, sequence: Sequence) -> bool:
        """Allocate a page for the next token of ``sequence``, preempting the youngest, or itself, if need be.

        Returns whether there is one: not for the moment, if the youngest's step is in flight.
        """
        if sequence.num_computed < len(sequence.pages) * self.limits.page_tokens:
            return True
        while not self.cache.grow(sequence):
            youngest = next(reversed(self.running.values()))
            if youngest.in_flight:
                return False
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def reserve(self, sequence: Sequence, count: int) -> int:
        """Reserve pages for up to ``count`` tokens behind the next one of ``sequence``; return for how many.

        They are draft tokens, or tokens of the same multi-step decode. Their pages come from what admission leaves
        free: the growth margin of the running sequences is not for these.
        """
        count = min(count, sequence.max_tokens - sequence.num_output - 1)
        while (reserved := len(sequence.pages) * self.limits.page_tokens - sequence.num_computed - 1) < count:
            if self.cache.pool.num_free <= GROWTH_PAGES * len(self.running):
                return reserved
            self.cache.grow(sequence)
        return count

    def begin(self, step: Step) -> None:
        """Record that ``step`` has been launched; its plan was built before."""
        if self.cache.states is not None:
            self.cache.states.begin(sequence.slot for sequence in step.sequences)
        row = 0
        for index, (sequence, count) in enumerate(zip(step.sequences, step.num_tokens, strict=True)):
            sequence.num_replays = 0
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
        """Record that a step of a running sequence was sound: ``num_tokens`` more are settled in the cache.

        ``num_sampled`` rows of it were sampled. The certain tokens have been appended; all but the last are in the
        cache as well, and counted: accepted draft tokens, or a multi-step decode. Publishes full pages, and
        gives back those that no later token sees.
        """
        sequence.num_settled += num_tokens
        sequence.num_computed = max(sequence.num_computed, sequence.num_settled)
        sequence.num_awaited -= num_sampled
        full = sequence.num_settled // self.limits.page_tokens
        if full > sequence.num_published and self.limits.prefix_cache and sequence.pooling is not Pooling.MEAN:
            extend_keys(sequence.keys, sequence.tokens, full, self.limits.page_tokens, sequence.root)
            for index in range(sequence.num_published, full):
                self.cache.publish(sequence, index)
                if self._promised.get(sequence.keys[index]) == sequence.number:
                    del self._promised[sequence.keys[index]]
            sequence.num_published = full
        self.cache.give_back(sequence)

    def check_integrity(self) -> None:
        """Raise unless slots, pages and promises agree with the sequences that run."""
        running = list(self.running.values())
        self.cache.check_integrity(running)
        if sorted([*self._slots, *(sequence.slot for sequence in running)]) != list(range(self.limits.max_sequences)):
            raise RuntimeError("slots are lost or held twice")
        if not set(self._promised.values()) <= self.running.keys():
            raise RuntimeError("pages are promised by a sequence that does not run")
