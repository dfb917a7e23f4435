"""Prefix affinity: the nodes to which a conversation's prefix was sent, and whose prefix caches therefore have it.

A body is cut into blocks, each named by a hash over it and all blocks before it. The index is bounded, least recently
used first out. It knows no load: a policy (:mod:`cortex.fleet.policies`) decides what a cached prefix is worth.
"""

import re
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

BLOCK_BYTES = 1024
LONG_BLOCK_BYTES = 8192
FINE_BYTES = 64 * 1024
"""Length of the prefix that is cut into short blocks: conversations diverge early, after a system prompt."""
MAX_BYTES = 512 * 1024
BLOCK_ENDS = (
    *range(BLOCK_BYTES, FINE_BYTES + 1, BLOCK_BYTES),
    *range(FINE_BYTES + LONG_BLOCK_BYTES, MAX_BYTES + 1, LONG_BLOCK_BYTES),
)
MAX_PREFIXES = 200_000
"""Number of prefixes in an index, some 30 MB."""

# Changes with every request, at the very beginning of the prompt; nodes leave it out too.
_BILLING = re.compile(rb"x-anthropic-billing-header:[^\"\\]*")


@dataclass(frozen=True, slots=True)
class PrefixHashes:
    """Hashes of a body's prefixes, short ones first.

    ``ends`` are the prefixes' lengths in bytes, and ``tie`` is a hash that is the same in every process.
    """

    hashes: tuple[int, ...]
    ends: tuple[int, ...]
    num_bytes: int
    tie: int


def prefix_hashes(model: str, body: bytes, cache_key: str | None = None, principal: str = "") -> PrefixHashes:
    """Return the prefix hashes of a request's body; a client's own ``prompt_cache_key`` replaces them all.

    Nodes share no prefix between principals, so the hashes differ by principal. The tie-breaker does not, since nodes
    can be configured to share all.
    """
    if cache_key:
        tie = zlib.crc32(cache_key.encode(), zlib.crc32(model.encode()))
        return PrefixHashes((hash((model, principal, cache_key)),), (len(body),), len(body), tie)
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
    tie = zlib.crc32(head[:BLOCK_BYTES], zlib.crc32(model.encode()))
    return PrefixHashes(tuple(found), BLOCK_ENDS[: len(found)], max(len(body), BLOCK_BYTES), tie)


class PrefixIndex:
    """Index of prefixes, with the nodes to which each was sent."""

    def __init__(self, max_prefixes: int = MAX_PREFIXES) -> None:
        self._nodes: OrderedDict[int, tuple[str, ...]] = OrderedDict()
        self._max = max_prefixes

    def cached_bytes(self, prefix: PrefixHashes) -> Mapping[str, int]:
        """Return the length of the longest prefix that each node was sent, without the nodes that were sent none."""
        found: dict[str, int] = {}
        for name, end in zip(reversed(prefix.hashes), reversed(prefix.ends), strict=True):
            for node in self._nodes.get(name, ()):
                if node not in found:
                    found[node] = end
        return found

    def record(self, prefix: PrefixHashes, node: str) -> None:
        """Record the node to which a request was sent."""
        nodes = self._nodes
        for name in prefix.hashes:
            known = nodes.get(name, ())
            if node not in known:
                nodes[name] = (*known, node)
            nodes.move_to_end(name)
        while len(nodes) > self._max:
            nodes.popitem(last=False)
