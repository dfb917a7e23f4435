"""GGUF IQ4_NL and IQ4_XS: 4-bit codes of a table whose levels are finer near zero.

IQ4_NL: blocks of 32 elements, a float16 d and 16 bytes of codes. IQ4_XS: blocks of 256, d, scales in 6 bytes, and the
codes of 8 groups as in IQ4_NL. A group's scale is 32 less than six bits: its low four are nibbles of the last four
bytes, the low nibble first, and its high two are pairs of the 16 bits before them, the lowest first.
"""

from typing import TYPE_CHECKING, Final

from neuron.formats import BLOCK, SUPER_BLOCK, Quantization
from neuron.formats.format import Layout, StoredFormat, halves_of, rows_of

if TYPE_CHECKING:
    import torch

    from neuron.formats.matrix import QuantizedMatrix


def read_nl(blocks: "torch.Tensor", num_rows: int) -> "QuantizedMatrix":
    """Return the matrix in ``blocks`` of IQ4_NL."""
    from neuron.formats.matrix import QuantizedMatrix

    return QuantizedMatrix(
        Quantization.IQ4, BLOCK, rows_of(blocks[:, 2:], num_rows), halves_of(blocks[:, :2], num_rows)
    )


def read_xs(blocks: "torch.Tensor", num_rows: int) -> "QuantizedMatrix":
    """Return the matrix in ``blocks`` of IQ4_XS."""
    import torch

    from neuron.formats.matrix import QuantizedMatrix

    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)
    high = (blocks[:, 2:4, None] >> shifts & 3).view(-1, 8)
    low = torch.stack((blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4), 2).view(-1, 8)
    scales = ((low | high << 4) - 32).view(num_rows, -1).view(torch.int8)
    return QuantizedMatrix(
        Quantization.IQ4,
        BLOCK,
        rows_of(blocks[:, 8:], num_rows),
        scales,
        super_scales=halves_of(blocks[:, :2], num_rows),
    )


IQ4_NL: Final = StoredFormat("IQ4_NL", BLOCK, 18, Layout(Quantization.IQ4, BLOCK, "float16"), read_nl)
IQ4_XS: Final = StoredFormat(
    "IQ4_XS", SUPER_BLOCK, 136, Layout(Quantization.IQ4, BLOCK, "int8", supers="float16"), read_xs
)
