"""GGUF Q2_K: 256 elements of 2 bits in groups of 16, each with a scale and a minimum of 4 bits, times a float16 each.

A block: 16 bytes of scales, low nibbles, and minima, high ones; two halves of 32 bytes of quants; d and dmin. Byte j of
a half has the quants of its elements j, j + 32, j + 64 and j + 96, lowest bits first. On the device scales and minima
take a byte each: 3.1 bits an element in place of 2.6.
"""

from typing import Final

from neuron.formats import BLOCK, Quantization
from neuron.formats.format import Array, Layout, Parts, StoredFormat, planes


def unpack(blocks: Array) -> Parts:
    """Return the parts of ``blocks``."""
    scales, minima = planes(blocks[:, :16], 4).unbind(1)
    quants = planes(blocks[:, 16:80].reshape(-1, 2, 32), 2)
    return Parts(quants, scales, minima, blocks[:, 80:82], blocks[:, 82:])


LAYOUT: Final = Layout(Quantization.INT2, BLOCK // 2, "int8", has_minima=True, supers="float16")
FORMAT: Final = StoredFormat("Q2_K", LAYOUT, unpack)
