"""GGUF Q8_0: blocks of 32 elements with a float16 scale and 32 int8 quants."""

from typing import TYPE_CHECKING, Final

from neuron.formats import BLOCK, Quantization
from neuron.formats.format import Layout, StoredFormat, halves_of, rows_of

if TYPE_CHECKING:
    import torch

    from neuron.formats.matrix import QuantizedMatrix


def read(blocks: "torch.Tensor", num_rows: int) -> "QuantizedMatrix":
    """Return the matrix in ``blocks``."""
    import torch

    from neuron.formats.matrix import QuantizedMatrix

    quants = rows_of(blocks[:, 2:], num_rows).view(torch.int8)
    return QuantizedMatrix(Quantization.INT8, BLOCK, quants, halves_of(blocks[:, :2], num_rows))


FORMAT: Final = StoredFormat("Q8_0", BLOCK, 34, Layout(Quantization.INT8, BLOCK, "float16"), read)
