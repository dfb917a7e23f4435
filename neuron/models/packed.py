"""Formats of a model for the CPU kernels: the format of every matrix, and the sizes.

Pure decisions on sizes: the daemon's preflight and the worker's load call the same functions. GGUF's 4-bit and 8-bit
kinds keep their codes; floats become bfloat16, and everything float32 where requested.
"""

from enum import IntEnum
from typing import Final

from neuron.cpu_kernels import native
from neuron.models.config import ModelConfig
from neuron.models.gguf import TensorKind

LANES: Final = 16
MAX_HEAD_DIM: Final = 1024
INT8: Final = "int8"
"""Dtype of keys and values: each vector is rounded by its largest element."""


class Format(IntEnum):
    """Packed formats of ``formats.h``."""

    W4 = 0
    W8 = 1
    W16 = 2
    W32 = 3


FLOATS: Final = (TensorKind.F32, TensorKind.F16, TensorKind.BF16, TensorKind.F64)
LAYER_MATRICES: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def checked_level(wanted: str) -> str:
    """Return the dispatch level ``wanted``, or the processor's best; raise ``ValueError`` if it has no such level."""
    levels = native.levels()
    if wanted and wanted not in levels:
        raise ValueError(f"cpu_level is {wanted!r}; this processor has {', '.join(levels)}")
    return wanted or levels[0]


def obstacle(config: ModelConfig) -> str | None:
    """Return the reason for which the kernels cannot run a model, ``None`` if they can."""
    if config.num_experts:
        return f"{config.architecture.name} has experts, which only the eager path computes"
    if config.head_dim > MAX_HEAD_DIM:
        return f"heads of {config.head_dim} dimensions; at most {MAX_HEAD_DIM} are supported"
    return None


def padded(count: int) -> int:
    """Return ``count`` rounded up to whole registers."""
    return -(-count // LANES) * LANES


def layer_formats(config: ModelConfig, number: int, dtype: str) -> dict[str, Format]:
    """Return the format of each matrix of a layer, by projection.

    Query, key and value multiply the same activations, so all are integer or all float; gate and up alternate within
    one matrix, so they have one format.
    """
    prefix = f"model.layers.{number}."
    found = {}
    for name in LAYER_MATRICES:
        block = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
        found[name] = format_of(config, f"{prefix}{block}.{name}.weight", dtype)
    attention = ("q_proj", "k_proj", "v_proj")
    if len({max(found[name], Format.W8) for name in attention}) > 1:
        found |= dict.fromkeys(attention, Format.W16)
    if found["gate_proj"] != found["up_proj"]:
        found["gate_proj"] = found["up_proj"] = max(found["gate_proj"], found["up_proj"])
    return found


def format_of(config: ModelConfig, name: str, dtype: str) -> Format:
    """Return the format of one matrix, by its safetensors name."""
    if dtype == "float32":
        return Format.W32
    kind = config.tensor_kinds.get(name, TensorKind.BF16)
    if kind in FLOATS:
        return Format.W16
    return Format.W4 if native.can_pack(kind, Format.W4) else Format.W8


def weights_bytes(config: ModelConfig, dtype: str) -> int:
    """Return the bytes of all packed weights, exactly as the load allocates them."""
    shapes = config.tensor_shapes()
    total = native.packed_bytes(
        format_of(config, "model.embed_tokens.weight", dtype), config.vocab_size, config.hidden_size
    )
    if not config.tie_embeddings:
        total += native.packed_bytes(format_of(config, "lm_head.weight", dtype), config.vocab_size, config.hidden_size)
    for number in range(config.num_layers):
        formats = layer_formats(config, number, dtype)
        for name, format in formats.items():
            block = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            rows, columns = shapes[f"model.layers.{number}.{block}.{name}.weight"]
            total += native.packed_bytes(format, rows, columns)
    return total + 4 * vector_elements(config)


def vector_elements(config: ModelConfig) -> int:
    """Return the float32 elements of norms, biases and frequencies, each padded to whole registers."""
    hidden, queries, keys = (
        config.hidden_size,
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
    )
    layer = (4 if config.architecture.sandwich_norms else 2) * padded(hidden)
    if config.attention_bias:
        layer += padded(queries) + 2 * padded(keys)
        if config.architecture.output_bias_follows_qkv:
            layer += padded(hidden)
    if config.architecture.qk_norm:
        layer += padded(queries + keys)
    frequencies = (2 if config.windowed_layers else 1) * padded(config.head_dim // 2)
    return config.num_layers * layer + padded(hidden) + frequencies


def page_bytes(config: ModelConfig, kv_dtype: str, page_tokens: int) -> int:
    """Return the bytes of a page over all layers (``kv_page_bytes`` of ``kernels.h``): head vectors are padded to whole
    registers, and have a scale each in int8."""
    element = {"bfloat16": 2, "float32": 4, "int8": 1}[kv_dtype]
    vector = padded(config.head_dim) * element + (4 if kv_dtype == INT8 else 0)
    return 2 * config.num_layers * config.num_kv_heads * page_tokens * vector


def arena_bytes(config: ModelConfig, rows: int, sequences: int, sampled: int, threads: int) -> int:
    """Return a bound on the arena of a step of ``rows`` tokens (``lay_out`` of ``step.c``)."""
    hidden, heads, dim = padded(config.hidden_size), config.num_heads, config.head_dim
    queries, keys = padded(heads * dim), padded(config.num_kv_heads * dim)
    gated = padded(config.intermediate_size)
    activation = 4 * max(hidden, queries, gated) + 64
    row = 4 * (2 * hidden + 2 * queries + 2 * keys + gated) + activation
    # Whether there is a window or not: angles, and one task a row and key-value head at most.
    row += 2 * (4 * dim + 4 + 64 * heads)
    sequence = 2 * 64 * heads * 16
    # 16 partial results of each head of a row whose context is cut.
    per_sampled = activation + 32 * threads
    parted = (sampled + LANES) * heads * 16 * 4 * (padded(dim) + 2)
    thread = 2 * activation + 4 * max(hidden, queries) + 8 * hidden + 4 * 16 * (3 * padded(dim) + 128)
    return parted + rows * row + sequences * sequence + sampled * per_sampled + threads * thread + 64 * 64
