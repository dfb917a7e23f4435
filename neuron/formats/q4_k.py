"""GGUF Q4_K and Q5_K: 256 elements in groups of 32, each with a scale and a minimum of 6 bits, times a float16 each.

A block: d and dmin, scales and minima in 12 bytes, for Q5_K 32 bytes of fifth bits, four runs of 32 bytes. Of a run the
low halves are elements 0 to 31 and the high halves 32 to 63: two groups of 64 elements. Bit i of the j-th byte of fifth
bits is that of element j of group i. On the device Q5_K takes a byte a quant: a thread would have to gather the fifth
bits from a plane of their own.
"""

from typing import TYPE_CHECKING, Final

from neuron.formats import BLOCK, SUPER_BLOCK, Quantization
from neuron.formats.format import Layout, StoredFormat, halves_of, packed

if TYPE_CHECKING:
    import torch

    from neuron.formats.matrix import QuantizedMatrix


def read(blocks: "torch.Tensor", num_rows: int) -> "QuantizedMatrix":
    """Return the matrix in ``blocks`` of either kind."""
    import torch

    from neuron.formats.matrix import QuantizedMatrix

    low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = torch.cat((low & 63, (high & 15) | (low >> 6) << 4), 1)
    minimum = torch.cat((middle & 63, (high >> 4) | (middle >> 6) << 4), 1)
    runs = blocks[:, -128:].reshape(-1, 4, 1, 32)
    levels = torch.cat((runs & 15, runs >> 4), 2).view(-1, 8, 32)
    if fifth := blocks.shape[1] > Q4_K.block_bytes:
        bits = torch.arange(8, dtype=torch.uint8, device=blocks.device).view(8, 1)
        levels |= (blocks[:, None, 16:48] >> bits & 1) << 4
    levels = levels.view(num_rows, -1)
    return QuantizedMatrix(
        Quantization.INT8 if fifth else Quantization.INT4,
        BLOCK,
        levels.view(torch.int8) if fifth else packed(levels, BLOCK, Quantization.INT4),
        scale.view(num_rows, -1).view(torch.int8),
        minimum.view(num_rows, -1).view(torch.int8),
        halves_of(blocks[:, :2], num_rows),
        -halves_of(blocks[:, 2:4], num_rows),
    )


Q4_K: Final = StoredFormat(
    "Q4_K", SUPER_BLOCK, 144, Layout(Quantization.INT4, BLOCK, "int8", has_minima=True, supers="float16"), read
)
Q5_K: Final = StoredFormat(
    "Q5_K", SUPER_BLOCK, 176, Layout(Quantization.INT8, BLOCK, "int8", has_minima=True, supers="float16"), read
)
