"""Where a conversation was last sent: its prefix is in that node's cache, so that is where it should go on.

A body is cut into blocks from its beginning, and each is named by a hash over it and all before it; the longest known
beginning says which node has most of it. Bounded: what nobody has come back for goes first. It knows no load: whether
the node is too busy to be worth it is :mod:`cortex.fleet.router`'s to decide. A prompt nobody has seen has no node.
"""

import re
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

BLOCK_BYTES = 1024
LONG_BLOCK_BYTES = 8192
FINE_BYTES = 64 * 1024
"""Up to here blocks are short: conversations part ways early, after a system prompt."""
MAX_BYTES = 512 * 1024
MAX_BEGINNINGS = 200_000
"""Entries remembered, some 30 MB."""

# Changes with every request, at the very beginning of the prompt; nodes leave it out too.
_BILLING = re.compile(rb"x-anthropic-billing-header:[^\"\\]*")


@dataclass(frozen=True, slots=True)
class Beginnings:
    """The hashes of a body's beginnings, short ones first, and one that is the same in every process."""

    hashes: tuple[int, ...]
    tie: int


@dataclass(frozen=True, slots=True)
class Affinity:
    """What routing needs to know of it."""

    node: str | None = None
    """Where the longest known beginning was last sent."""
    tie: int = 0
    """What decides among nodes that are equally good; every gateway computes the same."""


NO_AFFINITY = Affinity()


def beginnings(model: str, body: bytes, cache_key: str | None = None, principal: str = "") -> Beginnings:
    """Return the beginnings of a request's body; a client's own ``prompt_cache_key`` stands for all of them.

    Nodes share none between principals, so neither does this; what is sent for the first time goes to one node whoever
    sends it, as some nodes are told to share all.
    """
    if cache_key:
        tie = zlib.crc32(cache_key.encode(), zlib.crc32(model.encode()))
        return Beginnings((hash((model, principal, cache_key)),), tie)
    head = _BILLING.sub(b"", body[:MAX_BYTES]) if b"x-anthropic-billing-header:" in body[:FINE_BYTES] else body
    found = []
    chain = hash((model, principal))
    start = 0
    while start < min(len(head), MAX_BYTES):
        size = BLOCK_BYTES if start < FINE_BYTES else LONG_BLOCK_BYTES
        if start and start + size > len(head):
            break  # the last piece of a body is its newest message; it grows no prefix
        chain = hash((chain, head[start : start + size]))
        found.append(chain)
        start += size
    return Beginnings(tuple(found), zlib.crc32(head[:BLOCK_BYTES], zlib.crc32(model.encode())))


class Prefixes:
    """Which node was last sent which beginning."""

    def __init__(self, max_beginnings: int = MAX_BEGINNINGS) -> None:
        self._nodes: OrderedDict[int, str] = OrderedDict()
        self._max = max_beginnings

    def look(self, found: Beginnings, is_candidate: Callable[[str], bool]) -> Affinity:
        """Return the node of the longest beginning that a candidate has."""
        for name in reversed(found.hashes):
            node = self._nodes.get(name)
            if node is not None and is_candidate(node):
                return Affinity(node, found.tie)
        return Affinity(None, found.tie)

    def note(self, found: Beginnings, node: str) -> None:
        """Remember where a request went."""
        for name in found.hashes:
            self._nodes[name] = node
            self._nodes.move_to_end(name)
        while len(self._nodes) > self._max:
            self._nodes.popitem(last=False)
