"""Weight matrices on the device: quantised ones, and matrices of several parts.

``w[n, k] = quants[n, k] * scales[n, k // group] + minima[n, k // group]``, planar: quants and scales each in an array
of its own so that both are read in aligned runs of 16 bytes (GGUF's 18-byte blocks cannot be). Scales of scales: 256
elements, or a row, share a number that multiplies each group's own; both are kept, since their product takes 17 bits.
Quants of 4 bits, integers or codes of a table, are two a byte: within each unit of 32 elements, or of a group where
that is smaller, byte j holds element j below and element j + unit / 2 above, GGUF's order, so that the two halves meet
two plain runs of the activations. Quants of 2 bits are four a byte alike. The numbers are those of the format
(:mod:`neuron.formats`), in another layout.
"""

import dataclasses
from collections.abc import Callable
from typing import Final

import torch
from torch.nn import functional

from neuron.formats import BLOCK, Quantization

QUANT_DTYPES: Final = {Quantization.INT8: torch.int8, Quantization.FP8: torch.float8_e4m3fn}
"""Dtypes of the quants of a byte each; others are packed in uint8."""


@dataclasses.dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """Weight ``[N, K]``."""

    quantization: Quantization
    group: int
    """Elements of a row that share a scale; 0: all of them."""
    quants: torch.Tensor
    """``[N, K]`` int8 or float8; or uint8, ``[N, K / 2]`` of 4 bits, ``[N, K / 4]`` of 2."""
    scales: torch.Tensor
    """``[N, K / group]`` or ``[N, 1]``: float16, float32, float8 e8m0 or e4m3; or int8, with ``super_scales``."""
    minima: torch.Tensor | None = None
    """Minima, laid out like ``scales``; None is ``-8 * scales`` for int4, else no minima."""
    super_scales: torch.Tensor | None = None
    """``[N, K / 256]`` float16 or ``[N, 1]`` float32, which multiplies ``scales``."""
    super_minima: torch.Tensor | None = None
    """Scales of ``minima``, laid out like ``super_scales``."""
    zeros: torch.Tensor | None = None
    """Zero points, laid out like ``scales``, in the dtype of ``quants``: each is subtracted before the scale."""
    order: torch.Tensor | None = None
    """Column ``[K]`` int32 of the weight that each column here is; None: the same."""

    @property
    def shape(self) -> tuple[int, int]:
        """Return N and K."""
        rows, columns = self.quants.shape
        return rows, columns * self.quantization.per_byte

    @property
    def unit(self) -> int:
        """Return the number of elements that quants are packed in: at most a group."""
        return min(self.group or BLOCK, BLOCK)

    @property
    def nbytes(self) -> int:
        """Return its size on the device in bytes."""
        return sum(tensor.nbytes for tensor in self.arrays()) + (0 if self.order is None else self.order.nbytes)

    def arrays(self) -> tuple[torch.Tensor, ...]:
        """Return its arrays: each has a row for each row of the matrix."""
        fields = (self.quants, self.scales, self.minima, self.super_scales, self.super_minima, self.zeros)
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
            zeros=None if self.zeros is None else function(self.zeros),
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the matrix ``[N, K]``."""
        rows, columns = self.shape
        values = self._numbers().view(rows, -1, self.group or columns)
        scales = _scaled(self.scales, self.super_scales).unsqueeze(-1)
        if self.zeros is not None:
            values = values - self.zeros.float().unsqueeze(-1)
        values = values * scales
        if self.minima is not None:
            values = values + _scaled(self.minima, self.super_minima).unsqueeze(-1)
        elif self.quantization is Quantization.INT4 and self.zeros is None:
            values = values - 8 * scales
        values = values.view(rows, columns).to(dtype)
        if self.order is None:
            return values
        restored = torch.empty_like(values)
        restored[:, self.order.long()] = values
        return restored

    def _numbers(self) -> torch.Tensor:
        """Return its quants as float32, unscaled."""
        kind = self.quantization
        if kind in QUANT_DTYPES:
            return self.quants.float()
        packed = self.quants.view(len(self.quants), -1, self.unit // kind.per_byte)
        codes = torch.cat([packed >> shift & (1 << kind.bits) - 1 for shift in range(0, 8, kind.bits)], dim=-1)
        if kind.table is None:
            return codes.float()
        multiples = torch.tensor(kind.table.multiples, dtype=torch.float32, device=codes.device)
        return multiples[codes.int()] * kind.table.step


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
    return table.map(lambda array: chosen_rows(array, token_ids)).dequantize(dtype)


def chosen_rows(array: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return rows of an array, whose dtype may be one that torch only stores."""
    if array.itemsize > 1:
        return array.index_select(0, rows)
    return array.view(torch.uint8).index_select(0, rows).view(array.dtype)
