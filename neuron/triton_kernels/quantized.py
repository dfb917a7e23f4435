"""Quantised weight matrices on the device: layout, quantisation and dequantisation.

``w[n, k] = quants[n, k] * scales[n, k // group] + minima[n, k // group]``, planar: quants and scales each in an array
of its own so that both are read in aligned runs of 16 bytes (GGUF's 18-byte blocks cannot be). The numbers are GGUF's
own, in another layout.

- ``int8`` per channel: one scale a row. ``fp8``: the same with float8 e4m3 quants.
- ``int8`` in groups of 32: GGUF Q8_0.
- ``int4`` in groups of 32 or 128: two quants a byte. Within each 32 elements byte j holds element j below and element
  j + 16 above, GGUF's order, so that the two halves meet two plain runs of the activations. Q4_0 is ``d (q - 8)``: a
  minimum of ``-8 d``, which needs no array. Q4_1 has minima.
- GGUF's K kinds have scales of scales: 256 elements share a float16, which multiplies the 6 or 8 bits of each group's
  own. Both are kept as they are, since their product takes 17 bits. Q4_K is ``int4`` in groups of 32 with minima, Q5_K
  and Q6_K are ``int8`` in groups of 32 with minima and of 16 without: a byte for 5 or 6 bits, because a thread would
  have to gather the fifth and sixth from planes of their own.
"""

import dataclasses
import enum
from collections.abc import Callable
from typing import Final

import torch
from torch.nn import functional

BLOCK: Final = 32
"""Elements of a GGUF block, and the unit that 4-bit quants are packed in."""
SUPER_BLOCK: Final = 256
"""Elements that share a scale of scales."""


class Quantization(enum.Enum):
    """Storage of a quant."""

    INT8 = "int8"
    INT4 = "int4"
    FP8 = "fp8"


@dataclasses.dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """Weight ``[N, K]``."""

    quantization: Quantization
    group: int
    """Elements of a row that share a scale; 0: all of them."""
    quants: torch.Tensor
    """``[N, K]`` int8 or float8, or ``[N, K / 2]`` uint8."""
    scales: torch.Tensor
    """``[N, K / group]`` or ``[N, 1]``: float16 or float32, or int8 with ``super_scales``."""
    minima: torch.Tensor | None = None
    """Minima, laid out like ``scales``; None is ``-8 * scales`` for int4, else no minima."""
    super_scales: torch.Tensor | None = None
    """``[N, K / 256]`` float16, which multiplies ``scales``."""
    super_minima: torch.Tensor | None = None
    """Scales of ``minima``, laid out like ``super_scales``."""

    @property
    def shape(self) -> tuple[int, int]:
        """Return N and K."""
        rows, columns = self.quants.shape
        return rows, columns * (2 if self.quantization is Quantization.INT4 else 1)

    @property
    def nbytes(self) -> int:
        """Return its size on the device in bytes."""
        return sum(tensor.nbytes for tensor in self.arrays())

    def arrays(self) -> tuple[torch.Tensor, ...]:
        """Return its arrays: each has a row for each row of the matrix."""
        fields = (self.quants, self.scales, self.minima, self.super_scales, self.super_minima)
        return tuple(tensor for tensor in fields if tensor is not None)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "QuantizedMatrix":
        """Return the matrix with ``function`` applied to each of its arrays: a move, or a choice of rows."""
        return dataclasses.replace(
            self,
            quants=function(self.quants),
            scales=function(self.scales),
            minima=None if self.minima is None else function(self.minima),
            super_scales=None if self.super_scales is None else function(self.super_scales),
            super_minima=None if self.super_minima is None else function(self.super_minima),
        )

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
        scales = _scaled(self.scales, self.super_scales).unsqueeze(-1)
        values = values * scales
        if self.minima is not None:
            values = values + _scaled(self.minima, self.super_minima).unsqueeze(-1)
        elif self.quantization is Quantization.INT4:
            values = values - 8 * scales
        return values.view(rows, columns).to(dtype)


def _scaled(scales: torch.Tensor, supers: torch.Tensor | None) -> torch.Tensor:
    wide = scales.float()
    if supers is None:
        return wide
    return wide.mul_(supers.float().repeat_interleave(scales.shape[1] // supers.shape[1], 1))


@dataclasses.dataclass(frozen=True, slots=True)
class StackedMatrix:
    """Weight ``[N, K]`` whose rows lie in parts of different forms: a file may quantise values finer than queries."""

    parts: "tuple[torch.Tensor | QuantizedMatrix, ...]"

    @property
    def shape(self) -> tuple[int, int]:
        """Return N and K."""
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    @property
    def nbytes(self) -> int:
        """Return its size on the device in bytes."""
        return sum(part.nbytes for part in self.parts)


Matrix = torch.Tensor | QuantizedMatrix | StackedMatrix


def embedding_rows(token_ids: torch.Tensor, table: torch.Tensor | QuantizedMatrix, dtype: torch.dtype) -> torch.Tensor:
    """Return the rows ``token_ids`` ``[T]`` of ``table`` ``[V, hidden]`` in ``dtype``."""
    if isinstance(table, torch.Tensor):
        return functional.embedding(token_ids, table)
    return table.map(lambda array: array.index_select(0, token_ids)).dequantize(dtype)


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


def from_gguf(kind: str, blocks: torch.Tensor, num_rows: int) -> QuantizedMatrix:
    """Return the matrix in GGUF ``blocks`` ``[num_blocks, block_bytes]`` of Q4_0, Q4_1, Q8_0, Q4_K, Q5_K or Q6_K.

    It is made on the blocks' device: a host takes ten seconds and more for an 8B model.
    """
    match kind:
        case "Q8_0":
            quants = _rows(blocks[:, 2:], num_rows).view(torch.int8)
            return QuantizedMatrix(Quantization.INT8, BLOCK, quants, _halves(blocks[:, :2], num_rows))
        case "Q4_0":
            quants = _rows(blocks[:, 2:], num_rows)
            return QuantizedMatrix(Quantization.INT4, BLOCK, quants, _halves(blocks[:, :2], num_rows))
        case "Q4_1":
            scales, minima = _halves(blocks[:, :2], num_rows), _halves(blocks[:, 2:4], num_rows)
            quants = _rows(blocks[:, 4:], num_rows)
            return QuantizedMatrix(Quantization.INT4, BLOCK, quants, scales, minima)
        case "Q4_K" | "Q5_K":
            return _from_q4_or_q5_k(blocks, num_rows)
        case "Q6_K":
            return _from_q6_k(blocks, num_rows)
        case _:
            raise ValueError(f"{kind} blocks have no form on the device; Q4_0, Q4_1, Q8_0, Q4_K, Q5_K and Q6_K have")


def _from_q4_or_q5_k(blocks: torch.Tensor, num_rows: int) -> QuantizedMatrix:
    """Unpack Q4_K or Q5_K.

    256 elements: d and dmin, eight 6-bit scales and minima in 12 bytes, for Q5_K 32 bytes of fifth bits, four runs.

    Of a run's 32 bytes the low halves are elements 0 to 31 and the high halves 32 to 63: two sub-blocks of 64 elements.
    Bit i of the j-th byte of fifth bits is that of element j of sub-block i.
    """
    low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = torch.cat((low & 63, (high & 15) | (low >> 6) << 4), 1)
    minimum = torch.cat((middle & 63, (high >> 4) | (middle >> 6) << 4), 1)
    runs = blocks[:, -128:].reshape(-1, 4, 1, 32)
    levels = torch.cat((runs & 15, runs >> 4), 2).view(-1, 8, 32)
    if fifth := blocks.shape[1] > 144:
        bits = torch.arange(8, dtype=torch.uint8, device=blocks.device).view(8, 1)
        levels |= (blocks[:, None, 16:48] >> bits & 1) << 4
    else:
        halves = levels.view(-1, 8, 2, 16)
        levels = halves[:, :, 0] | halves[:, :, 1] << 4
    quants = levels.view(num_rows, -1)
    return QuantizedMatrix(
        Quantization.INT8 if fifth else Quantization.INT4,
        BLOCK,
        quants.view(torch.int8) if fifth else quants,
        scale.view(num_rows, -1).view(torch.int8),
        minimum.view(num_rows, -1).view(torch.int8),
        _halves(blocks[:, :2], num_rows),
        -_halves(blocks[:, 2:4], num_rows),
    )


def _from_q6_k(blocks: torch.Tensor, num_rows: int) -> QuantizedMatrix:
    """Unpack Q6_K. Per 256 elements, in two halves: 64 bytes of low fours each, 32 bytes of high twos each; 16 int8
    scales, and d.

    Of a half's bytes of low fours, the low nibbles are its elements 0 to 63 and the high ones 64 to 127; byte j of high
    twos has those of elements j, j + 32, j + 64 and j + 96. A quant is 32 less than its six bits.
    """
    low = blocks[:, :128].reshape(-1, 2, 1, 64)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    fours = torch.cat((low & 15, low >> 4), 2).view(-1, 2, 4, 32)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device).view(4, 1)
    quants = ((fours | (high >> shifts & 3) << 4) - 32).view(num_rows, -1).view(torch.int8)
    scales = _rows(blocks[:, 192:208], num_rows).view(torch.int8)
    return QuantizedMatrix(
        Quantization.INT8, BLOCK // 2, quants, scales, super_scales=_halves(blocks[:, 208:], num_rows)
    )


def _rows(values: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Return the bytes of a matrix's rows contiguous, as kernels read them, also where a row is one block."""
    return values.reshape(num_rows, -1).contiguous()


def _halves(values: torch.Tensor, num_rows: int) -> torch.Tensor:
    return values.contiguous().view(torch.float16).view(num_rows, -1)
