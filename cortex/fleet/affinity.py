"""Prefix affinity: the node to which a conversation's prefix was last sent, and whose prefix cache therefore has it.

A body is cut into blocks, each named by a hash over it and all blocks before it; the longest known prefix decides. The
index is bounded, least recently used first out. It has no load: :mod:`cortex.fleet.router` decides whether the node is
too busy.
"""

import re
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

BLOCK_BYTES = 1024
LONG_BLOCK_BYTES = 8192
FINE_BYTES = 64 * 1024
"""Length of the prefix that is cut into short blocks: conversations diverge early, after a system prompt."""
MAX_BYTES = 512 * 1024
MAX_PREFIXES = 200_000
"""Number of prefixes in an index, some 30 MB."""

# Changes with every request, at the very beginning of the prompt; nodes leave it out too.
_BILLING = re.compile(rb"x-anthropic-billing-header:[^\"\\]*")


@dataclass(frozen=True, slots=True)
class PrefixHashes:
    """Hashes of a body's prefixes, short ones first, and ``tie``, a hash that is the same in every process."""

    hashes: tuple[int, ...]
    tie: int


@dataclass(frozen=True, slots=True)
class Affinity:
    """Affinity of one request, for routing."""

    node: str | None = None
    """Node to which the longest known prefix was last sent."""
    tie: int = 0
    """Tie-breaker among equally good nodes; every gateway computes the same."""


NO_AFFINITY = Affinity()


def prefix_hashes(model: str, body: bytes, cache_key: str | None = None, principal: str = "") -> PrefixHashes:
    """Return the prefix hashes of a request's body; a client's own ``prompt_cache_key`` replaces them all.

    Nodes share no prefix between principals, so the hashes differ by principal. The tie-breaker does not, since nodes
    can be configured to share all.
    """
    if cache_key:
        tie = zlib.crc32(cache_key.encode(), zlib.crc32(model.encode()))
        return PrefixHashes((hash((model, principal, cache_key)),), tie)
    head = _BILLING.sub(b"", body[:MAX_BYTES]) if b"x-anthropic-billing-header:" in body[:FINE_BYTES] else body
    found = []
    chain = hash((model, principal))
    start = 0
    while start < min(len(head), MAX_BYTES):
        size = BLOCK_BYTES if start < FINE_BYTES else LONG_BLOCK_BYTES
        if start and start + size > len(head):
            break  # the last block of a body is its newest message, no prefix of the next request
        chain = hash((chain, head[start : start + size]))
        found.append(chain)
        start += size
    return PrefixHashes(tuple(found), zlib.crc32(head[:BLOCK_BYTES], zlib.crc32(model.encode())))


class PrefixIndex:
    """Index of prefixes, with the node to which each was last sent."""

    def __init__(self, max_prefixes: int = MAX_PREFIXES) -> None:
        self._nodes: OrderedDict[int, str] = OrderedDict()
        self._max = max_prefixes

    def find(self, prefix: PrefixHashes, is_candidate: Callable[[str], bool]) -> Affinity:
        """Return the affinity of the longest prefix that was last sent to a candidate."""
        for name in reversed(prefix.hashes):
            node = self._nodes.get(name)
            if node is not None and is_candidate(node):
                return Affinity(node, prefix.tie)
        return Affinity(None, prefix.tie)

    def record(self, prefix: PrefixHashes, node: str) -> None:
        """Record the node to which a request was sent."""
        for name in prefix.hashes:
            self._nodes[name] = node
            self._nodes.move_to_end(name)
        while len(self._nodes) > self._max:
            self._nodes.popitem(last=False)
