"""GGUF Q4_K and Q5_K: 256 elements in groups of 32, each with a scale and a minimum of 6 bits, times a float16 each.

A block: d and dmin, scales and minima in 12 bytes, for Q5_K 32 bytes of fifth bits, four runs of 32 bytes. Of a run the
low halves are elements 0 to 31 and the high halves 32 to 63: two groups of 64 elements. Bit i of the j-th byte of fifth
bits is that of element j of group i. On the device Q5_K takes a byte a quant: a thread would have to gather the fifth
bits from a plane of their own.
"""

from typing import Final

from neuron.formats import BLOCK, Quantization
from neuron.formats.format import Array, Layout, Parts, StoredFormat, planes


def unpack(blocks: Array) -> Parts:
    """Return the parts of ``blocks`` of either kind."""
    import torch

    # Six bits each of the first four scales and minima, the low four of the others, whose high two are above the six.
    first, low = blocks[:, 4:12].view(-1, 2, 4), planes(blocks[:, 12:16], 4)
    scales, minima = torch.cat((first & 63, low | first >> 6 << 4), 2).unbind(1)
    quants = planes(blocks[:, -128:].reshape(-1, 4, 32), 4).view(-1, 8, 32)
    if blocks.shape[1] > Q4_K.block_bytes:
        quants = quants | planes(blocks[:, 16:48], 1) << 4
    return Parts(quants, scales, minima, blocks[:, :2], blocks[:, 2:4])


Q4_K: Final = StoredFormat("Q4_K", Layout(Quantization.INT4, BLOCK, "int8", has_minima=True, supers="float16"), unpack)
Q5_K: Final = StoredFormat("Q5_K", Layout(Quantization.INT8, BLOCK, "int8", has_minima=True, supers="float16"), unpack)
