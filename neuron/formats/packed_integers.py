"""compressed-tensors' ``pack-quantized``: integers of 4 or 8 bits in int32 words, ``w = (q - z) s`` by group or row.

``weight_packed`` ``[N, K bits / 32]`` has the numbers along K, lowest bits first, each with ``2^(bits - 1)`` added;
``weight_scale`` is ``[N, K / group]``; ``weight_zero_point``, where there is one, is packed along N:
``[N bits / 32, K / group]`` with the same addition, or plain int8 ``[N, K / group]``; ``weight_g_idx`` ``[K]``, where
there is one, has the group of each column. Oracle: the package ``compressed_tensors``.
"""

import dataclasses
from typing import Final

from neuron.formats import Quantization
from neuron.formats.scheme import (
    SCALE_DTYPES,
    Piece,
    Pieces,
    Scheme,
    Settings,
    Take,
    Unpacked,
    centred,
    numbers_of,
    order_of,
    touched,
    within,
)

TENSORS: Final = {"weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PackedIntegers(Scheme):
    """Scheme of integers packed along the rows."""

    bits: int
    packs_zeros: bool

    def unpack(self, take: Take, rows: range, columns: range) -> Unpacked:
        """See :class:`~neuron.formats.scheme.Scheme`."""
        per_word, run = 32 // self.bits, slice(rows.start, rows.stop)
        words = take("weight_packed", run, touched(columns, per_word))
        quants = centred(within(numbers_of(words, self.bits), columns, per_word), self.bits)
        groups = touched(columns, self.group)
        scales, zeros = take("weight_scale", run, groups), None
        if self.packs_zeros:
            words = take("weight_zero_point", touched(rows, per_word), groups)
            zeros = centred(within(numbers_of(words.t(), self.bits), rows, per_word).t(), self.bits)
        elif self.has_zeros:
            zeros = take("weight_zero_point", run, groups)
            zeros = (zeros + 8).byte() if self.bits == 4 else zeros
        if not self.ordered:
            return Unpacked(quants, scales, zeros)
        order = order_of(take("weight_g_idx"), self.group)
        return Unpacked(quants[:, order], scales, zeros, order.int())


def recognise(pieces: Pieces, rows: int, columns: int, settings: Settings) -> Scheme | None:
    """Return the scheme of a weight ``[rows, columns]``; None if it is another. Raises ``ValueError``."""
    packed, scale = pieces.get("weight_packed"), pieces.get("weight_scale")
    if packed is None or packed.dtype != "I32" or scale is None:
        return None
    bits = next((bits for bits in (4, 8) if packed.shape == (rows, -(-columns * bits // 32))), 0)
    if not bits or len(scale.shape) != 2 or scale.shape[0] != rows or scale.dtype not in SCALE_DTYPES:
        raise ValueError(f"{packed} and scales {scale} are no integers of 4 or 8 bits of {[rows, columns]}")
    num_groups = scale.shape[1]
    if not num_groups or columns % num_groups or pieces.keys() - TENSORS:
        raise ValueError(f"{num_groups} groups of {columns} columns, in {', '.join(sorted(pieces))}"[:200])
    zeros = pieces.get("weight_zero_point")
    packed_zeros = Piece("I32", (-(-rows * bits // 32), num_groups))
    if zeros not in (None, packed_zeros, Piece("I8", (rows, num_groups))):
        raise ValueError(f"zero points {zeros} of {num_groups} groups")
    order = pieces.get("weight_g_idx")
    if order not in (None, Piece("I32", (columns,))):
        raise ValueError(f"groups of columns {order}")
    return PackedIntegers(
        columns=columns,
        quantization=Quantization(f"int{bits}"),
        group=columns // num_groups,
        scales=SCALE_DTYPES[scale.dtype],
        has_zeros=zeros is not None,
        ordered=order is not None,
        bits=bits,
        packs_zeros=zeros == packed_zeros,
    )
