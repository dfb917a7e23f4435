"""States of one model's sequences: a slot for each running one, and checkpoints from which others resume.

A state belongs to an exact number of tokens and cannot be cut back, so a prefix is reused up to a *checkpoint*: a copy
of the state, kept under the key of the page that ends there. Checkpoints are taken where chunks of prompts end, for
which chunks are cut (:func:`checkpoint_places`), and in outputs behind every ``LEAST_PAGES``. One is found once its
tokens are settled. A preempted sequence loses its state and resumes like any other.

Slots come from one pool: a running sequence holds one, an idle checkpoint is a published page without references. The
checkpoint that saves least makes room for both (:func:`retention`), and a page of keys and values is worth nothing
without a checkpoint behind it: such pages are evicted first, and a checkpoint is given up with its last page. A
sequence's first step begins with a copy of its checkpoint, or with zeros, whatever the slot held. No torch here: the
plan carries what is to be copied.
"""

import dataclasses
import itertools
from collections.abc import Collection, Iterable
from typing import Final

import numpy as np

from neuron.engine.pages import PagePool
from neuron.engine.sequence import Int32Array, Sequence
from neuron.layers.cache import CHUNK_TOKENS, StateSlots

ZEROS: Final = 0
"""Source of a state that begins with zeros."""
LEAST_PAGES: Final = 4
"""Least pages between two checkpoints: each costs a step more, and 64 tokens cost about one."""
UNEXPECTED: Final = 1 / 16
"""Chance that a checkpoint is used behind which no prompt is expected to part, relative to others."""


def checkpoint_places(start: int, end: int, interval: int, breakpoints: Iterable[int]) -> list[int]:
    """Return behind how many pages of a prompt its state is kept, ascending.

    All are numbers of pages: the prompt begins behind ``start`` cached ones and may be shared up to ``end``. Places are
    at breakpoints, or at ``end`` if this comes first, and where none is near also ``interval`` apart, since not all
    prompts part where they are expected to.
    """
    places = [start]
    for place in sorted(min(place, end) for place in breakpoints):
        if place - places[-1] >= LEAST_PAGES:
            places.append(place)
    regular = range((start // interval + 1) * interval, end + 1, interval)
    places += [place for place in regular if all(abs(place - other) >= LEAST_PAGES for other in places)]
    return sorted(places[1:])


def retention(used: float, num_pages: int, is_expected: bool) -> float:
    """Return the rank of an idle checkpoint, of which the lowest is evicted: the recomputation it saves, and recency.

    Without it, ``num_pages`` since the checkpoint before it are computed again; all have as many bytes, so these need
    not divide them. That is certain to be wanted where the last prompt that had it was expected to part from the next
    one, and otherwise only if a conversation is taken up again at an earlier place. ``used`` is the rank of what was
    evicted last when it was last wanted, so that what stays unused is overtaken (GreedyDual-Size: Cao and Irani,
    "Cost-Aware WWW Proxy Caching Algorithms", USITS 1997).
    """
    return used + num_pages * (1.0 if is_expected else UNEXPECTED)


@dataclasses.dataclass(slots=True)
class _Checkpoint:
    """Place of a checkpoint in the tree that prompts make."""

    before: bytes
    """Key of the longest checkpoint that it continues, empty for none."""
    keys: list[bytes]
    """Keys of the pages behind that one; the last is its own."""
    used: float
    is_expected: bool

    @property
    def rank(self) -> float:
        return retention(self.used, len(self.keys), self.is_expected)


class States:
    """State slots of sequences in ``num_slots`` slots of the batch, whose keys and values are in ``pages``."""

    def __init__(self, sizes: StateSlots, num_slots: int, page_tokens: int, pages: PagePool) -> None:
        self.pool = PagePool(sizes.num_slots)
        self.slots: Int32Array = np.zeros(num_slots, np.int32)
        """State slot of each slot of the batch; 0 where no sequence runs."""
        self._pages = pages
        pages.on_evict = self._forget
        self._page_tokens = page_tokens
        self._interval = sizes.checkpoint_pages
        self._checkpoints: dict[bytes, _Checkpoint] = {}
        self._evicted_rank = 0.0
        # By slot of the batch: the checkpoint, or ZEROS, from which a sequence that has not begun begins; the places of
        # its checkpoints, in pages, and which of all on its way are expected to be used; and its checkpoints of
        # unsettled tokens: number of tokens, state slot.
        self._sources: dict[int, int] = {}
        self._due: dict[int, list[int]] = {}
        self._expected: dict[int, set[int]] = {}
        self._unsettled: dict[int, list[tuple[int, int]]] = {}

    # -------------------------------------------------------------- prefixes

    def reusable(self, keys: list[bytes], num_pages: int) -> int:
        """Return the most pages, up to ``num_pages``, of the prefix ``keys`` that end at a checkpoint."""
        while num_pages and not self.pool.has(keys[num_pages - 1]):
            num_pages -= 1
        return num_pages

    def useful(self, keys: list[bytes], num_pages: int) -> int:
        """Return how many of the first ``num_pages`` of the prefix ``keys`` are before a checkpoint."""
        start = self.reusable(keys, num_pages)
        own = keys[start:num_pages]
        following = self._after(keys[start - 1] if start else b"")
        return start + max((_num_shared(own, other.keys) for other in following), default=0)

    def due(self, sequence: Sequence) -> list[int]:
        """Return behind how many pages an admitted prompt will have checkpoints."""
        return self._due[sequence.slot]

    def cut(self, sequence: Sequence, count: int) -> int:
        """Return how many of the next ``count`` tokens of a prompt to compute in a step.

        It ends where a checkpoint is due, or else at a multiple of :data:`CHUNK_TOKENS` if it comes to one.
        """
        start, end = sequence.num_computed, sequence.num_computed + count
        for place in self._due[sequence.slot]:
            if start < place * self._page_tokens <= end:
                return place * self._page_tokens - start
        aligned = end // CHUNK_TOKENS * CHUNK_TOKENS
        return aligned - start if start < aligned and end < sequence.num_fill else count

    # -------------------------------------------------------------- sequences

    def can_admit(self, keys: list[bytes], num_pages: int) -> bool:
        """Return whether there is a slot for a sequence, of any length, that resumes behind the prefix ``keys``."""
        return self.pool.num_free > self.pool.count_idle(self.pool.find(keys[-1:]))

    def admit(self, sequence: Sequence, keys: list[bytes], num_pages: int) -> None:
        """Give a sequence its state, which begins with the checkpoint at the end of the prefix ``keys``, or zeros."""
        slot = sequence.slot
        source = self.pool.find(keys[-1:])
        self.pool.share(source)
        self.slots[slot] = self._allocate()
        self._sources[slot] = int(source[0]) if len(source) else ZEROS
        self._unsettled[slot] = []

    def plan(self, sequence: Sequence, num_keys: int) -> None:
        """Plan the checkpoints of an admitted prompt, of which the first ``num_keys`` pages may be shared."""
        start = sequence.num_published
        breakpoints = [at // self._page_tokens for at in sequence.breakpoints]
        if sequence.num_output:
            breakpoints.append(num_keys)  # it was preempted, and may be again
        due = checkpoint_places(start, num_keys, self._interval, breakpoints) if self._interval and num_keys else []
        before: dict[int, _Checkpoint] = {}
        while start:
            checkpoint = before[start] = self._checkpoints[sequence.keys[start - 1]]
            start -= len(checkpoint.keys)
        places = [*sorted(before), *due]
        expected = {max((place for place in places if place <= at), default=0) for at in breakpoints}
        for place, checkpoint in before.items():
            checkpoint.is_expected = place in expected
            if checkpoint.is_expected:
                checkpoint.used = self._evicted_rank
        self._due[sequence.slot], self._expected[sequence.slot] = due, expected

    def extend(self, sequence: Sequence, num_tokens: int) -> None:
        """Allocate a checkpoint if one is due behind a prompt's next ``num_tokens``, and there is a slot for it."""
        end = sequence.num_computed + num_tokens
        place, rest = divmod(end, self._page_tokens)
        if rest or place not in self._due[sequence.slot] or self.pool.has(sequence.keys[place - 1]):
            return
        if self.pool.num_free:
            self._unsettled[sequence.slot].append((end, self._allocate()))

    def follow(self, sequence: Sequence) -> bool:
        """Allocate a checkpoint if one is due behind the next token of an output; return whether it is.

        A template that keeps all of an answer lets the next prompt resume there. It costs a copy for each
        ``LEAST_PAGES``, and no slot of a checkpoint that saves more.
        """
        end = sequence.num_computed + 1
        if end % (LEAST_PAGES * self._page_tokens) or not self._interval or not self.pool.num_free:
            return False
        own_rank = retention(self._evicted_rank, LEAST_PAGES, is_expected=False)
        if not self.pool.num_blank and self._checkpoints[self._least()].rank > own_rank:
            return False
        self._unsettled[sequence.slot].append((end, self._allocate()))
        return True

    def loads(self, slots: Collection[int]) -> Int32Array:
        """Return ``[2, N]`` the copies, from and to, with which sequences of these batch slots begin."""
        return _copies([(self._sources[slot], int(self.slots[slot])) for slot in slots if slot in self._sources])

    def saves(self, slots: Collection[int], context_lens: Collection[int]) -> Int32Array:
        """Return ``[2, N]`` the copies to checkpoints of sequences that end a step at ``context_lens``."""
        found = []
        for slot, length in zip(slots, context_lens, strict=True):
            found += [(int(self.slots[slot]), to) for end, to in self._unsettled[slot] if end == length]
        return _copies(found)

    def begin(self, slots: Iterable[int]) -> None:
        """Record that a step of the sequences in these slots of the batch has been launched."""
        for slot in slots:
            source = self._sources.pop(slot, ZEROS)
            if source != ZEROS:
                self.pool.release(np.array([source], np.int32))

    def publish(self, sequence: Sequence, index: int) -> None:
        """Let a sequence's checkpoint behind page ``index``, if it has one, be found under the page's key."""
        unsettled = self._unsettled[sequence.slot]
        for end, state in unsettled:
            if end == (index + 1) * self._page_tokens:
                self.pool.publish(state, sequence.keys[index])
                self.pool.release(np.array([state], np.int32))
                unsettled.remove((end, state))
                self._insert(sequence.keys[: index + 1], index + 1 in self._expected[sequence.slot])
                return

    def unsettled(self, slot: int) -> Int32Array:
        """Return the state slots that hold other than settled tokens: a sequence's own and its new checkpoints'."""
        return np.array([self.slots[slot], *(state for _, state in self._unsettled[slot])], np.int32)

    def remove(self, sequence: Sequence) -> None:
        """Release all that a sequence has."""
        slot = sequence.slot
        self.begin([slot])
        self.pool.release(self.unsettled(slot))
        del self._unsettled[slot], self._due[slot], self._expected[slot]
        self.slots[slot] = 0

    # -------------------------------------------------------------- eviction

    def _allocate(self) -> int:
        """Take a slot, from the idle checkpoint that saves least if none is blank."""
        if not self.pool.num_blank:
            self._evict(self._least())
        return int(self.pool.allocate(1)[0])

    def _least(self) -> bytes:
        """Return the key of the idle checkpoint that saves least."""
        return min(self.pool.idle_keys(), key=lambda key: self._checkpoints[key].rank)

    def _insert(self, keys: list[bytes], is_expected: bool) -> None:
        """Add the checkpoint behind the pages ``keys`` to the tree; only its use is new if it is there."""
        start = self.reusable(keys, len(keys) - 1)
        before, own = keys[start - 1] if start else b"", keys[start:]
        for other in self._after(before):
            if len(other.keys) > len(own) and other.keys[len(own) - 1] == own[-1]:
                other.before, other.keys = own[-1], other.keys[len(own) :]
        self._checkpoints[own[-1]] = _Checkpoint(before, own, self._evicted_rank, is_expected)

    def _evict(self, key: bytes) -> None:
        """Evict a checkpoint: those that continue it are further from one then, and without any, its pages go next."""
        evicted = self._checkpoints.pop(key)
        self._evicted_rank = max(self._evicted_rank, evicted.rank)
        self.pool.withdraw(key)
        continued = self._after(key)
        for other in continued:
            other.before, other.keys = evicted.before, evicted.keys + other.keys
        if not continued:
            shared = max((_num_shared(evicted.keys, other.keys) for other in self._after(evicted.before)), default=0)
            self._pages.demote(self._pages.find(evicted.keys[shared:]))

    def _forget(self, key: bytes) -> None:
        """Give up the checkpoint of a page that was evicted, and those that continue it."""
        if self._checkpoints.pop(key, None) is not None:
            self.pool.withdraw(key)
            for other in self._after(key):
                self._forget(other.keys[-1])

    def _after(self, key: bytes) -> list[_Checkpoint]:
        """Return the checkpoints that continue the one of ``key`` next; those that continue none, if it is empty."""
        return [checkpoint for checkpoint in self._checkpoints.values() if checkpoint.before == key]

    def check_integrity(self, running: Collection[Sequence]) -> None:
        """Raise unless the slots are those of the sequences that run, and of checkpoints whose pages are there."""
        slots = [sequence.slot for sequence in running]
        sources = [source for source in self._sources.values() if source != ZEROS]
        self.pool.check_integrity([np.array(sources, np.int32), *(self.unsettled(slot) for slot in slots)])
        if set(np.flatnonzero(self.slots).tolist()) != set(slots) or self._unsettled.keys() != set(slots):
            raise RuntimeError("state slots are held by other than the running sequences")
        for key, checkpoint in self._checkpoints.items():
            is_linked = not checkpoint.before or checkpoint.before in self._checkpoints
            if not self.pool.has(key) or not is_linked or not self._pages.has(key):
                raise RuntimeError("a checkpoint lacks its state, its page or the one before it")


def _num_shared(keys: list[bytes], others: list[bytes]) -> int:
    """Return with how many equal keys both begin."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(keys, others, strict=False)))


def _copies(pairs: list[tuple[int, int]]) -> Int32Array:
    return np.array(pairs, np.int32).reshape(-1, 2).T
