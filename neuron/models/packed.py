"""Model for the CPU kernels: the format of every matrix, and the step in C, to which each layer adds itself.

The daemon's preflight and the worker's load build the same step; the preflight's has matrices without data, and its
sizes alone. GGUF's 4-bit and 8-bit kinds keep their codes; floats become bfloat16, and everything float32 where
requested.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, Final

import numpy as np

from neuron.cpu_kernels import native
from neuron.formats.scheme import Scheme
from neuron.layers.cache import Cache, PagedKV, SequenceState
from neuron.layers.layer import PackedLayer, Weights
from neuron.layers.parameters import Constant, Matrix, Parameter, Vector
from neuron.models.gguf import TensorKind
from neuron.models.model import ModelConfig, StoredKind

LANES: Final = 16
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


@dataclasses.dataclass(frozen=True, slots=True)
class PackedWeights:
    """Packed parameters of a model, of the embedding, each layer and the head.

    Those of a layer by name: float32 of whole registers, or the tuple of a matrix's native matrices.
    """

    embedding: Weights
    layers: tuple[Weights, ...]
    head: Weights
    region: np.ndarray[Any, np.dtype[np.uint8]]
    """Memory that all of them lie in."""


def checked_level(wanted: str) -> str:
    """Return the dispatch level ``wanted``, or the processor's best; raise ``ValueError`` if it has no such level."""
    levels = native.levels()
    if wanted and wanted not in levels:
        raise ValueError(f"cpu_level is {wanted!r}; this processor has {', '.join(levels)}")
    return wanted or levels[0]


def obstacle(config: ModelConfig) -> str | None:
    """Return the reason for which the kernels cannot run a model, ``None`` if they can; without its draft head."""
    config = config.without_draft_head()
    names = {type(layer).__name__: None for layer in config.layers if not isinstance(layer, PackedLayer)}
    if names:
        return f"{config.family} has layers ({', '.join(names)}) that only the eager path computes"
    try:
        make_model(config, shapes(config, "bfloat16"), rows=1, sequences=1, sampled=1, threads=1)
    except native.UnsupportedError as error:
        return f"{config.family} is not for the kernels: {error}"
    return None


def padded(count: int) -> int:
    """Return ``count`` rounded up to whole registers."""
    return -(-count // LANES) * LANES


def block_kind(kind: StoredKind) -> TensorKind:
    """Return the GGUF kind of the blocks that are packed; bfloat16 where a scheme of safetensors is expanded."""
    return TensorKind[kind.block_kind or "BF16"] if isinstance(kind, Scheme) else kind


def formats(matrix: Matrix, kinds: Mapping[str, StoredKind], dtype: str) -> tuple[Format, ...]:
    """Return the format of each tensor of a matrix; ``kinds`` are how a file stores them, by safetensors name.

    They multiply the same activations, so all are integer or all float; gate and up alternate within one matrix, so
    they have one format. Matrices that may not be quantised are small, and float32.
    """
    if not matrix.quantised:
        return (Format.W32,) * len(matrix.tensors)

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
    if isinstance(cache, SequenceState):
        return 0
    assert isinstance(cache, PagedKV), "layers with another cache have no kernels"
    return 2 * cache.num_kv_heads * native.kv_page_bytes(kv_dtype, cache.head_dim)


def shapes(config: ModelConfig, dtype: str) -> PackedWeights:
    """Return the parameters of a model without the data of their matrices."""
    constants: dict[Constant, Any] = {}

    def shape(parameter: Parameter) -> Any:
        match parameter:
            case Vector():
                return np.zeros(padded(parameter.num_elements), np.float32)
            case Matrix():
                each = formats(parameter, config.tensor_kinds, dtype)
                rows, columns = parameter.tensors[0].shape
                if parameter.gated:
                    return (native.Matrix(None, each[0], 2 * padded(rows), columns),)
                return tuple(
                    native.Matrix(None, format, tensor.shape[0], tensor.shape[1])
                    for tensor, format in zip(parameter.tensors, each, strict=True)
                )
            case Constant():
                if parameter not in constants:
                    constants[parameter] = whole_registers(parameter.values)
                return constants[parameter]

    each = [{name: shape(parameter) for name, parameter in own.items()} for own in config.parameters()]
    return by_layer(each, np.empty(0, np.uint8))


def by_layer(loaded: Sequence[Weights], region: np.ndarray[Any, np.dtype[np.uint8]]) -> PackedWeights:
    """Return packed parameters, given in the order of :meth:`~neuron.models.model.ModelConfig.parameters`."""
    embedding, *layers, head = loaded
    return PackedWeights(embedding, tuple(layers), {"matrix": embedding["table"], **head}, region)


def whole_registers(values: Sequence[float]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return ``values`` in float32, padded with zeros to whole registers."""
    found = np.zeros(padded(len(values)), np.float32)
    found[: len(values)] = values
    return found


def make_model(
    config: ModelConfig,
    weights: PackedWeights,
    pool: native.Pool | None = None,
    level: str = "",
    *,
    rows: int,
    sequences: int,
    sampled: int,
    kv_dtype: str = "bfloat16",
    embedding_scale: float = 1.0,
    windows: tuple[int, ...] = (),
    threads: int = 0,
) -> native.Model:
    """Return the step in C of a model, without a cache, for at most so many rows, sequences and sampled rows.

    Without a ``pool`` it has sizes alone, for so many ``threads``; ``windows`` are those of further page tables. Raises
    :class:`~neuron.cpu_kernels.native.UnsupportedError`.
    """
    model = native.Model(
        pool,
        level or native.levels()[0],
        hidden=config.hidden_size,
        vocab=config.vocab_size,
        eps=config.head.norm.eps,
        kv_dtype=kv_dtype,
        max_rows=rows,
        max_sequences=sequences,
        max_sampled=sampled,
        embedding_scale=embedding_scale,
        logit_cap=config.head.logit_cap,
        windows=windows,
        threads=threads,
    )
    for layer, own in zip(config.layers, weights.layers, strict=True):
        assert isinstance(layer, PackedLayer)
        layer.pack(model, own)
    model.set_ends(weights.embedding["table"][0], weights.head["matrix"][0], weights.head["norm"])
    return model
