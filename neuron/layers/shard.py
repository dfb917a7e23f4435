"""Shard of a model over several devices: the rows and columns of each tensor that a rank has.

As in Megatron (arXiv:1909.08053), matrices that read the residual are cut by rows (heads; the MLP's width), and
matrices that write it by columns, so that a layer sums over the ranks twice. The head is cut by rows too, and rank 0
gathers the logits. Vectors and the embedding are on all ranks. Parts are whole key-value heads and runs of the MLP's
width, as equal as possible: 3 heads on 2 ranks are 2 and 1. With more ranks than key-value heads, each of these is on
several ranks, which divide the query heads that read it. Pure and without torch.
"""

import dataclasses
from typing import Final

from cortex.wire.errors import InvalidRequestError

WIDTH_UNIT: Final = 256
"""Unit of cuts of the MLP where it is wide enough: GGUF's longest blocks stay whole."""
VOCABULARY_UNIT: Final = 16
"""Unit of cuts of the vocabulary: a rank's part of a tied head is a view aligned to 16 bytes."""


@dataclasses.dataclass(frozen=True, slots=True)
class Shard:
    """Shard of rank ``rank`` of ``size``."""

    rank: int = 0
    size: int = 1

    def share(self, count: int, unit: int = 1) -> range:
        """Return this rank's run of ``count`` elements, in whole units but for the last."""
        units = -(-count // unit)
        bounds = [min(count, unit * (units * rank // self.size)) for rank in (self.rank, self.rank + 1)]
        return range(*bounds)

    def kv_heads(self, num_kv_heads: int) -> range:
        """Return this rank's key-value heads."""
        if self.size <= num_kv_heads:
            return self.share(num_kv_heads)
        head = self.rank * num_kv_heads // self.size
        return range(head, head + 1)

    def query_heads(self, num_heads: int, num_kv_heads: int) -> range:
        """Return this rank's query heads, which read its key-value heads and no others.

        Raises :class:`InvalidRequestError` if the heads cannot be divided.
        """
        if self.size > num_kv_heads and (self.size % num_kv_heads or self.size > num_heads):
            raise InvalidRequestError(
                f"tensor_parallel is {self.size}; the model's {num_heads} heads and {num_kv_heads} "
                "key-value heads can be shared out to as many devices as there are key-value heads, or fewer, or to a "
                "multiple of them up to the heads",
                param="tensor_parallel",
            )
        per_kv_head = num_heads // num_kv_heads
        heads = self.kv_heads(num_kv_heads)
        if self.size <= num_kv_heads:
            return range(heads.start * per_kv_head, heads.stop * per_kv_head)
        ranks = self.size // num_kv_heads
        part = Shard(self.rank % ranks, ranks).share(per_kv_head)
        return range(heads.start * per_kv_head + part.start, heads.start * per_kv_head + part.stop)

    def width(self, width: int) -> range:
        """Return this rank's run of an MLP's ``width``, or of each expert's."""
        unit = next((unit for unit in (WIDTH_UNIT, 32) if width >= unit * self.size), 1)
        return self.share(width, unit)

    def vocabulary(self, vocab_size: int) -> range:
        """Return this rank's rows of the head."""
        return self.share(vocab_size, VOCABULARY_UNIT if vocab_size >= VOCABULARY_UNIT * self.size else 1)


WHOLE: Final = Shard()
Runs = tuple[range, ...]
"""Elements of an axis that a rank has, in runs."""


def tiled_heads(shard: Shard, num_heads: int, num_kv_heads: int) -> Runs:
    """Return a rank's query heads where head h reads key-value head ``h % num_kv_heads``, in the order of the file.

    They are those of :meth:`Shard.query_heads`: of each tile, which has a head for every key-value head, the run for
    the rank's own, so that head i of the rank reads the i-th of these, modulo their number. Raises as that method.
    """
    per_kv_head, heads = num_heads // num_kv_heads, shard.query_heads(num_heads, num_kv_heads)
    own = shard.kv_heads(num_kv_heads)
    if len(own) == num_kv_heads:
        return (heads,)
    first = heads.start - own.start * per_kv_head
    tiles = range(first, first + len(heads) // len(own))
    return tuple(range(tile * num_kv_heads + own.start, tile * num_kv_heads + own.stop) for tile in tiles)


def scaled(runs: Runs, factor: int) -> Runs:
    """Return the runs of elements of runs of heads of ``factor`` elements."""
    return tuple(range(run.start * factor, run.stop * factor) for run in runs)


def count(runs: Runs) -> int:
    """Return the number of elements of runs."""
    return sum(map(len, runs))
