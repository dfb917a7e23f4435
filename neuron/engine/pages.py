"""The page pool of the KV cache: reference counts, and full pages by the hash of their contents.

Pages are reference-counted, because sequences with a common prefix share them. A full page may be *published* under a
key that stands for its tokens and all before them (:mod:`neuron.engine.prefix`); without references it is kept until
its memory is needed: those demoted first, then the least recently used. No tensors here. Page 0 is never allocated: it
pads page tables and stays zero, so that padding never belongs to a sequence. State slots (:mod:`neuron.engine.states`)
are such pages too.
"""

import collections
from collections.abc import Callable, Iterable

import numpy as np

from neuron.engine.sequence import Int32Array


class PagePool:
    """``num_pages`` pages, numbered from 1."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        # A stack; the first ``_num_blank`` are blank. The page freed last is allocated first, warm in the cache.
        self._blank: Int32Array = np.arange(num_pages, 0, -1, dtype=np.int32)
        self._num_blank = num_pages
        self._references: Int32Array = np.zeros(num_pages + 1, np.int32)
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        # Published pages without references, in the order of their eviction.
        self._idle: collections.OrderedDict[int, None] = collections.OrderedDict()
        self.on_evict: Callable[[bytes], None] = lambda key: None
        """Function called with the key of each page that is evicted for its memory."""

    @property
    def num_free(self) -> int:
        """Return how many pages :meth:`allocate` can return: the blank and the idle ones."""
        return self._num_blank + len(self._idle)

    @property
    def num_blank(self) -> int:
        """Return how many pages are neither held nor published."""
        return self._num_blank

    def allocate(self, count: int) -> Int32Array:
        """Take ``count`` free pages, each with one reference. The caller has checked that there are as many."""
        if count > self.num_free:
            raise RuntimeError(f"{count} pages wanted, {self.num_free} free")
        blank = min(count, self._num_blank)
        self._num_blank -= blank
        pages: Int32Array = np.empty(count, np.int32)
        pages[:blank] = self._blank[self._num_blank : self._num_blank + blank][::-1]
        for index in range(blank, count):
            page, _ = self._idle.popitem(last=False)
            key = self._key_of.pop(page)
            del self._page_of[key]
            self.on_evict(key)
            pages[index] = page
        self._references[pages] = 1
        return pages

    def release(self, pages: Int32Array) -> None:
        """Drop one reference of each of ``pages``, which are distinct and in a sequence's order.

        Pages without any are free again. The end of a sequence is evicted before its prefix, which more sequences
        share.
        """
        if (self._references[pages] < 1).any():
            raise RuntimeError("a page is released that has no references")
        self._references[pages] -= 1
        for page in pages[self._references[pages] == 0][::-1].tolist():
            if page in self._key_of:
                self._idle[page] = None
            else:
                self._free(page)

    # -------------------------------------------------------------- published pages

    def publish(self, page: int, key: bytes) -> None:
        """Let ``page``, which is held and full, be found under ``key``. It replaces an idle page of that key.

        The earlier page would be evicted sooner; one that is held stays.
        """
        if self._references[page] < 1 or page in self._key_of:
            raise RuntimeError(f"page {page} is published twice or has no references")
        earlier = self._page_of.get(key)
        if earlier is not None:
            if earlier not in self._idle:
                return
            del self._idle[earlier], self._key_of[earlier]
            self._free(earlier)
        self._page_of[key] = page
        self._key_of[page] = key

    def demote(self, pages: Int32Array) -> None:
        """Have the idle ones of ``pages``, which are in a sequence's order, evicted before all others."""
        for page in pages.tolist():
            if page in self._idle:
                self._idle.move_to_end(page, last=False)

    def idle_keys(self) -> list[bytes]:
        """Return the keys of the idle pages."""
        return [self._key_of[page] for page in self._idle]

    def withdraw(self, key: bytes) -> None:
        """Make the idle page of ``key`` blank."""
        page = self._page_of.pop(key)
        del self._idle[page], self._key_of[page]
        self._free(page)

    def _free(self, page: int) -> None:
        """Make a page blank."""
        self._blank[self._num_blank] = page
        self._num_blank += 1

    def has(self, key: bytes) -> bool:
        """Return whether a page of ``key`` is cached."""
        return key in self._page_of

    def find(self, keys: Iterable[bytes]) -> Int32Array:
        """Return the pages of the longest prefix of ``keys`` that is cached."""
        found = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            found.append(page)
        return np.array(found, np.int32)

    def count_idle(self, pages: Int32Array) -> int:
        """Return how many of ``pages`` are idle: sharing takes them from the free ones."""
        return int(np.count_nonzero(self._references[pages] == 0))

    def share(self, pages: Int32Array) -> None:
        """Take one more reference of each of ``pages``, which :meth:`find` returned."""
        for page in pages[self._references[pages] == 0].tolist():
            del self._idle[page]
        self._references[pages] += 1

    def check_integrity(self, held: list[Int32Array]) -> None:
        """Raise unless the references are those of ``held``, one array a sequence, and the rest is free."""
        counted = np.bincount(np.concatenate([*held, self._blank[:0]]), minlength=self.num_pages + 1)
        if not np.array_equal(counted, self._references):
            raise RuntimeError("page references differ from what the sequences hold")
        free = np.sort([*self._blank[: self._num_blank].tolist(), *self._idle])
        if not np.array_equal(free, np.flatnonzero(counted[1:] == 0) + 1):
            raise RuntimeError("the free pages are not those without references")
        if {page: key for key, page in self._page_of.items()} != self._key_of or not self._idle.keys() <= set(
            self._key_of
        ):
            raise RuntimeError("the published pages and their keys do not agree")
