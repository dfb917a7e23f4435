"""AWQ's ``gemm`` layout: 4-bit integers in int32 words along N, in AWQ's order; ``w = (q - z) s`` by group.

``qweight`` ``[K, N / 8]``, ``qzeros`` ``[K / group, N / 8]``, ``scales`` ``[K / group, N]``. Number n of a word, lowest
bits first, is row ``(0, 2, 4, 6, 1, 3, 5, 7)[n]`` of its eight. Layout: AutoAWQ's ``WQLinear_GEMM``.
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
    numbers_of,
    touched,
    within,
)

PLACES: Final = (0, 4, 1, 5, 2, 6, 3, 7)
"""Number of a word that each of its eight rows is."""
TENSORS: Final = {"qweight", "qzeros", "scales"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Awq(Scheme):
    """Scheme of 4-bit integers packed along the rows of a transposed weight."""

    def unpack(self, take: Take, rows: range, columns: range) -> Unpacked:
        """See :class:`~neuron.formats.scheme.Scheme`."""
        words, groups = touched(rows, 8), touched(columns, self.group)
        quants = _rows(take("qweight", slice(columns.start, columns.stop), words), rows)
        scales = take("scales", groups, slice(rows.start, rows.stop)).t()
        return Unpacked(quants, scales, _rows(take("qzeros", groups, words), rows))


def _rows(words: Array, rows: range) -> Array:
    """Return of words ``[w, N / 8]`` the run of rows ``[n, w]`` as uint8."""
    numbers = numbers_of(words, 4).view(len(words), -1, 8)[:, :, PLACES]
    return within(numbers.flatten(1), rows, 8).t().contiguous()


def recognise(pieces: Pieces, rows: int, columns: int, settings: Settings) -> Scheme | None:
    """Return the scheme of a weight ``[rows, columns]``; None if it is another. Raises ``ValueError``."""
    words, scale, zeros = pieces.get("qweight"), pieces.get("scales"), pieces.get("qzeros")
    if words != Piece("I32", (columns, rows // 8)) or scale is None or rows % 8:
        return None
    num_groups = scale.shape[0] if len(scale.shape) == 2 else 0
    if scale.dtype not in SCALE_DTYPES or scale.shape != (num_groups, rows) or not num_groups or columns % num_groups:
        raise ValueError(f"scales {scale} of {[rows, columns]}")
    if zeros != Piece("I32", (num_groups, rows // 8)) or pieces.keys() - TENSORS:
        raise ValueError(f"zero points {zeros} of {num_groups} groups, in {', '.join(sorted(pieces))}"[:200])
    return Awq(
        columns=columns,
        quantization=Quantization.INT4,
        group=columns // num_groups,
        scales=SCALE_DTYPES[scale.dtype],
        has_zeros=True,
    )
