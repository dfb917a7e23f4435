"""GGUF Q4_1: blocks of 32 elements with a scale and a minimum in float16, and 4-bit quants."""

from typing import TYPE_CHECKING, Final

from neuron.formats import BLOCK, Quantization
from neuron.formats.format import Layout, StoredFormat, halves_of, rows_of

if TYPE_CHECKING:
    import torch

    from neuron.formats.matrix import QuantizedMatrix


def read(blocks: "torch.Tensor", num_rows: int) -> "QuantizedMatrix":
    """Return the matrix in ``blocks``."""
    from neuron.formats.matrix import QuantizedMatrix

    scales, minima = halves_of(blocks[:, :2], num_rows), halves_of(blocks[:, 2:4], num_rows)
    return QuantizedMatrix(Quantization.INT4, BLOCK, rows_of(blocks[:, 4:], num_rows), scales, minima)


FORMAT: Final = StoredFormat("Q4_1", BLOCK, 20, Layout(Quantization.INT4, BLOCK, "float16", has_minima=True), read)
