"""Configuration of a model, read from ``config.json`` or from GGUF metadata into one value.

Imports no torch: the daemon's preflight uses the same functions as the worker that loads the model. Over 450 lines: the
readers of both formats share the checks of their fields, and the two are read side by side.
"""

import dataclasses
import math
import os
import pathlib
import struct
from collections.abc import Mapping
from typing import Any, Final

from cortex.wire.node import SamplingDefaults
from neuron.device.jobs import Pooling
from neuron.models.architecture import Architecture, gguf_name
from neuron.models.embedding_folder import has_head, makes_embeddings, pooling_of
from neuron.models.ends import folder_ends, gguf_ends, token_ids
from neuron.models.errors import (
    CorruptWeightsError,
    UnsupportedArchitectureError,
    UnsupportedQuantizationError,
    UnsupportedRopeError,
)
from neuron.models.files import open_regular, quoted, read_json_object
from neuron.models.gguf import GgufHeader, TensorKind, read_header
from neuron.models.registry import find_architecture
from neuron.models.rope import FrequencyFactors, LinearScaling, RopeScaling, scaling_from

MAX_LAYERS: Final = 1024
MAX_EXPERTS: Final = 4096
MAX_VOCABULARY: Final = 1 << 24
MAX_WIDTH: Final = 1 << 20
"""Bound on the widths of hidden state, heads and MLP: ten times any model's. Without a bound, lists and sums over them
(names of tensors, bytes of memory) have no end."""
MAX_HEAD_DIM: Final = 1 << 12
MAX_EXPERT_MATRICES: Final = 1 << 17
"""Bound on the experts of all layers together."""
LIMITS: Final = {
    **dict.fromkeys(("vocab_size",), MAX_VOCABULARY),
    **dict.fromkeys(("num_hidden_layers", "block_count"), MAX_LAYERS),
    **dict.fromkeys(("head_dim", "attention.key_length"), MAX_HEAD_DIM),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "num_experts_per_tok", "expert_count", "expert_used_count"), MAX_EXPERTS
    ),
    **dict.fromkeys(
        (
            *("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size"),
            *("moe_intermediate_size", "embedding_length", "attention.head_count", "attention.head_count_kv"),
            *("feed_forward_length", "expert_feed_forward_length"),
        ),
        MAX_WIDTH,
    ),
}
"""Bounds on sizes, by key in ``config.json`` or GGUF; others are positive numbers of 32 bits."""
MAX_ROPE_THETA: Final = 1e12
MAX_SCALE: Final = 1e9
"""Bound on all other numbers."""
DTYPE_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclasses.dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Sampling defaults that the model's authors recommend; ``None`` where there are none."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None

    def under(self, wanted: SamplingDefaults) -> "GenerationDefaults":
        """Return these defaults, overridden by the ones in a model's entry."""
        given = {name: getattr(wanted, name) for name in wanted.__struct_fields__}
        return dataclasses.replace(self, **{name: value for name, value in given.items() if value is not None})


@dataclasses.dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and constants of a model."""

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    attention_bias: bool
    tie_embeddings: bool
    context_tokens: int
    """Longest context that the model was trained for, prompt and output together."""
    eos_ids: tuple[int, ...]
    bos_id: int | None
    generation: GenerationDefaults
    pooling: Pooling = Pooling.LAST
    """Pooling of its embeddings."""
    generates: bool = True
    """Whether it generates text, not embeddings alone."""
    tensor_kinds: Mapping[str, TensorKind] = dataclasses.field(default_factory=dict)
    """Storage kind of each tensor of a GGUF file, by safetensors name; empty for a folder, where all are floats."""
    attention_scale: float = 0.0
    """Factor of attention scores; 0: one over the square root of ``head_dim``."""
    logit_cap: float = 0.0
    """Soft cap of the logits, by tanh; 0: none."""
    window_tokens: int = 0
    """Number of last tokens, its own included, that a token attends to in layers with a window."""
    windowed_layers: frozenset[int] = frozenset()
    window_rope_theta: float = 0.0
    num_experts: int = 0
    num_experts_per_token: int = 0
    expert_intermediate_size: int = 0
    normalises_experts: bool = True
    """Whether the weights of the picked experts are normalised to sum to 1."""

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of exactly the tensors of the checkpoint, by safetensors name."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        layer = self._layer_shapes()
        for number in range(self.num_layers):
            shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
        shapes["model.norm.weight"] = (self.hidden_size,)
        if not self.tie_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    def _layer_shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, queries, keys = self.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (queries, hidden),
            "self_attn.k_proj.weight": (keys, hidden),
            "self_attn.v_proj.weight": (keys, hidden),
            "self_attn.o_proj.weight": (hidden, queries),
            "post_attention_layernorm.weight": (hidden,),
        }
        if self.num_experts:
            shapes["mlp.gate.weight"] = (self.num_experts, hidden)
        prefixes = [f"mlp.experts.{number}." for number in range(self.num_experts)] or ["mlp."]
        width = self.expert_intermediate_size if self.num_experts else self.intermediate_size
        for prefix in prefixes:
            shapes[prefix + "gate_proj.weight"] = shapes[prefix + "up_proj.weight"] = (width, hidden)
            shapes[prefix + "down_proj.weight"] = (hidden, width)
        if self.architecture.sandwich_norms:
            shapes["pre_feedforward_layernorm.weight"] = shapes["post_feedforward_layernorm.weight"] = (hidden,)
        if self.attention_bias:
            shapes["self_attn.q_proj.bias"] = (queries,)
            shapes["self_attn.k_proj.bias"] = shapes["self_attn.v_proj.bias"] = (keys,)
            if self.architecture.output_bias_follows_qkv:
                shapes["self_attn.o_proj.bias"] = (hidden,)
        if self.architecture.qk_norm:
            shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (self.head_dim,)
        return shapes

    def num_parameters(self) -> int:
        """Return the number of weights; a tied head counts once."""
        per_layer = sum(math.prod(shape) for shape in self._layer_shapes().values())
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return embeddings + self.hidden_size + self.num_layers * per_layer

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Return the bytes of a token's keys and values over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * DTYPE_BYTES[dtype]


def read_config(path: pathlib.Path) -> ModelConfig:
    """Read the model at ``path``: a ``.gguf`` file, or a folder with ``config.json``.

    Raises :class:`CorruptWeightsError`, :class:`UnsupportedArchitectureError`, :class:`UnsupportedRopeError` or
    :class:`UnsupportedQuantizationError`.
    """
    if path.is_dir():
        return _from_folder(path)
    try:
        return config_from_gguf(path, read_header(path))
    except FileNotFoundError:
        raise CorruptWeightsError(path, "no such file or folder") from None


# ------------------------------------------------------------------ config.json


def _from_folder(folder: pathlib.Path) -> ModelConfig:
    path = folder / "config.json"
    values = _json_object(path)
    if values is None:
        raise CorruptWeightsError(path, "no such file")
    fields = _Fields(path, values)
    architecture = find_architecture(str(values.get("model_type")), fields.names("architectures") or None, path)
    _refuse_unsupported(fields, architecture)
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise CorruptWeightsError(path, "the rope parameters are not an object")
    window_rope = rope.get("sliding_attention", {})
    rope = rope.get("full_attention", rope)
    if not isinstance(rope, dict) or not isinstance(window_rope, dict):
        raise CorruptWeightsError(path, "the rope parameters of a kind of layer are not an object")
    generation_path = folder / "generation_config.json"
    generation = _json_object(generation_path) or {}
    heads = fields.size("num_attention_heads")
    embeds = makes_embeddings(folder, fields.names("architectures"))
    return _checked(
        path,
        ModelConfig(
            architecture=architecture,
            vocab_size=fields.size("vocab_size"),
            hidden_size=fields.size("hidden_size"),
            num_layers=fields.size("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=fields.size("num_key_value_heads", heads),
            head_dim=fields.size("head_dim", fields.size("hidden_size") // heads),
            intermediate_size=fields.size("intermediate_size"),
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope_theta=_Fields(path, {**values, **rope}).number(
                "rope_theta", 1e6 if architecture.windowed else 1e4, least=1.0, most=MAX_ROPE_THETA
            ),
            rope_scaling=scaling_from(rope, path),
            attention_bias=architecture.qkv_bias or fields.flag("attention_bias"),
            # Without a head nothing is generated, and a tied one takes no memory.
            tie_embeddings=fields.flag("tie_word_embeddings", architecture.ties_embeddings)
            or (embeds and not has_head(folder)),
            context_tokens=fields.size("max_position_embeddings"),
            eos_ids=folder_ends(folder, (generation, *_configs(values))),
            bos_id=next(iter(token_ids(values.get("bos_token_id"), path)), None),
            generation=_generation(generation_path, generation, GENERATION_KEYS),
            pooling=pooling_of(folder),
            generates=not embeds,
            **_folder_windows(fields, architecture, window_rope),
            **_folder_experts(fields, architecture),
        ),
    )


def _configs(values: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Return a configuration, and its text model's where it has several."""
    inner = values.get("text_config")
    return (values, inner) if isinstance(inner, dict) else (values,)


def _folder_windows(fields: "_Fields", architecture: Architecture, window_rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of layers with a window, and the scales of such models, from ``config.json``."""
    if not architecture.windowed:
        return {}
    path, values = fields.path, fields.values
    if scaling_from(window_rope, path) is not None:
        raise UnsupportedRopeError(f"{path}: rope scaling in layers with a window is not supported")
    num_layers = fields.size("num_hidden_layers")
    kinds = fields.names("layer_types")
    if not kinds:
        every = fields.size("sliding_window_pattern", 6)
        kinds = tuple("full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(num_layers))
    if len(kinds) != num_layers or set(kinds) - {"full_attention", "sliding_attention"}:
        raise CorruptWeightsError(
            path, f"layer_types does not name a kind of attention for each of {num_layers} layers"
        )
    scalar = fields.number("query_pre_attn_scalar", 256)
    return {
        "attention_scale": scalar**-0.5,
        "logit_cap": fields.number("final_logit_softcapping", 1) if values.get("final_logit_softcapping") else 0.0,
        "window_tokens": fields.size("sliding_window"),
        "windowed_layers": frozenset(i for i, kind in enumerate(kinds) if kind == "sliding_attention"),
        "window_rope_theta": _Fields(path, {**values, **window_rope}).number(
            "rope_theta" if "rope_theta" in window_rope else "rope_local_base_freq",
            1e4,
            least=1.0,
            most=MAX_ROPE_THETA,
        ),
    }


def _folder_experts(fields: "_Fields", architecture: Architecture) -> dict[str, Any]:
    if not architecture.has_experts:
        return {}
    if fields.values.get("mlp_only_layers") or fields.size("decoder_sparse_step", 1) != 1:
        raise UnsupportedArchitectureError(f"{fields.path}: layers without experts among others are not supported")
    return {
        "num_experts": fields.size("num_experts" if "num_experts" in fields.values else "num_local_experts"),
        "num_experts_per_token": fields.size("num_experts_per_tok"),
        "expert_intermediate_size": fields.size("moe_intermediate_size"),
        "normalises_experts": fields.flag("norm_topk_prob"),
    }


GENERATION_KEYS: Final = {field.name: field.name for field in dataclasses.fields(GenerationDefaults)}


def _refuse_unsupported(fields: "_Fields", architecture: Architecture) -> None:
    path, values = fields.path, fields.values
    if method := values.get("quantization_config"):
        name = method.get("quant_method") if isinstance(method, dict) else method
        raise UnsupportedQuantizationError(f"{path}: quantization {quoted(name)} is not supported")
    windows = bool(values.get("use_sliding_window") or set(fields.names("layer_types")) - {"full_attention"})
    if windows and not architecture.windowed:
        raise UnsupportedArchitectureError(f"{path}: sliding-window attention is not supported")
    if values.get("mlp_bias"):
        raise UnsupportedArchitectureError(f"{path}: biases in the MLP are not supported")
    if values.get("attn_logit_softcapping") or values.get("use_bidirectional_attention"):
        raise UnsupportedArchitectureError(f"{path}: attention with a soft cap, or both ways, is not supported")
    activation = values.get("hidden_activation") or values.get("hidden_act") or architecture.activation
    if activation != architecture.activation:
        raise UnsupportedArchitectureError(f"{path}: activation {quoted(activation)} is not supported")


def _json_object(path: pathlib.Path) -> dict[str, Any] | None:
    try:
        return read_json_object(path)
    except FileNotFoundError:
        return None


# ------------------------------------------------------------------ GGUF


def config_from_gguf(path: pathlib.Path, header: GgufHeader) -> ModelConfig:
    """Return the configuration that a GGUF header holds; ``path`` is the file it was read from."""
    values = header.metadata
    name = str(values.get("general.architecture"))
    architecture = find_architecture(name, None, path)
    own = {key.removeprefix(name + "."): value for key, value in values.items() if key.startswith(name + ".")}
    fields = _Fields(path, own)
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    heads = fields.size("attention.head_count")
    head_dim = fields.size("attention.key_length", fields.size("embedding_length") // heads)
    if fields.size("attention.value_length", head_dim) != head_dim:
        raise UnsupportedArchitectureError(f"{path}: keys and values of different sizes are not supported")
    if fields.size("rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedRopeError(f"{path}: a rotary embedding of part of the head is not supported")
    kinds = {tensor.name: tensor.kind for tensor in header.tensors}
    config = _checked(
        path,
        ModelConfig(
            architecture=architecture,
            vocab_size=shapes.get("token_embd.weight", (0,))[0],
            hidden_size=fields.size("embedding_length"),
            num_layers=fields.size("block_count"),
            num_heads=heads,
            num_kv_heads=fields.size("attention.head_count_kv", heads),
            head_dim=head_dim,
            intermediate_size=fields.size("feed_forward_length"),
            rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon", 1e-6),
            rope_theta=fields.number("rope.freq_base", 10000.0, least=1.0, most=MAX_ROPE_THETA),
            rope_scaling=_gguf_scaling(path, header, own),
            attention_bias="blk.0.attn_q.bias" in shapes,
            tie_embeddings="output.weight" not in shapes,
            context_tokens=fields.size("context_length"),
            eos_ids=gguf_ends(values, path),
            bos_id=next(iter(token_ids(values.get("tokenizer.ggml.bos_token_id"), path)), None),
            generation=_generation(path, values, GGUF_GENERATION_KEYS),
            pooling=Pooling.MEAN if own.get("pooling_type") == GGUF_MEAN_POOLING else Pooling.LAST,
            **_gguf_windows(fields, architecture, head_dim),
            **_gguf_experts(fields, architecture),
        ),
    )
    stored = {}
    for name in config.tensor_shapes():
        there = gguf_name(name, architecture)
        # A layer's experts are one tensor there: expert 7 of ffn_up_exps.weight is ffn_up_exps.7 here.
        kind = kinds.get(there, kinds.get(there.rpartition(".")[0] + ".weight"))
        if kind is not None:
            stored[name] = kind
    return dataclasses.replace(config, tensor_kinds=stored)


def _gguf_windows(fields: "_Fields", architecture: Architecture, head_dim: int) -> dict[str, Any]:
    """Return the fields of :func:`_folder_windows` from GGUF, where every sixth layer has no window by convention."""
    if not architecture.windowed:
        return {}
    num_layers = fields.size("block_count")
    # As in llama.cpp: only the 27B model, of 62 layers, scales its queries by hidden size over heads.
    scalar = fields.size("embedding_length") / fields.size("attention.head_count") if num_layers == 62 else head_dim
    return {
        "attention_scale": scalar**-0.5,
        "window_tokens": fields.size("attention.sliding_window"),
        "windowed_layers": frozenset(i for i in range(num_layers) if (i + 1) % 6),
        "window_rope_theta": 1e4,
    }


def _gguf_experts(fields: "_Fields", architecture: Architecture) -> dict[str, Any]:
    if not architecture.has_experts:
        return {}
    return {
        "num_experts": fields.size("expert_count"),
        "num_experts_per_token": fields.size("expert_used_count"),
        "expert_intermediate_size": fields.size("expert_feed_forward_length"),
    }


GGUF_MEAN_POOLING: Final = 1
"""Mean pooling as a ``pooling_type`` of GGUF; a decoder's other kinds amount to its last token."""
GGUF_GENERATION_KEYS: Final = {
    "temperature": "general.sampling.temp",
    "top_p": "general.sampling.top_p",
    "top_k": "general.sampling.top_k",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}


def _gguf_scaling(path: pathlib.Path, header: GgufHeader, own: Mapping[str, Any]) -> RopeScaling | None:
    tensor = next((tensor for tensor in header.tensors if tensor.name == "rope_freqs.weight"), None)
    if tensor is not None:
        if tensor.kind is not TensorKind.F32 or len(tensor.shape) != 1 or tensor.shape[0] > MAX_HEAD_DIM:
            raise CorruptWeightsError(path, "rope_freqs.weight is not a vector of float32, half as long as a head")
        with open_regular(path) as file:
            packed = os.pread(file.fileno(), tensor.nbytes, tensor.offset)
        if len(packed) != tensor.nbytes:
            raise CorruptWeightsError(path, "rope_freqs.weight is cut")
        factors = struct.unpack(f"<{tensor.shape[0]}f", packed)
        if not all(0 < factor < math.inf for factor in factors):
            raise CorruptWeightsError(path, "rope_freqs.weight holds a number that is not positive")
        return FrequencyFactors(factors)
    kind = own.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    factor = own.get("rope.scaling.factor")
    if kind == "linear" and isinstance(factor, float) and 0 < factor <= MAX_SCALE:
        return LinearScaling(factor)
    raise UnsupportedRopeError(
        f"{path}: rope scaling {quoted(kind)} by {quoted(factor)} is not supported (linear and llama3 are)"
    )


# ------------------------------------------------------------------ checks


class _Fields:
    """Typed reads of a configuration, with errors that name the key."""

    def __init__(self, path: pathlib.Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self.values = values

    def size(self, key: str, default: int | None = None) -> int:
        value, most = self.values.get(key), LIMITS.get(key, (1 << 31) - 1)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
            raise CorruptWeightsError(self.path, f"{key} is {quoted(value)}, not a number from 1 to {most}")
        return value

    def number(self, key: str, default: float, *, least: float = 0.0, most: float = MAX_SCALE) -> float:
        value = self.values.get(key, default)
        sound = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not sound or not least <= value <= most or value <= 0:
            raise CorruptWeightsError(
                self.path, f"{key} is {quoted(value)}, not a positive number from {least:g} to {most:g}"
            )
        return float(value)

    def names(self, key: str) -> tuple[str, ...]:
        value = self.values.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise CorruptWeightsError(self.path, f"{key} is {quoted(value)}, not a list of names")
        return tuple(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise CorruptWeightsError(self.path, f"{key} is {quoted(value)}, not true or false")
        return value


SAMPLING_RANGES: Final = {
    "temperature": (0.0, 1e3),
    "top_p": (0.0, 1.0),
    "top_k": (0, (1 << 31) - 1),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-3, 1e3),
}
"""Ranges of recommended sampling: a default beyond them would refuse every request that relies on it."""


def _generation(path: pathlib.Path, values: Mapping[str, Any], keys: Mapping[str, str]) -> GenerationDefaults:
    found: dict[str, Any] = {}
    for name, key in keys.items():
        value = values.get(key)
        if value is None:
            continue
        least, most = SAMPLING_RANGES[name]
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value <= most:
            raise CorruptWeightsError(path, f"{key} is {quoted(value)}, not a number from {least:g} to {most:g}")
        found[name] = int(value) if name == "top_k" else float(value)
    return GenerationDefaults(**found)


def _checked(path: pathlib.Path, config: ModelConfig) -> ModelConfig:
    """Return ``config`` if its sizes agree with one another, without the end tokens that the model cannot sample."""
    if config.num_heads % config.num_kv_heads:
        raise CorruptWeightsError(path, f"{config.num_heads} heads cannot share {config.num_kv_heads} key-value heads")
    if config.head_dim < 2 or config.head_dim % 2:
        raise CorruptWeightsError(path, f"a rotary embedding needs an even head dimension, not {config.head_dim}")
    if config.num_experts_per_token > config.num_experts:
        raise CorruptWeightsError(path, f"{config.num_experts_per_token} of {config.num_experts} experts are picked")
    if config.num_experts * config.num_layers > MAX_EXPERT_MATRICES:
        raise CorruptWeightsError(
            path, f"{config.num_experts} experts in {config.num_layers} layers are more than any model has"
        )
    if max(config.num_heads, config.num_kv_heads) * config.head_dim > MAX_WIDTH:
        raise CorruptWeightsError(path, f"{config.num_heads} heads of {config.head_dim} are wider than any model's")
    if not 1 <= config.vocab_size <= MAX_VOCABULARY:
        raise CorruptWeightsError(path, f"token_embd.weight has {config.vocab_size} rows, not 1 to {MAX_VOCABULARY}")
    scaling = config.rope_scaling
    if isinstance(scaling, FrequencyFactors) and len(scaling.factors) != config.head_dim // 2:
        raise CorruptWeightsError(
            path, f"rope_freqs.weight has {len(scaling.factors)} numbers, not {config.head_dim // 2}"
        )
    return dataclasses.replace(config, eos_ids=tuple(token for token in config.eos_ids if token < config.vocab_size))
