"""GGUF Q8_0: blocks of 32 elements with a float16 scale and 32 int8 quants."""

from typing import Final

from neuron.formats import BLOCK, Quantization
from neuron.formats.format import Layout, Parts, StoredFormat

FORMAT: Final = StoredFormat(
    "Q8_0", Layout(Quantization.INT8, BLOCK, "float16"), lambda blocks: Parts(blocks[:, 2:], blocks[:, :2])
)
