"""Schemes of safetensors. A new one is a file beside this one and a line here."""

from collections.abc import Callable
from typing import Final

from neuron.formats import Quantization, awq, float4, gptq, packed_integers, scaled
from neuron.formats.scheme import Pieces, Scheme, Settings

EXAMPLES: Final[dict[str, Callable[[int], Scheme]]] = {
    "fp8-blocks": lambda columns: scaled.Scaled(
        columns=columns, quantization=Quantization.FP8, group=128, scales="float32", suffix="weight_scale_inv",
        group_rows=128,
    ),
    "awq": lambda columns: awq.Awq(
        columns=columns, quantization=Quantization.INT4, group=128, scales="float16", has_zeros=True
    ),
}  # fmt: skip
"""Schemes of weights of so many columns whose layouts no other format has, for the kernels' cases and builds."""
RECOGNISERS: Final = (scaled.recognise, float4.recognise, packed_integers.recognise, gptq.recognise, awq.recognise)


def find_scheme(pieces: Pieces, rows: int, columns: int, settings: Settings) -> Scheme | None:
    """Return the scheme of a weight ``[rows, columns]``; None if no scheme has such tensors.

    Raises ``ValueError`` if the tensors of a scheme do not fit.
    """
    return next((found for each in RECOGNISERS if (found := each(pieces, rows, columns, settings))), None)
