"""GGUF MXFP4 and NVFP4: float4 numbers (e2m1) with a scale of 8 bits for each group.

MXFP4: blocks of 32 elements behind a power of two (float8 e8m0). NVFP4: blocks of 64, of which each 16 have a float8
e4m3; four scales, then four runs of 8 bytes, low nibbles first. A float32 beside the tensor multiplies all of it.
"""

from typing import TYPE_CHECKING, Final

from neuron.formats import BLOCK, Quantization
from neuron.formats.format import Layout, StoredFormat, rows_of

if TYPE_CHECKING:
    import torch

    from neuron.formats.matrix import QuantizedMatrix


def read_mxfp4(blocks: "torch.Tensor", num_rows: int) -> "QuantizedMatrix":
    """Return the matrix in ``blocks`` of MXFP4."""
    import torch

    from neuron.formats.matrix import QuantizedMatrix

    scales = rows_of(blocks[:, :1], num_rows).view(torch.float8_e8m0fnu)
    return QuantizedMatrix(Quantization.FP4, BLOCK, rows_of(blocks[:, 1:], num_rows), scales)


def read_nvfp4(blocks: "torch.Tensor", num_rows: int) -> "QuantizedMatrix":
    """Return the matrix in ``blocks`` of NVFP4, whose rows have 1 as their scale of scales."""
    import torch

    from neuron.formats.matrix import QuantizedMatrix

    return QuantizedMatrix(
        Quantization.FP4,
        BLOCK // 2,
        rows_of(blocks[:, 4:], num_rows),
        rows_of(blocks[:, :4], num_rows).view(torch.float8_e4m3fn),
        super_scales=torch.ones(num_rows, 1, device=blocks.device),
    )


MXFP4: Final = StoredFormat("MXFP4", BLOCK, 17, Layout(Quantization.FP4, BLOCK, "float8_e8m0fnu"), read_mxfp4)
NVFP4: Final = StoredFormat(
    "NVFP4", 2 * BLOCK, 36, Layout(Quantization.FP4, BLOCK // 2, "float8_e4m3fn", supers="float32"), read_nvfp4
)
