"""Formats that a matrix can have on a device, a file each: bytes, reading or rounding, and what kernels need of it.

Sizes are known without torch, so that a daemon plans with them.
"""

import enum
from typing import Final

BLOCK: Final = 32
"""Elements of a GGUF block, and the largest unit that quants of less than 8 bits are packed in."""
SUPER_BLOCK: Final = 256
"""Elements that share a scale of scales."""


class Quantization(enum.Enum):
    """Storage of a quant."""

    INT8 = "int8"
    FP8 = "fp8"
    """Float8 e4m3."""
    INT4 = "int4"
    FP4 = "fp4"
    """Code of a float4 e2m1 (OCP Microscaling Formats, 2023)."""
    IQ4 = "iq4"
    """Code of a level of GGUF's IQ4 kinds, which are finer near zero."""

    INT2 = "int2"

    @property
    def bits(self) -> int:
        """Return the bits of a quant."""
        return {Quantization.INT8: 8, Quantization.FP8: 8, Quantization.INT2: 2}.get(self, 4)

    @property
    def per_byte(self) -> int:
        """Return the number of quants in a byte."""
        return 8 // self.bits

    @property
    def table(self) -> "Table | None":
        """Return the table of its codes; None where a quant is a number."""
        return TABLES.get(self)


class Table:
    """Numbers that the 16 codes of a quantisation stand for: whole multiples of ``step``, each in an int8."""

    def __init__(self, step: float, *multiples: int) -> None:
        self.step = step
        self.multiples = multiples
        halves = (multiples[:8], multiples[8:])
        self.words = tuple(int.from_bytes(bytes(n & 0xFF for n in half), "little", signed=True) for half in halves)
        """Multiples of codes 0 to 7 and of codes 8 to 15, as the bytes of an int64, code 0 lowest."""


TABLES: Final = {
    Quantization.FP4: Table(0.5, 0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12),
    Quantization.IQ4: Table(1.0, -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
}
"""Tables of the quantisations that have one. IQ4's is ``kvalues_iq4nl`` of ggml."""
