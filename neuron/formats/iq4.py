"""GGUF IQ4_NL and IQ4_XS: 4-bit codes of a table whose levels are finer near zero.

IQ4_NL: blocks of 32 elements, a float16 d and 16 bytes of codes. IQ4_XS: blocks of 256, d, scales in 6 bytes, and the
codes of 8 groups as in IQ4_NL. A group's scale is 32 less than six bits: its low four are nibbles of the last four
bytes, the low nibble first, and its high two are pairs of the 16 bits before them, the lowest first.
"""

from typing import Final

from neuron.formats import BLOCK, Quantization
from neuron.formats.format import Array, Layout, Parts, StoredFormat, planes


def unpack_xs(blocks: Array) -> Parts:
    """Return the parts of ``blocks`` of IQ4_XS."""
    low, high = planes(blocks[:, 4:8, None], 4).flatten(1), planes(blocks[:, 2:4, None], 2).flatten(1)
    return Parts(blocks[:, 8:], (low | high << 4) - 32, supers=blocks[:, :2])


IQ4_NL: Final = StoredFormat(
    "IQ4_NL", Layout(Quantization.IQ4, BLOCK, "float16"), lambda blocks: Parts(blocks[:, 2:], blocks[:, :2])
)
IQ4_XS: Final = StoredFormat("IQ4_XS", Layout(Quantization.IQ4, BLOCK, "int8", supers="float16"), unpack_xs)
