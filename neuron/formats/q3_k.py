"""GGUF Q3_K: 256 elements of 3 bits in groups of 16, each with a scale of 6 bits, which one float16 multiplies.

A block: 32 bytes of third bits, two halves of 32 bytes of low twos, 12 bytes of scales, and d. Bit i of the j-th byte
of third bits is that of element 32 i + j; low twos lie as in Q2_K. A quant is 4 less than its bits, a scale 32 less.
Low fours of scales 0 to 7 are low nibbles of the first 8 bytes of scales, of 8 to 15 the high ones; byte j of the last
four has the high twos of scales j, j + 4, j + 8 and j + 12. On the device a quant takes 4 bits, of which 8 stands for
zero: 4.6 bits an element in place of 3.4.
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

    twos = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device).view(4, 1)
    ones = torch.arange(8, dtype=torch.uint8, device=blocks.device).view(8, 1)
    low = (blocks[:, 32:96].reshape(-1, 2, 1, 32) >> twos & 3).view(-1, 8, 32)
    third = blocks[:, None, :32] >> ones & 1
    levels = ((low | third << 2) + 4).view(num_rows, -1)
    fours = torch.cat((blocks[:, 96:104] & 15, blocks[:, 96:104] >> 4), 1)
    high = (blocks[:, None, 104:108] >> twos & 3).view(-1, 16)
    return QuantizedMatrix(
        Quantization.INT4,
        BLOCK // 2,
        packed(levels, BLOCK // 2, Quantization.INT4),
        ((fours | high << 4) - 32).view(num_rows, -1).view(torch.int8),
        super_scales=halves_of(blocks[:, 108:], num_rows),
    )


FORMAT: Final = StoredFormat(
    "Q3_K", SUPER_BLOCK, 110, Layout(Quantization.INT4, BLOCK // 2, "int8", supers="float16"), read
)
