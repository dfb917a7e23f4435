"""Prefix affinity: the nodes to which a conversation's prefix was sent, and whose prefix caches therefore have it.

A body is cut into blocks, each named by a hash over it and all blocks before it. The index is bounded, least recently
used first out. It knows no load: a policy (:mod:`cortex.fleet.policies`) decides what a cached prefix is worth.
"""

import re
import zlib
from collections import OrderedDict

cimport cython
from libc.stdint cimport int64_t, uint64_t

cdef enum:
    SHORT = 1024
    LONG = 8192
    NUM_SHORT = 64
    FINE = 65536
    MOST = 524288
    MAX_BLOCKS = 120  # NUM_SHORT of SHORT, then LONG ones up to MOST

BLOCK_BYTES = SHORT
LONG_BLOCK_BYTES = LONG
FINE_BYTES = FINE
"""Length of the prefix that is cut into short blocks: conversations diverge early, after a system prompt."""
MAX_BYTES = MOST
MAX_PREFIXES = 200_000
"""Number of prefixes in an index, some 30 MB."""

# Changes with every request, at the very beginning of the prompt; nodes leave it out too.
cdef bytes _BILLING_NAME = b"x-anthropic-billing-header:"
_BILLING = re.compile(rb"x-anthropic-billing-header:[^\"\\]*")

cdef extern from "<string.h>":
    const void *memmem(const void *, size_t, const void *, size_t) noexcept nogil

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>

    static inline uint64_t cortex_fold(uint64_t a, uint64_t b)
    {
        unsigned __int128 product = (unsigned __int128)a * b;
        return (uint64_t)product ^ (uint64_t)(product >> 64);
    }

    /* Hash of size bytes, from a seed. The multiply-and-fold of wyhash, in two lanes so that the multiplications of one
     * do not wait for the other's: 4 us for 60 KB, where Python's own hash takes 40. No defence against a client that
     * looks for collisions: it would only spoil the affinity of its own requests, since a key's seed is its own. */
    static uint64_t cortex_block_hash(const unsigned char *data, int64_t size, uint64_t seed)
    {
        const uint64_t first = 0x9e3779b97f4a7c15u, second = 0xc2b2ae3d27d4eb4fu;
        uint64_t one = seed ^ first, other = cortex_fold(seed ^ second, first);
        int64_t left = size;
        for (; left >= 32; data += 32, left -= 32) {
            uint64_t words[4];
            memcpy(words, data, 32);
            one = cortex_fold(words[0] ^ first, words[1] ^ one);
            other = cortex_fold(words[2] ^ second, words[3] ^ other);
        }
        if (left) {
            uint64_t words[4] = {0, 0, 0, 0};
            memcpy(words, data, (size_t)left);
            one = cortex_fold(words[0] ^ first, words[1] ^ one);
            other = cortex_fold(words[2] ^ second, words[3] ^ other);
        }
        return cortex_fold(one ^ (uint64_t)size, other ^ first);
    }
    """
    uint64_t block_hash "cortex_block_hash"(const unsigned char *data, int64_t size, uint64_t seed) noexcept nogil


cdef inline Py_ssize_t end_of(Py_ssize_t block) noexcept nogil:
    """Return where a block ends."""
    if block < NUM_SHORT:
        return (block + 1) * SHORT
    return FINE + (block + 1 - NUM_SHORT) * LONG


@cython.final
cdef class PrefixHashes:
    """Hashes of a body's prefixes, short ones first, and ``tie``, a hash that is the same in every process."""

    cdef uint64_t _hashes[MAX_BLOCKS]
    cdef Py_ssize_t _num_blocks
    cdef Py_ssize_t _whole_bytes  # of the only prefix, where a client's own key is that; else 0
    cdef readonly unsigned long tie

    @property
    def hashes(self):
        """The hashes."""
        return tuple([self._hashes[block] for block in range(self._num_blocks)])

    @property
    def ends(self):
        """Lengths of the prefixes in bytes."""
        return tuple([self.end(block) for block in range(self._num_blocks)])

    cdef Py_ssize_t end(self, Py_ssize_t block) noexcept:
        return self._whole_bytes or end_of(block)


cpdef PrefixHashes prefix_hashes(str model, bytes body, cache_key=None, str principal=""):
    """Return the prefix hashes of a request's body; a client's own ``prompt_cache_key`` replaces them all.

    Nodes share no prefix between principals, so the hashes differ by principal. The tie-breaker does not, since nodes
    can be configured to share all.
    """
    cdef PrefixHashes found = PrefixHashes.__new__(PrefixHashes)
    if cache_key:
        found._hashes[0] = <uint64_t><int64_t>hash((model, principal, cache_key))
        found._num_blocks = 1
        found._whole_bytes = len(body)
        found.tie = zlib.crc32(cache_key.encode(), zlib.crc32(model.encode()))
        return found
    cdef bytes head = body
    # 3 us where `bytes.find` takes 10
    if memmem(<const char *>body, min(len(body), FINE), <const char *>_BILLING_NAME, len(_BILLING_NAME)) != NULL:
        head = _BILLING.sub(b"", body[:MOST])
    cdef const unsigned char *data = head
    cdef Py_ssize_t length = min(len(head), MOST), start = 0, block = 0, end
    cdef uint64_t chain = <uint64_t><int64_t>hash((model, principal))
    with nogil:
        # Safety: `head` is immutable and held by this frame, `found` is not shared yet.
        while start < length:
            end = end_of(block)
            if end > length:
                if start:
                    break  # the last block of a body is its newest message, no prefix of the next request
                end = length
            chain = block_hash(data + start, end - start, chain)
            found._hashes[block] = chain
            block += 1
            start = end
    found._num_blocks = block
    found.tie = zlib.crc32(head[:SHORT], zlib.crc32(model.encode()))
    return found


@cython.final
cdef class PrefixIndex:
    """Index of prefixes, with the nodes to which each was sent.

    A node that was sent a prefix was sent all shorter ones, and those are the last to go: so the longest that a node
    has is found by bisection.
    """

    cdef object _nodes
    cdef Py_ssize_t _max

    def __init__(self, max_prefixes=MAX_PREFIXES):
        self._nodes = OrderedDict()
        self._max = max_prefixes

    def __len__(self):
        return len(self._nodes)

    cpdef dict cached_bytes(self, PrefixHashes prefix):
        """Return the length of the longest prefix that each node was sent, without the nodes that were sent none."""
        cdef dict found = {}
        cdef Py_ssize_t low, high, middle
        if not prefix._num_blocks:
            return found
        for node in self._nodes.get(prefix._hashes[0], ()):
            low, high = 0, prefix._num_blocks
            while high - low > 1:
                middle = (low + high) // 2
                if node in self._nodes.get(prefix._hashes[middle], ()):
                    low = middle
                else:
                    high = middle
            found[node] = prefix.end(low)
        return found

    cpdef object record(self, PrefixHashes prefix, str node):
        """Record the node to which a request was sent."""
        nodes = self._nodes
        move_to_end = nodes.move_to_end
        for block in range(prefix._num_blocks - 1, -1, -1):
            name = prefix._hashes[block]
            known = nodes.get(name)
            if known is None:
                nodes[name] = (node,)
            else:
                if node not in known:
                    nodes[name] = (*known, node)
                move_to_end(name)
        while len(nodes) > self._max:
            nodes.popitem(last=False)
