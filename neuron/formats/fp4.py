"""GGUF MXFP4: blocks of 32 float4 numbers (e2m1), with a power of two as a scale (float8 e8m0) before them."""

from typing import TYPE_CHECKING, Final

from neuron.formats import BLOCK, Quantization
from neuron.formats.format import Layout, StoredFormat, rows_of

if TYPE_CHECKING:
    import torch

    from neuron.formats.matrix import QuantizedMatrix


def read_mxfp4(blocks: "torch.Tensor", num_rows: int) -> "QuantizedMatrix":
    """Return the matrix in ``blocks``."""
    import torch

    from neuron.formats.matrix import QuantizedMatrix

    scales = rows_of(blocks[:, :1], num_rows).view(torch.float8_e8m0fnu)
    return QuantizedMatrix(Quantization.FP4, BLOCK, rows_of(blocks[:, 1:], num_rows), scales)


MXFP4: Final = StoredFormat("MXFP4", BLOCK, 17, Layout(Quantization.FP4, BLOCK, "float8_e8m0fnu"), read_mxfp4)
