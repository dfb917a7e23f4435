"""Float4 e2m1 with a scale for a group: NVFP4 in groups of 16, MXFP4 in groups of 32.

Two numbers a byte along K, the lower four bits first. NVFP4: ``weight_packed`` of compressed-tensors or ``weight`` of
ModelOpt, ``[N, K / 2]``; ``weight_scale`` float8 e4m3 ``[N, K / 16]``; and one scale of the tensor, by which the others
are divided (``weight_global_scale``) or multiplied (``weight_scale_2``). MXFP4 of compressed-tensors:
``weight_packed``; ``weight_scale`` float8 e8m0, exponents of two, ``[N, K / 32]``.
"""

import dataclasses
from typing import Final

from neuron.formats import Quantization
from neuron.formats.scheme import Piece, Pieces, Scheme, Settings, Take, Unpacked, nibbles_of, touched, within

DIVISOR: Final = "weight_global_scale"
FACTOR: Final = "weight_scale_2"
ONE: Final = (Piece("F32", ()), Piece("F32", (1,)))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Float4(Scheme):
    """Scheme of float4 numbers."""

    suffix: str
    """End of the name of the numbers."""
    whole: str
    """End of the name of the tensor's scale; "": it has none."""

    @property
    def name(self) -> str:
        """See :class:`~neuron.formats.scheme.Scheme`."""
        return "nvfp4" if self.whole else "mxfp4"

    def unpack(self, take: Take, rows: range, columns: range) -> Unpacked:
        """See :class:`~neuron.formats.scheme.Scheme`."""
        import torch

        run = slice(rows.start, rows.stop)
        quants = within(nibbles_of(take(self.suffix, run, touched(columns, 2))), columns, 2)
        scales = take("weight_scale", run, touched(columns, self.group))
        if not self.whole:
            return Unpacked(quants, scales.view(torch.float8_e8m0fnu))
        factor = take(self.whole).reshape(1, 1)
        factor = factor.reciprocal() if self.whole == DIVISOR else factor
        return Unpacked(quants, scales, supers=factor.expand(len(rows), 1))


def recognise(pieces: Pieces, rows: int, columns: int, settings: Settings) -> Scheme | None:
    """Return the scheme of a weight ``[rows, columns]``; None if it is another. Raises ``ValueError``."""
    suffix = "weight_packed" if "weight_packed" in pieces else "weight"
    numbers, scale = pieces.get(suffix), pieces.get("weight_scale")
    if numbers is None or numbers.dtype != "U8" or scale is None:
        return None
    whole = next((end for end in (DIVISOR, FACTOR) if end in pieces), "")
    group, dtypes = (16, ("F8_E4M3",)) if whole else (32, ("U8", "F8_E8M0"))
    if numbers.shape != (rows, columns // 2) or columns % group:
        raise ValueError(f"float4 numbers {numbers} are not {[rows, columns]} in groups of {group}")
    if scale.dtype not in dtypes or scale.shape != (rows, columns // group):
        raise ValueError(f"scales {scale} of {[rows, columns]} in groups of {group}")
    if (whole and pieces[whole] not in ONE) or pieces.keys() - {suffix, "weight_scale", whole}:
        raise ValueError(f"unknown tensors, or no one scale, in {', '.join(sorted(pieces))}"[:200])
    return Float4(
        columns=columns,
        quantization=Quantization.FP4,
        group=group,
        scales="float8_e4m3fn" if whole else "float8_e8m0fnu",
        supers="float32" if whole else "",
        suffix=suffix,
        whole=whole,
    )
