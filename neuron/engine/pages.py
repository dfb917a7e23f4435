"""Who holds which pages of the KV cache, by number.

Pages carry a reference count, because a page may serve several sequences that begin alike. Knows no tensors. Page 0 is
never handed out: it pads page tables, and stays zero, so that what pads a sequence never belongs to another.
"""

import numpy as np

from neuron.engine.sequence import Int32Array


class PagePool:
    """``num_pages`` pages, numbered from 1."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        # A stack; the first ``num_free`` are free. The page freed last is handed out first, warm in the cache.
        self._free: Int32Array = np.arange(num_pages, 0, -1, dtype=np.int32)
        self.num_free = num_pages
        self._references: Int32Array = np.zeros(num_pages + 1, np.int32)

    def allocate(self, count: int) -> Int32Array:
        """Take ``count`` free pages, each with one reference. The caller has checked that there are as many."""
        if count > self.num_free:
            raise RuntimeError(f"{count} pages wanted, {self.num_free} free")
        self.num_free -= count
        pages: Int32Array = self._free[self.num_free : self.num_free + count][::-1].copy()
        self._references[pages] = 1
        return pages

    def release(self, pages: Int32Array) -> None:
        """Drop one reference of each of ``pages``, which are distinct; those without any are free again."""
        if (self._references[pages] < 1).any():
            raise RuntimeError("a page is released that nobody holds")
        self._references[pages] -= 1
        freed = pages[self._references[pages] == 0]
        self._free[self.num_free : self.num_free + len(freed)] = freed[::-1]
        self.num_free += len(freed)

    def check_integrity(self, held: list[Int32Array]) -> None:
        """Raise unless the references are exactly those of ``held``, one array a holder, and the rest is free."""
        counted = np.bincount(np.concatenate([*held, self._free[:0]]), minlength=self.num_pages + 1)
        if not np.array_equal(counted, self._references):
            raise RuntimeError("page references differ from what the sequences hold")
        free = np.sort(self._free[: self.num_free])
        if not np.array_equal(free, np.flatnonzero(counted[1:] == 0) + 1):
            raise RuntimeError("the free pages are not those without a holder")
