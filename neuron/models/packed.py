"""Formats of a model for the CPU kernels: the format of every matrix, and the sizes.

Pure decisions on sizes: the daemon's preflight and the worker's load call the same functions. GGUF's 4-bit and 8-bit
kinds keep their codes; floats become bfloat16, and everything float32 where requested.
"""

import dataclasses
from collections.abc import Mapping
from enum import IntEnum
from typing import Final

from neuron.cpu_kernels import native
from neuron.formats.scheme import Scheme
from neuron.layers.attention import Attention
from neuron.layers.cache import Cache, PagedKV
from neuron.layers.mlp import GatedMlp
from neuron.layers.parameters import Constant, Matrix, Vector
from neuron.layers.rope import Rope
from neuron.models.gguf import TensorKind
from neuron.models.model import ModelConfig, StoredKind

LANES: Final = 16
MAX_HEAD_DIM: Final = 1024
INT8: Final = "int8"
"""Dtype of keys and values: each vector is rounded by its largest element."""


class Format(IntEnum):
    """Packed formats of ``formats.h``."""

    W4 = 0
    IQ4 = 1
    FP4 = 2
    W8 = 3
    W16 = 4
    W32 = 5


FLOATS: Final = (TensorKind.F32, TensorKind.F16, TensorKind.BF16, TensorKind.F64)


Kind = tuple[Rope, int]
"""Rotary embedding and window of a layer of attention."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    """Layers that all blocks of a model have in common, as the C executor runs them."""

    attention: Attention
    """Attention of every block, but for the rotary embedding and the window."""
    mlp: GatedMlp
    kinds: tuple[Kind, ...]
    """Kinds of attention: at most two, of which one at most has a window."""


def checked_level(wanted: str) -> str:
    """Return the dispatch level ``wanted``, or the processor's best; raise ``ValueError`` if it has no such level."""
    levels = native.levels()
    if wanted and wanted not in levels:
        raise ValueError(f"cpu_level is {wanted!r}; this processor has {', '.join(levels)}")
    return wanted or levels[0]


def obstacle(config: ModelConfig) -> str | None:
    """Return the reason for which the kernels cannot run a model, ``None`` if they can."""
    for block in config.blocks:
        if tuple(map(type, block)) != (Attention, GatedMlp):
            return f"{config.family} has layers ({_names(block)}) that only the eager path computes"
    attentions, mlps = zip(*config.blocks, strict=True)
    kinds = {kind_of(layer) for layer in attentions}
    alike = {dataclasses.replace(layer, rope=attentions[0].rope, window_tokens=0) for layer in attentions}
    if len(alike) > 1 or len(set(mlps)) > 1 or len(kinds) > 2 or sum(window > 0 for _, window in kinds) > 1:
        return f"{config.family} has blocks that differ in more than a window and its rotary embedding"
    if attentions[0].head_dim > MAX_HEAD_DIM:
        return f"heads of {attentions[0].head_dim} dimensions; at most {MAX_HEAD_DIM} are supported"
    return None


def kind_of(layer: Attention) -> Kind:
    """Return the kind of a layer."""
    return layer.rope, layer.window_tokens


def _names(block: tuple[object, ...]) -> str:
    return ", ".join(type(layer).__name__ for layer in block)


def sizes(config: ModelConfig) -> Sizes:
    """Return the layers of a model without :func:`obstacle`."""
    attention, mlp = config.blocks[0]
    assert isinstance(attention, Attention)
    assert isinstance(mlp, GatedMlp)
    kinds = dict.fromkeys(kind_of(layer) for layer in config.layers if isinstance(layer, Attention))
    return Sizes(attention, mlp, tuple(kinds))


def padded(count: int) -> int:
    """Return ``count`` rounded up to whole registers."""
    return -(-count // LANES) * LANES


def block_kind(kind: StoredKind) -> TensorKind:
    """Return the GGUF kind of the blocks that are packed; bfloat16 where a scheme of safetensors is expanded."""
    return TensorKind[kind.block_kind or "BF16"] if isinstance(kind, Scheme) else kind


def formats(matrix: Matrix, kinds: Mapping[str, StoredKind], dtype: str) -> tuple[Format, ...]:
    """Return the format of each tensor of a matrix; ``kinds`` are how a file stores them, by safetensors name.

    They multiply the same activations, so all are integer or all float; gate and up alternate within one matrix, so
    they have one format.
    """

    def format_of(name: str) -> Format:
        if dtype == "float32":
            return Format.W32
        kind = block_kind(kinds.get(name, TensorKind.BF16))
        if kind in FLOATS:
            return Format.W16
        of_four_bits = (Format.W4, Format.IQ4, Format.FP4)
        return next((format for format in of_four_bits if native.can_pack(kind, format)), Format.W8)

    found = tuple(format_of(tensor.name) for tensor in matrix.tensors)
    if matrix.gated:
        return found if len(set(found)) == 1 else (max(*found, Format.W8),) * len(found)
    return (Format.W16,) * len(found) if len({max(each, Format.W8) for each in found}) > 1 else found


def weights_bytes(config: ModelConfig, dtype: str) -> int:
    """Return the bytes of all packed weights, exactly as the load allocates them."""
    total, constants = 0, set[Constant]()
    for parameters in config.parameters():
        for parameter in parameters.values():
            match parameter:
                case Vector():
                    total += 4 * padded(parameter.num_elements)
                case Matrix():
                    total += sum(4 * padded(bias.num_elements) for bias in parameter.biases)
                    for tensor, each in zip(
                        parameter.tensors, formats(parameter, config.tensor_kinds, dtype), strict=True
                    ):
                        total += native.packed_bytes(each, *tensor.shape)
                case Constant():
                    constants.add(parameter)
    return total + sum(4 * padded(len(constant.values)) for constant in constants)


def page_bytes(cache: Cache, kv_dtype: str) -> int:
    """Return the bytes of a layer's page."""
    assert isinstance(cache, PagedKV), "layers with another cache have no kernels"
    return 2 * cache.num_kv_heads * native.kv_page_bytes(kv_dtype, cache.head_dim)


def arena_bytes(config: ModelConfig, rows: int, sequences: int, sampled: int, threads: int) -> int:
    """Return a bound on the arena of a step of ``rows`` tokens."""
    shared = sizes(config)
    attention, mlp = shared.attention, shared.mlp
    return native.arena_bytes(
        hidden=config.hidden_size,
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        intermediate=mlp.width,
        max_rows=rows,
        max_sequences=sequences,
        max_sampled=sampled,
        threads=threads,
        has_out_norms=mlp.out_norm,
        num_kinds=len(shared.kinds),
    )
