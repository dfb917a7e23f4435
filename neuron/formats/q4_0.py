"""GGUF Q4_0: blocks of 32 elements ``d (q - 8)``: a float16 d and 4-bit quants. The minimum needs no array."""

from typing import Final

from neuron.formats import BLOCK, Quantization
from neuron.formats.format import Layout, Parts, StoredFormat

FORMAT: Final = StoredFormat(
    "Q4_0", Layout(Quantization.INT4, BLOCK, "float16"), lambda blocks: Parts(blocks[:, 2:], blocks[:, :2])
)
