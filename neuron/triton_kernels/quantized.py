"""Quantised weight matrices on the device: what they look like, how they are made, what they mean.

``w[n, k] = quants[n, k] * scales[n, k // group] + minima[n, k // group]``, planar: quants and
scales each in an array of its own so that both are read in aligned runs of 16 bytes (GGUF's 18-byte blocks cannot
be). The
numbers are GGUF's own, only moved.

- ``int8`` per channel: one scale a row. ``fp8``: the same with float8 e4m3 quants.
- ``int8`` in groups of 32: GGUF Q8_0.
- ``int4`` in groups of 32 or 128: two quants a byte. Within each 32 elements byte j holds element j below and element
  j + 16 above, GGUF's order, so that the two halves meet two plain runs of the activations. Q4_0 is ``d (q - 8)``: a
  minimum of ``-8 d``, which needs no array. Q4_1 has minima. Q4_K is Q4_1 with 6-bit scales of scales: its products
  ``d s`` and ``-m s`` are kept in float32, exact.
"""

import dataclasses
import enum
from typing import Any, Final

import numpy as np
import torch

BLOCK: Final = 32
"""Elements of a GGUF block, and the unit that 4-bit quants are packed in."""


class Quantization(enum.Enum):
    """How a quant is stored."""

    INT8 = "int8"
    INT4 = "int4"
    FP8 = "fp8"


@dataclasses.dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """A weight ``[N, K]``."""

    quantization: Quantization
    group: int
    """Elements of a row that share a scale; 0: all of them."""
    quants: torch.Tensor
    """``[N, K]`` int8 or float8, or ``[N, K / 2]`` uint8."""
    scales: torch.Tensor
    """``[N, K / group]`` or ``[N, 1]``, float16 or float32."""
    minima: torch.Tensor | None = None
    """Like ``scales``; None is ``-8 * scales`` for int4 and none for the others."""

    @property
    def shape(self) -> tuple[int, int]:
        """Return N and K."""
        rows, columns = self.quants.shape
        return rows, columns * (2 if self.quantization is Quantization.INT4 else 1)

    @property
    def nbytes(self) -> int:
        """Return what it takes on the device."""
        return sum(t.nbytes for t in (self.quants, self.scales, self.minima) if t is not None)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the matrix ``[N, K]``."""
        rows, columns = self.shape
        group = self.group or columns
        if self.quantization is Quantization.INT4:
            packed = self.quants.view(rows, -1, BLOCK // 2)
            values = torch.cat((packed & 15, packed >> 4), dim=-1).view(rows, columns).float()
        else:
            values = self.quants.float()
        values = values.view(rows, -1, group)
        scales = self.scales.float().unsqueeze(-1)
        values = values * scales
        if self.minima is not None:
            values = values + self.minima.float().unsqueeze(-1)
        elif self.quantization is Quantization.INT4:
            values = values - 8 * scales
        return values.view(rows, columns).to(dtype)


def quantize_int8(weight: torch.Tensor) -> QuantizedMatrix:
    """Round ``weight`` ``[N, K]`` to 8 bits with one scale a row, the largest magnitude being 127."""
    scales = (weight.float().abs().amax(1, keepdim=True) / 127).clamp_(min=1e-12)
    quants = (weight.float() / scales).round_().to(torch.int8)
    return QuantizedMatrix(Quantization.INT8, 0, quants, scales)


def quantize_fp8(weight: torch.Tensor) -> QuantizedMatrix:
    """Round ``weight`` ``[N, K]`` to float8 e4m3 with one scale a row, the largest magnitude being 448."""
    scales = (weight.float().abs().amax(1, keepdim=True) / 448).clamp_(min=1e-12)
    quants = (weight.float() / scales).clamp_(-448, 448).to(torch.float8_e4m3fn)
    return QuantizedMatrix(Quantization.FP8, 0, quants, scales)


def quantize_int4(weight: torch.Tensor, group: int = 128) -> QuantizedMatrix:
    """Round ``weight`` ``[N, K]`` to 4 bits between the least and the greatest of each ``group`` elements."""
    rows, columns = weight.shape
    if group % BLOCK or columns % group:
        raise ValueError(f"groups of {group} do not divide {columns} columns, or are no multiple of {BLOCK}")
    grouped = weight.float().view(rows, -1, group)
    least, greatest = grouped.amin(-1), grouped.amax(-1)
    scales = ((greatest - least) / 15).clamp_(min=1e-7).to(torch.float16)
    minima = least.to(torch.float16)
    levels = ((grouped - minima.float().unsqueeze(-1)) / scales.float().unsqueeze(-1)).round_().clamp_(0, 15)
    halves = levels.to(torch.uint8).view(rows, -1, 2, BLOCK // 2)
    packed = (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(rows, -1)
    return QuantizedMatrix(Quantization.INT4, group, packed, scales, minima)


def from_gguf(kind: str, blocks: np.ndarray[Any, np.dtype[np.uint8]], num_rows: int) -> QuantizedMatrix:
    """Return the matrix in GGUF ``blocks`` ``[num_blocks, block_bytes]`` of Q4_0, Q4_1, Q8_0 or Q4_K."""
    match kind:
        case "Q8_0":
            quants = _tensor(blocks[:, 2:], num_rows).view(torch.int8)
            return QuantizedMatrix(Quantization.INT8, BLOCK, quants, _halves(blocks[:, :2], num_rows))
        case "Q4_0":
            quants = _tensor(blocks[:, 2:], num_rows)
            return QuantizedMatrix(Quantization.INT4, BLOCK, quants, _halves(blocks[:, :2], num_rows))
        case "Q4_1":
            scales, minima = _halves(blocks[:, :2], num_rows), _halves(blocks[:, 2:4], num_rows)
            return QuantizedMatrix(Quantization.INT4, BLOCK, _tensor(blocks[:, 4:], num_rows), scales, minima)
        case "Q4_K":
            return _from_q4_k(blocks, num_rows)
        case _:
            raise ValueError(f"{kind} blocks have no form on the device; Q4_0, Q4_1, Q4_K and Q8_0 have")


def _from_q4_k(blocks: np.ndarray[Any, np.dtype[np.uint8]], num_rows: int) -> QuantizedMatrix:
    """256 elements: d and dmin, eight 6-bit scales and minima in 12 bytes, then four runs of 64 elements.

    Of a run's 32 bytes the low halves are elements 0 to 31 and the high halves 32 to 63: two sub-blocks.
    """
    d, dmin = (np.ascontiguousarray(blocks[:, i : i + 2]).view(np.float16).astype(np.float32) for i in (0, 2))
    low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = np.concatenate((low & 63, (high & 15) | (low >> 6) << 4), axis=1)
    minimum = np.concatenate((middle & 63, (high >> 4) | (middle >> 6) << 4), axis=1)
    runs = blocks[:, 16:].reshape(-1, 4, 1, 32)
    levels = np.concatenate((runs & 15, runs >> 4), axis=2).reshape(-1, 8, 2, 16)
    packed = levels[:, :, 0] | levels[:, :, 1] << 4
    scales = torch.from_numpy(d * scale).view(num_rows, -1)
    minima = torch.from_numpy(-(dmin * minimum)).view(num_rows, -1)
    return QuantizedMatrix(Quantization.INT4, BLOCK, _tensor(packed, num_rows), scales, minima)


def _tensor(values: np.ndarray[Any, np.dtype[np.uint8]], num_rows: int) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values).reshape(num_rows, -1))


def _halves(values: np.ndarray[Any, np.dtype[np.uint8]], num_rows: int) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values).view(np.float16).reshape(num_rows, -1))
