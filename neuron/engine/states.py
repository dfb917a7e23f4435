"""States of one model's sequences: a slot for each running one, and checkpoints from which others resume.

A state belongs to an exact number of tokens and cannot be cut back, so a prefix is reused up to a *checkpoint*: a copy
of the state, kept under the key of the page that ends there. Checkpoints are taken where chunks of prompts end, for
which chunks are cut: at every ``checkpoint_pages``, and at the last multiple of :data:`CHUNK_TOKENS` before the last
token of a prompt, which a sequence must compute itself. One is found once its tokens are settled. A preempted sequence
loses its state and resumes like any other.

Slots come from one pool: a running sequence holds one, an idle checkpoint is a published page without references, and
the least recently used ones make room for both. A sequence's first step begins with a copy of its checkpoint, or with
zeros, whatever the slot held. No torch here: the plan carries what is to be copied.
"""

from collections.abc import Collection, Iterable
from typing import Final

import numpy as np

from neuron.engine.pages import PagePool
from neuron.engine.sequence import Int32Array, Sequence
from neuron.layers.cache import CHUNK_TOKENS, StateSlots

ZEROS: Final = 0
"""Source of a state that begins with zeros."""


class States:
    """State slots of sequences in ``num_slots`` slots of the batch."""

    def __init__(self, sizes: StateSlots, num_slots: int, page_tokens: int) -> None:
        self.pool = PagePool(sizes.num_slots)
        self.slots: Int32Array = np.zeros(num_slots, np.int32)
        """State slot of each slot of the batch; 0 where no sequence runs."""
        self._page_tokens = page_tokens
        self._interval_tokens = sizes.checkpoint_pages * page_tokens
        self._sources: dict[int, int] = {}
        """Checkpoint, or ZEROS, from which each sequence that has not begun begins, by slot of the batch."""
        self._unsettled: dict[int, list[tuple[int, int]]] = {}
        """Checkpoints of unsettled tokens, by slot of the batch: number of tokens, state slot."""

    # -------------------------------------------------------------- prefixes

    def reusable(self, keys: list[bytes], num_pages: int) -> int:
        """Return the most pages, up to ``num_pages``, of the prefix ``keys`` that end at a checkpoint."""
        while num_pages and not self.pool.has(keys[num_pages - 1]):
            num_pages -= 1
        return num_pages

    def due(self, start: int, num_fill: int, num_keys: int) -> int:
        """Return the number of tokens at the first checkpoint behind ``start`` of a prompt; ``start`` or less if none.

        The prompt has ``num_fill`` tokens and may be shared up to ``num_keys`` pages.
        """
        if not self._interval_tokens:
            return 0
        last = min(num_fill - 1, num_keys * self._page_tokens) // CHUNK_TOKENS * CHUNK_TOKENS
        return min((start // self._interval_tokens + 1) * self._interval_tokens, last)

    def planned(self, num_pages: int, num_fill: int, num_keys: int) -> list[int]:
        """Return the numbers of pages at all checkpoints of such a prompt behind ``num_pages``."""
        found, start = [], num_pages * self._page_tokens
        while (due := self.due(start, num_fill, num_keys)) > start:
            found.append(due // self._page_tokens)
            start = due
        return found

    def cut(self, sequence: Sequence, count: int) -> int:
        """Return how many of the next ``count`` tokens of a prompt to compute in a step.

        It ends where a checkpoint is due, or else at a multiple of :data:`CHUNK_TOKENS` if it comes to one.
        """
        start, end = sequence.num_computed, sequence.num_computed + count
        due = self.due(start, sequence.num_fill, len(sequence.keys))
        if start < due <= end:
            return due - start
        aligned = end // CHUNK_TOKENS * CHUNK_TOKENS
        return aligned - start if start < aligned and end < sequence.num_fill else count

    # -------------------------------------------------------------- sequences

    def can_admit(self, keys: list[bytes], num_pages: int) -> bool:
        """Return whether there is a slot for a sequence, of any length, that resumes behind the prefix ``keys``."""
        return self.pool.num_free > self.pool.count_idle(self.pool.find(keys[-1:]))

    def admit(self, slot: int, keys: list[bytes], num_pages: int) -> None:
        """Give a sequence its state, which begins with the checkpoint at the end of the prefix ``keys``, or zeros."""
        source = self.pool.find(keys[-1:])
        self.pool.share(source)
        self.slots[slot] = self.pool.allocate(1)[0]
        self._sources[slot] = int(source[0]) if len(source) else ZEROS
        self._unsettled[slot] = []

    def extend(self, sequence: Sequence, num_tokens: int) -> None:
        """Allocate a checkpoint if one is due behind a prompt's next ``num_tokens``, and there is a slot for it."""
        end = sequence.num_computed + num_tokens
        is_due = end == self.due(sequence.num_computed, sequence.num_fill, len(sequence.keys))
        if is_due and self.pool.num_free and not self.pool.has(sequence.keys[end // self._page_tokens - 1]):
            self._unsettled[sequence.slot].append((end, int(self.pool.allocate(1)[0])))

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

    def publish(self, slot: int, index: int, key: bytes) -> None:
        """Let a sequence's checkpoint behind page ``index``, if it has one, be found under ``key``."""
        for checkpoint in self._unsettled[slot]:
            end, state = checkpoint
            if end == (index + 1) * self._page_tokens:
                self.pool.publish(state, key)
                self.pool.release(np.array([state], np.int32))
                self._unsettled[slot].remove(checkpoint)
                return

    def unsettled(self, slot: int) -> Int32Array:
        """Return the state slots that hold other than settled tokens: a sequence's own and its new checkpoints'."""
        return np.array([self.slots[slot], *(state for _, state in self._unsettled[slot])], np.int32)

    def remove(self, slot: int) -> None:
        """Release all that a sequence has."""
        self.begin([slot])
        self.pool.release(self.unsettled(slot))
        del self._unsettled[slot]
        self.slots[slot] = 0

    def check_integrity(self, running: Collection[Sequence]) -> None:
        """Raise unless the slots are those of the sequences that run, and of checkpoints."""
        slots = [sequence.slot for sequence in running]
        sources = [source for source in self._sources.values() if source != ZEROS]
        self.pool.check_integrity([np.array(sources, np.int32), *(self.unsettled(slot) for slot in slots)])
        if set(np.flatnonzero(self.slots).tolist()) != set(slots) or self._unsettled.keys() != set(slots):
            raise RuntimeError("state slots are held by other than the running sequences")


def _copies(pairs: list[tuple[int, int]]) -> Int32Array:
    return np.array(pairs, np.int32).reshape(-1, 2).T
