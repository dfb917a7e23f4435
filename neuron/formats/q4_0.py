"""GGUF Q4_0: blocks of 32 elements ``d (q - 8)``: a float16 d and 4-bit quants. The minimum needs no array."""

from typing import TYPE_CHECKING, Final

from neuron.formats import BLOCK, Quantization
from neuron.formats.format import Layout, StoredFormat, halves_of, rows_of

if TYPE_CHECKING:
    import torch

    from neuron.formats.matrix import QuantizedMatrix


def read(blocks: "torch.Tensor", num_rows: int) -> "QuantizedMatrix":
    """Return the matrix in ``blocks``."""
    from neuron.formats.matrix import QuantizedMatrix

    return QuantizedMatrix(
        Quantization.INT4, BLOCK, rows_of(blocks[:, 2:], num_rows), halves_of(blocks[:, :2], num_rows)
    )


FORMAT: Final = StoredFormat("Q4_0", BLOCK, 18, Layout(Quantization.INT4, BLOCK, "float16"), read)
