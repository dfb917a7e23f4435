"""Caches of one model's sequences: what each holds, what a new one may reuse, and what can be given back.

Table 0 has every page of a sequence, and what it needs beyond its prompt is not set aside: its pages decide about
admission and preemption. A windowed table has a sequence's pages from the first that its next token can see; a prompt's
are allocated chunk by chunk. It is small, so that the pages which a sequence may ever need there are set aside when it
is admitted, and never run out. Pages are given back when tokens are settled, not before: until then their contents may
be unsound, and a page that was not published must be.

A prefix can be reused up to a token if table 0 has all pages before it, each windowed table those that the token sees,
and where layers keep a state, :mod:`neuron.engine.states` has a checkpoint. So pages behind a window are worth keeping
only where a breakpoint of the prompt sees them, and pages behind the last checkpoint not at all: they are evicted
first. No torch and no decisions about sequences: the scheduler asks.
"""

from collections.abc import Collection

import numpy as np

from neuron.engine.pages import PagePool
from neuron.engine.sequence import NO_PAGES, Int32Array, Sequence
from neuron.engine.states import States
from neuron.layers.cache import StateSlots, WindowTable, chunk_pages, window_pages


class WindowPages:
    """Pages of the layers with one window. ``table`` ``[slots, P]`` has the pages of each slot, 0 where it has none."""

    def __init__(self, table: Int32Array, sizes: WindowTable, page_tokens: int, step_tokens: int) -> None:
        self.pool = PagePool(sizes.num_pages)
        self._table = table
        self._window_tokens = sizes.window_tokens
        self._page_tokens = page_tokens
        self._most = window_pages(sizes.window_tokens, page_tokens)
        self._num_unreserved = sizes.num_pages - chunk_pages(step_tokens, page_tokens)
        # By slot: the pages set aside, the first page held, and the end of those held.
        self._reserved, self._starts, self._ends = ([0] * len(table) for _ in range(3))

    def _first_page(self, num_tokens: int) -> int:
        """Return the first page that a token behind ``num_tokens`` sees."""
        return max(0, num_tokens - self._window_tokens + 1) // self._page_tokens

    def reusable(self, keys: list[bytes], num_pages: int) -> int:
        """Return the most pages, up to ``num_pages``, of the prefix ``keys`` behind which a token sees cached pages."""
        index = num_pages - 1
        while index >= self._first_page(num_pages * self._page_tokens):
            if not self.pool.has(keys[index]):
                num_pages = index
            index -= 1
        return num_pages

    def can_admit(self, keys: list[bytes], num_pages: int) -> bool:
        """Return whether a sequence of ``num_pages`` in all can be admitted, whatever prefix ``keys`` it shares."""
        return min(num_pages, self._most) <= self._num_unreserved

    def admit(self, sequence: Sequence, keys: list[bytes], num_pages: int) -> None:
        """Set a new sequence's pages aside, and share what its first token sees of the prefix ``keys``."""
        slot = sequence.slot
        self._reserved[slot] = min(num_pages, self._most)
        self._num_unreserved -= self._reserved[slot]
        self._starts[slot] = start = self._first_page(len(keys) * self._page_tokens)
        self._ends[slot] = len(keys)
        shared = self.pool.find(keys[start:])
        self.pool.share(shared)
        self._table[slot, start : len(keys)] = shared

    def extend(self, slot: int, num_pages: int) -> None:
        """Allocate the pages of a sequence up to ``num_pages``."""
        end = self._ends[slot]
        if num_pages > end:
            self._table[slot, end:num_pages] = self.pool.allocate(num_pages - end)
            self._ends[slot] = num_pages

    def held(self, slot: int, first: int = 0) -> Int32Array:
        """Return the pages of a sequence from page ``first`` on."""
        return self._table[slot, max(first, self._starts[slot]) : self._ends[slot]]

    def publish(self, sequence: Sequence, index: int) -> None:
        """Let a sequence's page be found under its key."""
        self.pool.publish(int(self._table[sequence.slot, index]), sequence.keys[index])

    def give_back(self, sequence: Sequence) -> None:
        """Release the pages of a sequence that no token behind its settled ones sees."""
        slot = sequence.slot
        start, first = self._starts[slot], self._first_page(sequence.num_settled)
        if first > start:
            pages = self._table[slot, start:first].copy()
            self._table[slot, start:first] = 0
            self._starts[slot] = first
            self.pool.release(pages)
            # Who resumes at a breakpoint sees these again, and all others only who parts elsewhere.
            seen = np.zeros(first - start, np.bool_)
            for end in (at // self._page_tokens for at in sequence.breakpoints):
                seen[max(0, self._first_page(end * self._page_tokens) - start) : max(0, end - start)] = True
            self.pool.demote(pages[~seen])

    def remove(self, sequence: Sequence) -> None:
        """Release all that a sequence has."""
        slot = sequence.slot
        self.pool.release(self.held(slot))
        self._num_unreserved += self._reserved[slot]
        self._reserved[slot] = self._starts[slot] = self._ends[slot] = 0

    def check_integrity(self, running: Collection[Sequence]) -> None:
        """Raise unless pages and what is set aside agree with the table and the sequences that run."""
        self.pool.check_integrity([self.held(sequence.slot) for sequence in running])
        slots = {sequence.slot for sequence in running}
        for slot, row in enumerate(self._table):
            start, end = self._starts[slot], self._ends[slot]
            if row[:start].any() or row[end:].any() or not row[start:end].all() or (end and slot not in slots):
                raise RuntimeError("a windowed page table differs from what the sequences hold")
        if sum(self._ends) - sum(self._starts) > self.pool.num_pages - self._num_unreserved:
            raise RuntimeError("more pages are held than were set aside")


class Cache:
    """Caches of ``num_slots`` running sequences of up to ``context_tokens``.

    ``windows`` are the page tables beside table 0, which has ``num_pages``; steps have up to ``step_tokens`` of
    prompts. ``states`` are the slots for states, where layers keep one.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_tokens: int,
        context_tokens: int,
        num_slots: int,
        step_tokens: int,
        windows: tuple[WindowTable, ...] = (),
        states: StateSlots | None = None,
    ) -> None:
        self.pool = PagePool(num_pages)
        """Pages of table 0."""
        self.page_tokens = page_tokens
        num_columns = -(-context_tokens // page_tokens)
        self.page_tables: Int32Array = np.zeros((1 + len(windows), num_slots, num_columns), np.int32)
        """``[G, slots, P]``: written when a sequence is admitted or grows, read by every step's plan."""
        self.windows = tuple(
            WindowPages(table, sizes, page_tokens, step_tokens)
            for table, sizes in zip(self.page_tables[1:], windows, strict=True)
        )
        self.states = None if states is None else States(states, num_slots, page_tokens, self.pool)
        self._parts: tuple[WindowPages | States, ...] = (*self.windows, *([] if self.states is None else [self.states]))

    def num_pages(self, num_tokens: int) -> int:
        """Return the pages of ``num_tokens``."""
        return -(-num_tokens // self.page_tokens)

    def find(self, keys: list[bytes]) -> Int32Array:
        """Return the pages in table 0 of the longest prefix of ``keys`` that can be reused."""
        pages = self.pool.find(keys)
        count, before = len(pages), -1
        while count != before:
            before = count
            for part in self._parts:
                count = part.reusable(keys, count)
        return pages[:count]

    def resumable(self, sequence: Sequence, num_keys: int) -> Collection[int]:
        """Return the numbers of pages up to which an admitted prompt will be reusable once it is computed.

        Its first ``num_keys`` pages may be shared.
        """
        if self.states is None:
            return range(sequence.num_published + 1, num_keys + 1)
        return self.states.due(sequence)

    def admit(self, sequence: Sequence, slot: int, keys: list[bytes], margin: int) -> bool:
        """Give ``sequence`` the pages of its tokens, sharing those of ``keys``, if ``margin`` pages stay free then.

        It has the slot ``slot`` from then on. Returns whether there are enough.
        """
        shared = self.find(keys)
        num_pages, most = self.num_pages(sequence.num_tokens), self.num_pages(sequence.num_cache_tokens)
        if num_pages - len(shared) + margin > self.pool.num_free - self.pool.count_idle(shared):
            return False
        if not all(part.can_admit(keys[: len(shared)], most) for part in self._parts):
            return False
        self.pool.share(shared)
        sequence.pages = np.concatenate((shared, self.pool.allocate(num_pages - len(shared))))
        sequence.slot = slot
        self.page_tables[0, slot, :num_pages] = sequence.pages
        sequence.num_published = len(shared)
        for part in self._parts:
            part.admit(sequence, keys[: len(shared)], most)
        if self.states is not None:
            self.states.plan(sequence, len(keys))
        return True

    def remove(self, sequence: Sequence) -> None:
        """Release all that a running sequence has."""
        self.pool.release(sequence.pages)
        if self.states is not None:
            useful = self.states.useful(sequence.keys, sequence.num_published)
            self.pool.demote(sequence.pages[useful : sequence.num_published])
        for part in self._parts:
            part.remove(sequence)
        self.page_tables[:, sequence.slot] = 0
        sequence.pages, sequence.slot, sequence.num_published = NO_PAGES, -1, 0

    def grow(self, sequence: Sequence) -> bool:
        """Allocate one more page of a decoding sequence, in each table; return whether there is one."""
        if not self.pool.num_free:
            return False
        page = self.pool.allocate(1)
        self.page_tables[0, sequence.slot, len(sequence.pages)] = page[0]
        sequence.pages = np.concatenate((sequence.pages, page))
        for window in self.windows:
            window.extend(sequence.slot, len(sequence.pages))
        return True

    def extend(self, sequence: Sequence, count: int) -> int:
        """Allocate what the next ``count`` tokens of a prompt need beyond its pages in table 0.

        Returns how many of them to compute in a step: fewer where it has to end at a checkpoint.
        """
        if self.states is not None:
            count = self.states.cut(sequence, count)
            self.states.extend(sequence, count)
        for window in self.windows:
            window.extend(sequence.slot, self.num_pages(sequence.num_computed + count))
        return count

    def publish(self, sequence: Sequence, index: int) -> None:
        """Let page ``index`` of a sequence, which is settled, be found under its key."""
        self.pool.publish(int(sequence.pages[index]), sequence.keys[index])
        for part in self._parts:
            part.publish(sequence, index)

    def give_back(self, sequence: Sequence) -> None:
        """Release what no token behind the settled ones of a sequence sees."""
        for window in self.windows:
            window.give_back(sequence)

    def unsettled(self, sequence: Sequence) -> tuple[Int32Array, ...]:
        """Return the pages of a sequence in each table that hold other than settled tokens.

        Behind them, where layers keep a state, the slots with one of such tokens.
        """
        first = sequence.num_settled // self.page_tokens
        states = () if self.states is None else (self.states.unsettled(sequence.slot),)
        return (sequence.pages[first:], *(window.held(sequence.slot, first) for window in self.windows), *states)

    def check_integrity(self, running: Collection[Sequence]) -> None:
        """Raise unless pages and page tables agree with the sequences that run."""
        self.pool.check_integrity([sequence.pages for sequence in running])
        expected = np.zeros_like(self.page_tables[0])
        for sequence in running:
            expected[sequence.slot, : len(sequence.pages)] = sequence.pages
        if not np.array_equal(expected, self.page_tables[0]):
            raise RuntimeError("the page table differs from the sequences' pages")
        for part in self._parts:
            part.check_integrity(running)
