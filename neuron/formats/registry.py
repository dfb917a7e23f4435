"""Formats of matrices by name. A new one is a file beside this one and a line here."""

from typing import Final

from neuron.formats import fp4, iq4, q2_k, q3_k, q4_0, q4_1, q4_k, q5_0, q6_k, q8_0, rounded
from neuron.formats.format import Format, RoundedFormat, StoredFormat

STORED_FORMATS: Final[dict[str, StoredFormat]] = {
    format.name: format
    for format in (
        *(q4_0.FORMAT, q4_1.FORMAT, q5_0.Q5_0, q5_0.Q5_1, q8_0.FORMAT),
        *(q2_k.FORMAT, q3_k.FORMAT, q4_k.Q4_K, q4_k.Q5_K, q6_k.FORMAT),
        *(iq4.IQ4_NL, iq4.IQ4_XS, fp4.MXFP4, fp4.NVFP4),
    )
}
"""Formats of files' blocks, by GGUF's name of the kind."""
ROUNDED_FORMATS: Final[dict[str, RoundedFormat]] = {
    format.name: format for format in (rounded.INT8, rounded.INT4, rounded.FP8)
}
"""Formats to which floats can be rounded, by a spec's ``quant``."""
FORMATS: Final[dict[str, Format]] = {**STORED_FORMATS, **ROUNDED_FORMATS}
