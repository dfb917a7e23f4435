"""Typed reads of a model's configuration, from ``config.json`` or from GGUF metadata, with errors that name the key.

Families read both formats by the keys of ``config.json``; GGUF's names of the same facts are in :data:`GGUF_KEYS`.
"""

import abc
import contextlib
import copy
import math
import os
import pathlib
import struct
from collections.abc import Iterator, Mapping
from typing import Any, Final, Self

from neuron.models.errors import CorruptWeightsError
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
    **dict.fromkeys(("head_dim", "linear_key_head_dim", "linear_value_head_dim"), MAX_HEAD_DIM),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"), MAX_EXPERTS),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group"), MAX_EXPERTS),
    **dict.fromkeys(("num_nextn_predict_layers", "mtp_num_hidden_layers", "first_k_dense_replace"), MAX_LAYERS),
    **dict.fromkeys(
        (
            *("hidden_size", "num_attention_heads", "num_key_value_heads"),
            *("linear_num_key_heads", "linear_num_value_heads", "linear_conv_kernel_dim"),
            *("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"),
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
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "n_shared_experts": "expert_shared_count",
    "first_k_dense_replace": "leading_dense_block_count",
    "norm_topk_prob": "expert_weights_norm",
    "routed_scaling_factor": "expert_weights_scale",
    "n_group": "expert_group_count",
    "topk_group": "expert_group_used_count",
    "num_nextn_predict_layers": "nextn_predict_layers",
    "layer_types": "attention.recurrent_layers",
    "linear_conv_kernel_dim": "ssm.conv_kernel",
    "linear_key_head_dim": "ssm.state_size",
    "linear_num_key_heads": "ssm.group_count",
    "linear_num_value_heads": "ssm.time_step_rank",
    "linear_value_width": "ssm.inner_size",
    "rope_type": "rope.scaling.type",
    "factor": "rope.scaling.factor",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "value_dim": "attention.value_length",
    "rotary_dim": "rope.dimension_count",
    "short_factor": "rope_factors_short.weight",
    "long_factor": "rope_factors_long.weight",
    "attention_factor": "rope.scaling.attn_factor",
    "mscale_all_dim": "rope.scaling.yarn_log_multiplier",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
    "llama_4_scaling_beta": "attention.temperature_scale",
}
"""Keys of GGUF metadata, behind the architecture's name, for keys of ``config.json``."""


FREQUENCY_FACTORS: Final = "rope_freqs.weight"
FACTORS: Final = (FREQUENCY_FACTORS, GGUF_KEYS["short_factor"], GGUF_KEYS["long_factor"])
"""Tensors of GGUF that are part of the configuration."""


WINDOWED: Final = "sliding_attention"
NOT_WINDOWED: Final = "full_attention"
RECURRENT: Final = "linear_attention"
"""Kinds of layers, as ``layer_types`` names them."""


class Fields(abc.ABC):
    """Configuration of a model, read by the keys of ``config.json``."""

    def __init__(self, path: pathlib.Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self.values = values

    def key(self, name: str) -> str:
        """Return this format's key for a key of ``config.json``."""
        return name

    def value(self, name: str) -> Any:
        """Return the value of a key as it is; ``None`` where there is none."""
        return self.values.get(self.key(name))

    @contextlib.contextmanager
    def sizes(self, *names: str) -> Iterator[None]:
        """Name these keys, and their values, in a ``ValueError`` of the block: sizes that do not fit each other."""
        try:
            yield
        except ValueError as error:
            found = [f"{self.key(name)} is {quoted(self.value(name))}" for name in names]
            raise CorruptWeightsError(self.path, f"{', '.join(found)}: {error}") from error

    @abc.abstractmethod
    def rope_fields(self, kind: str = NOT_WINDOWED) -> "Fields":
        """Return the fields that describe the rotary embedding of a kind of layer."""

    def changed(self, values: Mapping[str, Any]) -> Self:
        """Return the fields with other ``values``, by this format's keys; ``None``: without them."""
        found = copy.copy(self)
        found.values = {**self.values, **values}
        return found

    def size(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """Return a whole number from ``least`` to the limit of its key."""
        key, most = self.key(name), LIMITS.get(name, (1 << 31) - 1)
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise CorruptWeightsError(self.path, f"{key} is {quoted(value)}, not a number from {least} to {most}")
        return value

    def number(self, name: str, default: float | None = None, *, least: float = 0.0, most: float = MAX_SCALE) -> float:
        """Return a positive number from ``least`` to ``most``."""
        key = self.key(name)
        value = self.values.get(key)
        return self._checked(key, default if value is None else value, least, most)

    def numbers(self, name: str, *, least: float = 0.0, most: float = MAX_SCALE) -> tuple[float, ...]:
        """Return a list of positive numbers from ``least`` to ``most``."""
        key = self.key(name)
        found = self.values.get(key)
        if not isinstance(found, list) or len(found) > MAX_HEAD_DIM:
            raise CorruptWeightsError(self.path, f"{key} is {quoted(found)}, not a list of numbers")
        return tuple(self._checked(key, value, least, most) for value in found)

    def _checked(self, key: str, value: Any, least: float, most: float) -> float:
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

    def layer_kinds(self) -> tuple[str, ...]:
        """Return the kind of each layer; nothing where the file does not tell."""
        return self.names("layer_types")

    def flag(self, name: str, default: bool = False) -> bool:
        """Return a truth value."""
        key = self.key(name)
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise CorruptWeightsError(self.path, f"{key} is {quoted(value)}, not true or false")
        return value


class JsonFields(Fields):
    """Fields of ``config.json``."""

    def rope_fields(self, kind: str = NOT_WINDOWED) -> Fields:
        """See :class:`Fields`: keys of the object of rope parameters, and what stands beside it."""
        found = self.values.get("rope_parameters") or self.values.get("rope_scaling") or {}
        if not isinstance(found, dict):
            raise CorruptWeightsError(self.path, "rope_parameters or rope_scaling is not an object")
        own = found.get(kind, found if kind == NOT_WINDOWED else {})
        if not isinstance(own, dict):
            raise CorruptWeightsError(self.path, f"the rope parameters of {kind} are not an object")
        values = {**own, "max_position_embeddings": self.value("max_position_embeddings")}
        if kind != NOT_WINDOWED and "rope_theta" not in own:
            # Older files have a key of their own for layers with a window.
            values["rope_theta"] = self.value("rope_local_base_freq")
        return self.changed(values)


class GgufFields(Fields):
    """Fields of a GGUF header, those of its architecture; the tensors themselves show what has no key."""

    def __init__(self, path: pathlib.Path, header: GgufHeader, architecture: str) -> None:
        prefix = architecture + "."
        values = {key.removeprefix(prefix): value for key, value in header.metadata.items() if key.startswith(prefix)}
        tensors = {tensor.name: tensor for tensor in header.tensors}
        table = tensors.get("token_embd.weight")
        self._tensors = tensors
        super().__init__(
            path,
            {
                **values,
                "vocab_size": table.shape[0] if table else 0,
                "tie_word_embeddings": "output.weight" not in tensors,
                "attention_bias": any(name.endswith(".attn_q.bias") for name in tensors),
                "mlp_only_layers": [i for i in range(MAX_LAYERS) if f"blk.{i}.ffn_up.weight" in tensors],
                "use_qk_norm": "blk.0.attn_q_norm.weight" in tensors,
                "mscale": 1.0,
            },
        )
        factors = {name: list(self._read_factors(name)) for name in FACTORS if name in tensors}
        self.values = {**self.values, **factors}
        if self.value("long_factor") or self.value("short_factor"):
            self.values[self.key("rope_type")] = "longrope"

    def key(self, name: str) -> str:
        """See :class:`Fields`."""
        return GGUF_KEYS.get(name, name)

    def layer_kinds(self) -> tuple[str, ...]:
        """See :class:`Fields`; a file tells which layers are recurrent."""
        key, found = self.key("layer_types"), self.value("layer_types")
        if found is None:
            return ()
        if not isinstance(found, list) or not all(isinstance(is_recurrent, bool) for is_recurrent in found):
            raise CorruptWeightsError(self.path, f"{key} is {quoted(found)}, not a list of true and false")
        return tuple(RECURRENT if is_recurrent else NOT_WINDOWED for is_recurrent in found)

    def rope_fields(self, kind: str = NOT_WINDOWED) -> "GgufFields":
        """See :class:`Fields`; only the frequencies of layers without a window are scaled."""
        if kind == NOT_WINDOWED:
            return self
        own = dict.fromkeys((FREQUENCY_FACTORS, self.key("rope_type")))
        return self.changed({**own, self.key("rope_theta"): self.value("rope.freq_base_swa")})

    def _read_factors(self, name: str) -> tuple[float, ...]:
        tensor = self._tensors[name]
        path = tensor.file
        if tensor.kind is not TensorKind.F32 or len(tensor.shape) != 1 or tensor.shape[0] > MAX_HEAD_DIM:
            raise CorruptWeightsError(path, f"{name} is not a vector of float32, half as long as a head")
        try:
            with open_regular(path) as file:
                packed = os.pread(file.fileno(), tensor.nbytes, tensor.offset)
        except FileNotFoundError:
            # Only the header of a file on a server is read, for the sizes, which do not depend on the numbers.
            return (1.0,) * tensor.shape[0]
        if len(packed) != tensor.nbytes:
            raise CorruptWeightsError(path, f"{name} is cut")
        factors = struct.unpack(f"<{tensor.shape[0]}f", packed)
        if not all(0 < factor < math.inf for factor in factors):
            raise CorruptWeightsError(path, f"{name} holds a number that is not positive")
        return factors
