"""Formats that a load rounds floats to: int8 and float8 e4m3 with a scale for each row, int4 in groups with minima."""

from typing import TYPE_CHECKING, Final

from neuron.formats import BLOCK, Quantization
from neuron.formats.format import Array, Layout, RoundedFormat, packed

if TYPE_CHECKING:
    from neuron.formats.matrix import QuantizedMatrix


def quantize_int8(weight: Array) -> "QuantizedMatrix":
    """Round ``weight`` ``[N, K]`` to 8 bits with one scale a row, the largest magnitude being 127."""
    import torch

    from neuron.formats.matrix import QuantizedMatrix

    scales = (weight.float().abs().amax(1, keepdim=True) / 127).clamp_(min=1e-12)
    return QuantizedMatrix(Quantization.INT8, 0, (weight.float() / scales).round_().to(torch.int8), scales)


def quantize_fp8(weight: Array) -> "QuantizedMatrix":
    """Round ``weight`` ``[N, K]`` to float8 e4m3 with one scale a row, the largest magnitude being 448."""
    import torch

    from neuron.formats.matrix import QuantizedMatrix

    scales = (weight.float().abs().amax(1, keepdim=True) / 448).clamp_(min=1e-12)
    quants = (weight.float() / scales).clamp_(-448, 448).to(torch.float8_e4m3fn)
    return QuantizedMatrix(Quantization.FP8, 0, quants, scales)


def int4_group(columns: int) -> int:
    """Return the number of elements that share a scale in rows of ``columns``, a multiple of 32."""
    return 128 if columns % 128 == 0 else BLOCK


def quantize_int4(weight: Array, group: int = 0) -> "QuantizedMatrix":
    """Round ``weight`` ``[N, K]`` to 4 bits between the least and the greatest of each ``group`` elements."""
    import torch

    from neuron.formats.matrix import QuantizedMatrix

    rows, columns = weight.shape
    group = group or int4_group(columns)
    if group % BLOCK or columns % group:
        raise ValueError(f"groups of {group} do not divide {columns} columns, or are no multiple of {BLOCK}")
    grouped = weight.float().view(rows, -1, group)
    least, greatest = grouped.amin(-1), grouped.amax(-1)
    scales = ((greatest - least) / 15).clamp_(min=1e-7).to(torch.float16)
    minima = least.to(torch.float16)
    levels = ((grouped - minima.float().unsqueeze(-1)) / scales.float().unsqueeze(-1)).round_().clamp_(0, 15)
    quants = packed(levels.to(torch.uint8).view(rows, columns), BLOCK, Quantization.INT4)
    return QuantizedMatrix(Quantization.INT4, group, quants, scales, minima)


_LAYOUTS: Final = {group: Layout(Quantization.INT4, group, "float16", has_minima=True) for group in (BLOCK, 128)}
_INT8: Final = Layout(Quantization.INT8, 0, "float32")
_FP8: Final = Layout(Quantization.FP8, 0, "float32")
INT8: Final = RoundedFormat("int8", lambda _: _INT8, quantize_int8)
FP8: Final = RoundedFormat("fp8", lambda _: _FP8, quantize_fp8)
INT4: Final = RoundedFormat("int4", lambda columns: _LAYOUTS[int4_group(columns)], quantize_int4)
