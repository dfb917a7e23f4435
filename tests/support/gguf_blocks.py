"""Blocks of GGUF's kinds: by the library's quantiser, or random for kinds that it only reads."""

import gguf
import numpy as np

Kind = gguf.GGMLQuantizationType
HALVES = {
    **dict.fromkeys((Kind.Q4_0, Kind.Q5_0, Kind.Q8_0, Kind.IQ4_NL, Kind.IQ4_XS, Kind.IQ2_XXS, Kind.IQ2_XS), (0,)),
    **dict.fromkeys((Kind.IQ2_S, Kind.IQ3_XXS, Kind.IQ3_S, Kind.IQ1_S), (0,)),
    **dict.fromkeys((Kind.Q4_1, Kind.Q5_1, Kind.Q4_K, Kind.Q5_K), (0, 2)),
    Kind.Q2_K: (80, 82), Kind.Q3_K: (108,), Kind.Q6_K: (208,), Kind.TQ1_0: (52,), Kind.TQ2_0: (64,),
}  # fmt: skip
"""Offsets of the float16 numbers of a block."""


def random_blocks(kind: Kind, num_blocks: int, seed: int = 0) -> np.ndarray:
    """Return random blocks ``[num_blocks, bytes]`` of finite numbers, few of them larger than 1."""
    random = np.random.default_rng(seed)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (num_blocks, block_bytes), dtype=np.uint8)
    for offset in HALVES.get(kind, ()):
        halves = random.uniform(0.25, 1, (num_blocks, 1)) * random.choice([-1, 1], (num_blocks, 1))
        halves /= 1024 if block > 32 else 64
        blocks[:, offset : offset + 2] = halves.astype(np.float16).view(np.uint8)
    if kind is Kind.MXFP4:
        blocks[:, 0] = random.choice([0, 1, 2, 60, 112, 118, 120, 123], num_blocks)
    if kind is Kind.IQ1_M:  # a float16 in the high nibbles of four words, the lowest first
        half = int(np.float16(1 / 1024).view(np.uint16))
        for word in range(4):
            blocks[:, 49 + 2 * word] = blocks[:, 49 + 2 * word] & 15 | (half >> 4 * word & 15) << 4
    if kind is Kind.NVFP4:
        blocks[:, :4] = random.integers(0, 80, (num_blocks, 4))
    return blocks


def stored_as(values: np.ndarray, kind: Kind) -> np.ndarray:
    """Return ``values`` quantised to a kind, along the last dimension; random blocks of it where the library cannot."""
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        block, _ = gguf.GGML_QUANT_SIZES[kind]
        return random_blocks(kind, values.size // block).reshape(*values.shape[:-1], -1)
