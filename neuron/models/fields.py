"""Typed reads of a model's configuration, from ``config.json`` or from GGUF metadata, with errors that name the key.

Families read both formats by the keys of ``config.json``; GGUF's names of the same facts are in :data:`GGUF_KEYS`.
"""

import abc
import math
import os
import pathlib
import struct
from collections.abc import Mapping
from typing import Any, Final

from neuron.layers.rope import FrequencyFactors, LinearScaling, Llama3Scaling, Rope, RopeScaling
from neuron.models.errors import CorruptWeightsError, UnsupportedArchitectureError, UnsupportedRopeError
from neuron.models.files import open_regular, quoted
from neuron.models.gguf import GgufHeader, TensorKind

MAX_LAYERS: Final = 1024
MAX_EXPERTS: Final = 4096
MAX_VOCABULARY: Final = 1 << 24
MAX_WIDTH: Final = 1 << 20
"""Bound on the widths of hidden state, heads and MLP: ten times any model's. Without a bound, lists and sums over them
(names of tensors, bytes of memory) have no end."""
MAX_HEAD_DIM: Final = 1 << 12
LIMITS: Final = {
    "vocab_size": MAX_VOCABULARY,
    "num_hidden_layers": MAX_LAYERS,
    "head_dim": MAX_HEAD_DIM,
    **dict.fromkeys(("num_experts", "num_local_experts", "num_experts_per_tok"), MAX_EXPERTS),
    **dict.fromkeys(
        (
            *("hidden_size", "num_attention_heads", "num_key_value_heads"),
            *("intermediate_size", "moe_intermediate_size"),
        ),
        MAX_WIDTH,
    ),
}
"""Bounds on sizes, by key; others are positive numbers of 32 bits."""
MAX_ROPE_THETA: Final = 1e12
MAX_SCALE: Final = 1e9
"""Bound on all other numbers."""
GGUF_KEYS: Final = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "intermediate_size": "feed_forward_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "max_position_embeddings": "context_length",
    "sliding_window": "attention.sliding_window",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}
"""Keys of GGUF metadata, behind the architecture's name, for keys of ``config.json``."""


class Fields(abc.ABC):
    """Configuration of a model, read by the keys of ``config.json``."""

    def __init__(self, path: pathlib.Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self.values = values

    def key(self, name: str) -> str:
        """Return this format's key for a key of ``config.json``."""
        return name

    @abc.abstractmethod
    def rope(self, head_dim: int, theta: float = 1e4, kind: str = "full_attention") -> Rope:
        """Return the rotary embedding of a kind of layer; ``theta`` is its base unless the file has another."""

    def size(self, name: str, default: int | None = None) -> int:
        """Return a positive whole number within the limit of its key."""
        key, most = self.key(name), LIMITS.get(name, (1 << 31) - 1)
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
            raise CorruptWeightsError(self.path, f"{key} is {quoted(value)}, not a number from 1 to {most}")
        return value

    def number(self, name: str, default: float, *, least: float = 0.0, most: float = MAX_SCALE) -> float:
        """Return a positive number from ``least`` to ``most``."""
        key = self.key(name)
        value = self.values.get(key, default)
        sound = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not sound or not least <= value <= most or value <= 0:
            raise CorruptWeightsError(
                self.path, f"{key} is {quoted(value)}, not a positive number from {least:g} to {most:g}"
            )
        return float(value)

    def names(self, key: str) -> tuple[str, ...]:
        """Return a list of names."""
        value = self.values.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise CorruptWeightsError(self.path, f"{key} is {quoted(value)}, not a list of names")
        return tuple(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """Return a truth value."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise CorruptWeightsError(self.path, f"{key} is {quoted(value)}, not true or false")
        return value


class JsonFields(Fields):
    """Fields of ``config.json``."""

    def rope(self, head_dim: int, theta: float = 1e4, kind: str = "full_attention") -> Rope:
        """See :class:`Fields`."""
        found = self.values.get("rope_parameters") or self.values.get("rope_scaling") or {}
        if not isinstance(found, dict):
            raise CorruptWeightsError(self.path, "the rope parameters are not an object")
        own = found.get(kind, found if kind == "full_attention" else {})
        if not isinstance(own, dict):
            raise CorruptWeightsError(self.path, "the rope parameters of a kind of layer are not an object")
        # Older files have a key of their own for layers with a window.
        key = "rope_theta" if kind == "full_attention" or "rope_theta" in own else "rope_local_base_freq"
        base = JsonFields(self.path, {**self.values, **own}).number(key, theta, least=1.0, most=MAX_ROPE_THETA)
        return Rope(base, head_dim, _scaling_from(own, self.path))


class GgufFields(Fields):
    """Fields of a GGUF header, those of its architecture; the tensors themselves show what has no key."""

    def __init__(self, path: pathlib.Path, header: GgufHeader, architecture: str) -> None:
        prefix = architecture + "."
        values = {key.removeprefix(prefix): value for key, value in header.metadata.items() if key.startswith(prefix)}
        tensors = {tensor.name: tensor for tensor in header.tensors}
        table = tensors.get("token_embd.weight")
        super().__init__(
            path,
            {
                **values,
                "vocab_size": table.shape[0] if table else 0,
                "tie_word_embeddings": "output.weight" not in tensors,
                "attention_bias": "blk.0.attn_q.bias" in tensors,
            },
        )
        self._frequency_factors = tensors.get("rope_freqs.weight")

    def key(self, name: str) -> str:
        """See :class:`Fields`."""
        return GGUF_KEYS.get(name, name)

    def rope(self, head_dim: int, theta: float = 1e4, kind: str = "full_attention") -> Rope:
        """See :class:`Fields`; the format has nothing about layers with a window."""
        if self.size("attention.value_length", head_dim) != head_dim:
            raise UnsupportedArchitectureError(f"{self.path}: keys and values of different sizes are not supported")
        if self.size("rope.dimension_count", head_dim) != head_dim:
            raise UnsupportedRopeError(f"{self.path}: a rotary embedding of part of the head is not supported")
        if kind != "full_attention":
            return Rope(theta, head_dim)
        base = self.number("rope_theta", theta, least=1.0, most=MAX_ROPE_THETA)
        return Rope(base, head_dim, self._scaling())

    def _scaling(self) -> RopeScaling | None:
        if self._frequency_factors is not None:
            return FrequencyFactors(self._read_factors())
        kind, factor = self.values.get("rope.scaling.type", "none"), self.values.get("rope.scaling.factor")
        if kind == "none":
            return None
        if kind == "linear" and isinstance(factor, float) and 0 < factor <= MAX_SCALE:
            return LinearScaling(factor)
        raise UnsupportedRopeError(
            f"{self.path}: rope scaling {quoted(kind)} by {quoted(factor)} is not supported (linear and llama3 are)"
        )

    def _read_factors(self) -> tuple[float, ...]:
        tensor, path = self._frequency_factors, self.path
        assert tensor is not None
        if tensor.kind is not TensorKind.F32 or len(tensor.shape) != 1 or tensor.shape[0] > MAX_HEAD_DIM:
            raise CorruptWeightsError(path, "rope_freqs.weight is not a vector of float32, half as long as a head")
        with open_regular(path) as file:
            packed = os.pread(file.fileno(), tensor.nbytes, tensor.offset)
        if len(packed) != tensor.nbytes:
            raise CorruptWeightsError(path, "rope_freqs.weight is cut")
        factors = struct.unpack(f"<{tensor.shape[0]}f", packed)
        if not all(0 < factor < math.inf for factor in factors):
            raise CorruptWeightsError(path, "rope_freqs.weight holds a number that is not positive")
        return factors


def _scaling_from(parameters: Mapping[str, Any], where: object) -> RopeScaling | None:
    """Return the scaling that a ``rope_scaling`` or ``rope_parameters`` object of ``config.json`` describes.

    Raises :class:`UnsupportedRopeError` for an unknown kind, or if a number is missing.
    """
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedRopeError(f"{where}: a rotary embedding of part of the head is not supported")
    try:
        if kind == "default":
            return None
        if kind == "linear":
            return LinearScaling(_positive(parameters["factor"]))
        if kind == "llama3":
            scaling = Llama3Scaling(
                factor=_positive(parameters["factor"]),
                low_freq_factor=_positive(parameters["low_freq_factor"]),
                high_freq_factor=_positive(parameters["high_freq_factor"]),
                original_context_tokens=int(_positive(parameters["original_max_position_embeddings"])),
            )
            if scaling.high_freq_factor > scaling.low_freq_factor:
                return scaling
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UnsupportedRopeError(f"{where}: rope scaling {quoted(kind)} has a bad or absent {error}") from error
    raise UnsupportedRopeError(
        f"{where}: rope scaling {quoted(dict(parameters))} is not supported (linear and llama3 are)"
    )


def _positive(value: Any) -> float:
    number = float(value)
    if not 0 < number <= 1e9:
        raise ValueError(f"number {number}")
    return number
