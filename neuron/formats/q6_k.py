"""GGUF Q6_K: 256 elements in groups of 16, each with an int8 scale, which one float16 multiplies.

A block, in two halves: 64 bytes of low fours each, 32 bytes of high twos each; 16 int8 scales, and d. Of a half's bytes
of low fours, the low nibbles are its elements 0 to 63 and the high ones 64 to 127; byte j of high twos has those of
elements j, j + 32, j + 64 and j + 96. A quant is 32 less than its six bits. On the device it takes a byte.
"""

from typing import Final

from neuron.formats import BLOCK, Quantization
from neuron.formats.format import Array, Layout, Parts, StoredFormat, planes


def unpack(blocks: Array) -> Parts:
    """Return the parts of ``blocks``."""
    low = planes(blocks[:, :128].reshape(-1, 2, 64), 4).view(-1, 2, 4, 32)
    high = planes(blocks[:, 128:192].reshape(-1, 2, 32), 2)
    return Parts((low | high << 4) - 32, blocks[:, 192:208], supers=blocks[:, 208:])


FORMAT: Final = StoredFormat("Q6_K", Layout(Quantization.INT8, BLOCK // 2, "int8", supers="float16"), unpack)
