"""GGUF Q2_K: 256 elements of 2 bits in groups of 16, each with a scale and a minimum of 4 bits, times a float16 each.

A block: 16 bytes of scales, low nibbles, and minima, high ones; two halves of 32 bytes of quants; d and dmin. Byte j of
a half has the quants of its elements j, j + 32, j + 64 and j + 96, lowest bits first. On the device scales and minima
take a byte each: 3.1 bits an element in place of 2.6.
"""

from typing import TYPE_CHECKING, Final

from neuron.formats import BLOCK, SUPER_BLOCK, Quantization
from neuron.formats.format import Layout, StoredFormat, halves_of, packed

if TYPE_CHECKING:
    import torch

    from neuron.formats.matrix import QuantizedMatrix


def read(blocks: "torch.Tensor", num_rows: int) -> "QuantizedMatrix":
    """Return the matrix in ``blocks``."""
    import torch

    from neuron.formats.matrix import QuantizedMatrix

    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device).view(4, 1)
    levels = (blocks[:, 16:80].reshape(-1, 2, 1, 32) >> shifts & 3).view(num_rows, -1)
    return QuantizedMatrix(
        Quantization.INT2,
        BLOCK // 2,
        packed(levels, BLOCK // 2, Quantization.INT2),
        (blocks[:, :16] & 15).view(num_rows, -1).view(torch.int8),
        (blocks[:, :16] >> 4).view(num_rows, -1).view(torch.int8),
        halves_of(blocks[:, 80:82], num_rows),
        -halves_of(blocks[:, 82:], num_rows),
    )


FORMAT: Final = StoredFormat(
    "Q2_K", SUPER_BLOCK, 84, Layout(Quantization.INT2, BLOCK // 2, "int8", has_minima=True, supers="float16"), read
)
