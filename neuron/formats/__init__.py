"""Formats that a matrix can have on a device, a file each: bytes, reading or rounding, and what kernels need of it.

Sizes are known without torch, so that a daemon plans with them.
"""

from typing import Final

BLOCK: Final = 32
"""Elements of a GGUF block, and the unit that 4-bit quants are packed in."""
SUPER_BLOCK: Final = 256
"""Elements that share a scale of scales."""
