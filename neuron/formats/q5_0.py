"""GGUF Q5_0 and Q5_1: blocks of 32 elements of 5 bits, ``d (q - 16)`` and ``d q + m``, with d and m in float16.

A block: d, for Q5_1 m, 32 bits of which bit j is the fifth of element j, and 16 bytes of which byte j has the low fours
of elements j and j + 16. On the device a quant takes a byte: 8.5 and 9 bits an element in place of 5.5 and 6.
"""

from typing import TYPE_CHECKING, Final

from neuron.formats import BLOCK, Quantization
from neuron.formats.format import Layout, StoredFormat, halves_of

if TYPE_CHECKING:
    import torch

    from neuron.formats.matrix import QuantizedMatrix


def read(blocks: "torch.Tensor", num_rows: int) -> "QuantizedMatrix":
    """Return the matrix in ``blocks`` of either kind."""
    import torch

    from neuron.formats.matrix import QuantizedMatrix

    has_minima = blocks.shape[1] == Q5_1.block_bytes
    fours = torch.cat((blocks[:, -16:] & 15, blocks[:, -16:] >> 4), 1)
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    fifths = (blocks[:, -20:-16, None] >> shifts & 1).view(-1, BLOCK)
    levels = (fours | fifths << 4) - (0 if has_minima else 16)
    scales = halves_of(blocks[:, :2], num_rows)
    minima = halves_of(blocks[:, 2:4], num_rows) if has_minima else None
    return QuantizedMatrix(Quantization.INT8, BLOCK, levels.view(num_rows, -1).view(torch.int8), scales, minima)


Q5_0: Final = StoredFormat("Q5_0", BLOCK, 22, Layout(Quantization.INT8, BLOCK, "float16"), read)
Q5_1: Final = StoredFormat("Q5_1", BLOCK, 24, Layout(Quantization.INT8, BLOCK, "float16", has_minima=True), read)
