"""GGUF Q6_K: 256 elements in groups of 16, each with an int8 scale, which one float16 multiplies.

A block, in two halves: 64 bytes of low fours each, 32 bytes of high twos each; 16 int8 scales, and d. Of a half's bytes
of low fours, the low nibbles are its elements 0 to 63 and the high ones 64 to 127; byte j of high twos has those of
elements j, j + 32, j + 64 and j + 96. A quant is 32 less than its six bits. On the device it takes a byte.
"""

from typing import TYPE_CHECKING, Final

from neuron.formats import BLOCK, SUPER_BLOCK, Quantization
from neuron.formats.format import Layout, StoredFormat, halves_of, rows_of

if TYPE_CHECKING:
    import torch

    from neuron.formats.matrix import QuantizedMatrix


def read(blocks: "torch.Tensor", num_rows: int) -> "QuantizedMatrix":
    """Return the matrix in ``blocks``."""
    import torch

    from neuron.formats.matrix import QuantizedMatrix

    low = blocks[:, :128].reshape(-1, 2, 1, 64)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    fours = torch.cat((low & 15, low >> 4), 2).view(-1, 2, 4, 32)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device).view(4, 1)
    quants = ((fours | (high >> shifts & 3) << 4) - 32).view(num_rows, -1).view(torch.int8)
    scales = rows_of(blocks[:, 192:208], num_rows).view(torch.int8)
    return QuantizedMatrix(
        Quantization.INT8, BLOCK // 2, quants, scales, super_scales=halves_of(blocks[:, 208:], num_rows)
    )


FORMAT: Final = StoredFormat(
    "Q6_K", SUPER_BLOCK, 210, Layout(Quantization.INT8, BLOCK // 2, "int8", supers="float16"), read
)
