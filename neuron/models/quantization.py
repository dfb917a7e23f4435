"""Choice of the matrices that stay quantised on a device, of their form, and the bytes of all weights.

Pure decisions on sizes: the daemon's preflight and the worker's load call the same functions. Layouts are in
:mod:`neuron.triton_kernels.quantized`; the CPU kernels have their own formats (:mod:`.packed`).

``quant`` of a spec is ``auto`` (matrices that a GGUF file quantises stay so on a GPU), ``none`` (all in the model's
dtype), or ``int8``, ``int4``, ``fp8`` (a file of floats is rounded while it is loaded). Embedding and head are not
rounded: together they are a tenth of an 8B model, and the head's errors are those of the answer.
"""

import math
from collections.abc import Callable
from typing import Final

from neuron.models.config import DTYPE_BYTES, ModelConfig
from neuron.models.errors import UnsupportedQuantizationError
from neuron.models.gguf import BLOCKS
from neuron.models.shard import WHOLE, Shard, local_config

NONE: Final = "none"
STORED: Final = "stored"
"""Result of ``auto`` where the file's own blocks are kept."""
ROUNDED: Final = ("int8", "int4", "fp8")
KNOWN: Final = ("auto", NONE, *ROUNDED)

ROW_BYTES: Final[dict[str, tuple[int, Callable[[int], int]]]] = {
    "Q4_0": (32, lambda k: k // 2 + k // 32 * 2),
    "Q4_1": (32, lambda k: k // 2 + k // 32 * 4),
    "Q8_0": (32, lambda k: k + k // 32 * 2),
    "Q4_K": (256, lambda k: k // 2 + k // 32 * 2 + k // 256 * 4),
    "Q5_K": (256, lambda k: k + k // 32 * 2 + k // 256 * 4),
    "Q6_K": (256, lambda k: k + k // 16 + k // 256 * 2),
    "int8": (32, lambda k: k + 4),
    "fp8": (32, lambda k: k + 4),
    "int4": (32, lambda k: k // 2 + k // int4_group(k) * 4),
}
"""Each form's divisor of the columns, and its bytes of a row of so many columns."""


def int4_group(columns: int) -> int:
    """Return the number of elements that share a scale in rows of ``columns``, a multiple of 32."""
    return 128 if columns % 128 == 0 else 32


def resolve(config: ModelConfig, quant: str, dtype: str, device: str, *, cpu_kernels: bool = True) -> str:
    """Return NONE, STORED or one of ROUNDED for the ``quant`` of a spec.

    Raises :class:`UnsupportedQuantizationError` for an unknown quantisation, or one that this file or device cannot
    have.
    """
    if quant not in KNOWN:
        raise UnsupportedQuantizationError(f"quant is {quant!r}; it can be {', '.join(KNOWN)}", param="quant")
    kept = any(kind.name in ROW_BYTES for kind in config.tensor_kinds.values())
    on_cpu = device.startswith("cpu")
    if quant == "auto":
        return STORED if kept and not on_cpu and dtype != "float32" else NONE
    if quant == NONE:
        return NONE
    if any(BLOCKS[kind][0] > 1 for kind in config.tensor_kinds.values()):
        raise UnsupportedQuantizationError(
            f"quant is {quant!r}, but the file is quantised already; load it with quant = 'auto'", param="quant"
        )
    if on_cpu and cpu_kernels:
        raise UnsupportedQuantizationError(
            f"quant is {quant!r}, which is for GPUs; a CPU runs a GGUF file in the form it is stored in", param="quant"
        )
    return quant


def form_of(config: ModelConfig, name: str, quant: str, columns: slice) -> str | None:
    """Return the form on the device of the ``columns`` of a matrix, by its safetensors name; ``None``: the dtype."""
    if quant == NONE or not name.endswith("weight") or name.endswith("mlp.gate.weight"):
        return None
    if quant == STORED:
        kinds = {config.tensor_kinds.get(other) for other in _alike(name)}
        kind = kinds.pop()
        if kinds or kind is None or kind.name not in ROW_BYTES:
            return None
        form = kind.name
    elif name in ("model.embed_tokens.weight", "lm_head.weight"):
        return None
    else:
        form = quant
    unit = ROW_BYTES[form][0]
    return None if columns.start % unit or columns.stop % unit else form


def _alike(name: str) -> tuple[str, ...]:
    """Return the tensors that must be stored in one form: an expert's gate and up are one matrix."""
    if ".experts." not in name or "down" in name:
        return (name,)
    return name.replace("up_proj", "gate_proj"), name.replace("gate_proj", "up_proj")


def weights_bytes(config: ModelConfig, dtype: str, quant: str, shard: Shard = WHOLE) -> int:
    """Return the bytes of all weights on the device, exactly as the load allocates them."""
    total = 0
    for name, shape in config.tensor_shapes().items():
        if len(shape) == 1:
            total += _vector_elements(config, name, shape[0], shard) * DTYPE_BYTES[dtype]
            continue
        rows, columns = shard.rows(config, name, shape[0]), shard.columns(config, name, shape[1])
        form = form_of(config, name, quant, columns)
        width = columns.stop - columns.start
        row_bytes = width * DTYPE_BYTES[dtype] if form is None else ROW_BYTES[form][1](width)
        total += (rows.stop - rows.start) * row_bytes
    frequencies = config.head_dim // 2 * (2 if config.windowed_layers else 1)
    return total + 4 * frequencies


def _vector_elements(config: ModelConfig, name: str, size: int, shard: Shard) -> int:
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        local = local_config(config, shard)
        return size * (local.num_heads if "q_norm" in name else local.num_kv_heads)
    if name.endswith("o_proj.bias") and shard.rank:
        return 0
    rows = shard.rows(config, name, size)
    num_rows: int = rows.stop - rows.start
    return num_rows


def largest_matrix_elements(config: ModelConfig) -> int:
    """Return the elements of the largest matrix: eager torch makes float32 of a quantised one on each use."""
    return max(int(math.prod(shape)) for shape in config.tensor_shapes().values())
