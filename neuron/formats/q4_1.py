"""GGUF Q4_1: blocks of 32 elements with a scale and a minimum in float16, and 4-bit quants."""

from typing import Final

from neuron.formats import BLOCK, Quantization
from neuron.formats.format import Layout, Parts, StoredFormat

FORMAT: Final = StoredFormat(
    "Q4_1",
    Layout(Quantization.INT4, BLOCK, "float16", has_minima=True),
    lambda blocks: Parts(blocks[:, 4:], blocks[:, :2], blocks[:, 2:4]),
)
