"""GGUF Q5_0 and Q5_1: blocks of 32 elements of 5 bits, ``d (q - 16)`` and ``d q + m``, with d and m in float16.

A block: d, for Q5_1 m, 32 bits of which bit j is the fifth of element j, and 16 bytes of which byte j has the low fours
of elements j and j + 16. On the device a quant takes a byte: 8.5 and 9 bits an element in place of 5.5 and 6.
"""

from typing import Final

from neuron.formats import BLOCK, Quantization
from neuron.formats.format import Array, Layout, Parts, StoredFormat, planes


def unpack(blocks: Array) -> Parts:
    """Return the parts of ``blocks`` of either kind."""
    quants = planes(blocks[:, -16:], 4).flatten(1) | planes(blocks[:, -20:-16, None], 1).flatten(1) << 4
    if blocks.shape[1] == Q5_0.block_bytes:
        return Parts(quants - 16, blocks[:, :2])
    return Parts(quants, blocks[:, :2], blocks[:, 2:4])


Q5_0: Final = StoredFormat("Q5_0", Layout(Quantization.INT8, BLOCK, "float16"), unpack)
Q5_1: Final = StoredFormat("Q5_1", Layout(Quantization.INT8, BLOCK, "float16", has_minima=True), unpack)
