"""GGUF MXFP4 and NVFP4: float4 numbers (e2m1) with a scale of 8 bits for each group.

MXFP4: blocks of 32 elements behind a power of two (float8 e8m0). NVFP4: blocks of 64, of which each 16 have a float8
e4m3; four scales, then four runs of 8 bytes, low nibbles first. A float32 beside the tensor multiplies all of it.
"""

from typing import Final

from neuron.formats import BLOCK, Quantization
from neuron.formats.format import Layout, Parts, StoredFormat

MXFP4: Final = StoredFormat(
    "MXFP4", Layout(Quantization.FP4, BLOCK, "float8_e8m0fnu"), lambda blocks: Parts(blocks[:, 1:], blocks[:, :1])
)
NVFP4: Final = StoredFormat(
    "NVFP4",
    Layout(Quantization.FP4, BLOCK // 2, "float8_e4m3fn", supers="float32"),
    lambda blocks: Parts(blocks[:, 4:], blocks[:, :4]),
)
"""NVFP4; a row's factor is 1 here, and a load multiplies by that beside the tensor."""
