"""GPTQ's layout: integers of 4 or 8 bits in int32 words along K, transposed; ``w = (q - z) s`` by group or row.

``qweight`` ``[K bits / 32, N]``, lowest bits first; ``scales`` ``[K / group, N]``; ``qzeros``
``[K / group, N bits / 32]``, less than the zero points by one but for ``checkpoint_format: gptq_v2``; ``g_idx`` ``[K]``
has the group of each column. With ``desc_act`` columns are quantised in the order of their importance, so that a
group's are scattered. Layout: AutoGPTQ's ``QuantLinear.pack``.
"""

import dataclasses
from typing import Final

from neuron.formats import Quantization
from neuron.formats.format import Array
from neuron.formats.scheme import (
    SCALE_DTYPES,
    Piece,
    Pieces,
    Scheme,
    Settings,
    Take,
    Unpacked,
    centred,
    groups_of,
    numbers_of,
    order_of,
    touched,
    within,
)

TENSORS: Final = {"qweight", "qzeros", "scales", "g_idx"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Gptq(Scheme):
    """Scheme of integers packed along the columns of a transposed weight."""

    bits: int
    zero_offset: int
    has_indices: bool

    def unpack(self, take: Take, rows: range, columns: range) -> Unpacked:
        """See :class:`~neuron.formats.scheme.Scheme`."""
        per_word, run = 32 // self.bits, slice(rows.start, rows.stop)
        words = take("qweight", touched(columns, per_word), run)
        quants = centred(within(numbers_of(words.t(), self.bits), columns, per_word), self.bits)
        groups = touched(columns, self.group)
        scales = take("scales", groups, run).t()
        words = take("qzeros", groups, touched(rows, per_word))
        stored = within(numbers_of(words, self.bits), rows, per_word).t().short() + self.zero_offset
        zeros = self._zeros(stored)
        if not self.has_indices:
            return Unpacked(quants, scales, zeros)
        indices = take("g_idx")
        if not self.ordered:
            if not indices.equal(groups_of(self.columns, self.group, indices)):
                raise ValueError("g_idx scatters groups, and desc_act is false")
            return Unpacked(quants, scales, zeros)
        order = order_of(indices, self.group)
        return Unpacked(quants[:, order], scales, zeros, order.int())

    def _zeros(self, stored: Array) -> "Array | None":
        """Return zero points, as a matrix has them; None for the middle of the range."""
        import torch

        middle = 1 << self.bits - 1
        if not self.has_zeros:
            if (stored != middle).any():
                raise ValueError("zero points of a symmetric scheme that are not in the middle")
            return None
        if self.bits == 4:
            return stored.to(torch.uint8)
        if (stored > 255).any():
            raise ValueError("a zero point of 256")
        return (stored - middle).to(torch.int8)


def recognise(pieces: Pieces, rows: int, columns: int, settings: Settings) -> Scheme | None:
    """Return the scheme of a weight ``[rows, columns]``; None if it is another. Raises ``ValueError``."""
    words, scale, zeros = pieces.get("qweight"), pieces.get("scales"), pieces.get("qzeros")
    if words is None or scale is None or zeros is None:
        return None
    bits = next((bits for bits in (4, 8) if words == Piece("I32", (columns * bits // 32, rows))), 0)
    if not bits:
        return None
    num_groups = scale.shape[0] if len(scale.shape) == 2 else 0
    if scale.dtype not in SCALE_DTYPES or scale.shape != (num_groups, rows) or not num_groups or columns % num_groups:
        raise ValueError(f"scales {scale} of {[rows, columns]}")
    if zeros != Piece("I32", (num_groups, -(-rows * bits // 32))) or columns * bits % 32:
        raise ValueError(f"zero points {zeros} of {num_groups} groups of {[rows, columns]}")
    order = pieces.get("g_idx")
    if order not in (None, Piece("I32", (columns,))) or pieces.keys() - TENSORS:
        raise ValueError(f"groups of columns {order}, in {', '.join(sorted(pieces))}"[:200])
    return Gptq(
        columns=columns,
        quantization=Quantization(f"int{bits}"),
        group=columns // num_groups,
        scales=SCALE_DTYPES[scale.dtype],
        has_zeros=not settings.symmetric,
        ordered=settings.ordered and order is not None and num_groups > 1,
        bits=bits,
        zero_offset=settings.zero_offset,
        has_indices=order is not None,
    )
