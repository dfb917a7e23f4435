"""GGUF Q3_K: 256 elements of 3 bits in groups of 16, each with a scale of 6 bits, which one float16 multiplies.

A block: 32 bytes of third bits, two halves of 32 bytes of low twos, 12 bytes of scales, and d. Bit i of the j-th byte
of third bits is that of element 32 i + j; low twos lie as in Q2_K. A quant is 4 less than its bits, a scale 32 less.
Low fours of scales 0 to 7 are low nibbles of the first 8 bytes of scales, of 8 to 15 the high ones; byte j of the last
four has the high twos of scales j, j + 4, j + 8 and j + 12. On the device a quant takes 4 bits, of which 8 stands for
zero: 4.6 bits an element in place of 3.4.
"""

from typing import Final

from neuron.formats import BLOCK, Quantization
from neuron.formats.format import Array, Layout, Parts, StoredFormat, planes


def unpack(blocks: Array) -> Parts:
    """Return the parts of ``blocks``."""
    low = planes(blocks[:, 32:96].reshape(-1, 2, 32), 2).view(-1, 8, 32)
    quants = (low | planes(blocks[:, :32], 1) << 2) + 4
    fours, high = planes(blocks[:, 96:104], 4).flatten(1), planes(blocks[:, 104:108], 2).flatten(1)
    return Parts(quants, (fours | high << 4) - 32, supers=blocks[:, 108:])


FORMAT: Final = StoredFormat("Q3_K", Layout(Quantization.INT4, BLOCK // 2, "int8", supers="float16"), unpack)
