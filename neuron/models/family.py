"""Families of models, and what most of them build from: a family is a file beside this one and a line in the registry.

A family reads a configuration, in either format, into blocks of layers.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from neuron.layers.attention import Attention
from neuron.layers.draft_head import DraftHead
from neuron.layers.embedding import Embedding, Head
from neuron.layers.experts import Experts, Router, SharedExpert
from neuron.layers.layer import Layer
from neuron.layers.mlp import GatedMlp
from neuron.layers.norm import Norm
from neuron.models.errors import CorruptWeightsError, UnsupportedArchitectureError
from neuron.models.fields import MAX_WIDTH, NOT_WINDOWED, RECURRENT, WINDOWED, Fields
from neuron.models.files import quoted
from neuron.models.model import ModelConfig
from neuron.models.rope import rope_of

ACTIVATIONS: Final = {"silu": "silu", "gelu_pytorch_tanh": "gelu"}
"""Activations of layers, by their names in ``config.json``."""


EXPERT_KEYS: Final = ("num_experts", "num_local_experts", "n_routed_experts")
MAX_EXPERT_MATRICES: Final = 1 << 17
"""Bound on the experts of all layers together."""


@dataclasses.dataclass(frozen=True, slots=True)
class Family:
    """Family of models."""

    name: str
    """``model_type`` in ``config.json``, and ``general.architecture`` in GGUF unless given below."""
    class_names: tuple[str, ...]
    """Values of ``architectures`` in ``config.json``: a reward model shares the type, not these."""
    build: Callable[[Fields], ModelConfig]
    """Reader of a configuration; may raise ``ValueError`` for sizes that do not fit."""
    gguf_name: str = ""
    other_names: tuple[str, ...] = ()
    """Further names in either format."""
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Values of keys that its ``config.json`` may leave out."""


def norm_of(fields: Fields, *, less_one: bool = False) -> Norm:
    """Return the norm of the residual stream."""
    return Norm(fields.size("hidden_size"), fields.number("rms_norm_eps", 1e-6), less_one)


def attention_of(fields: Fields, rope_theta: float = 1e4, *, partial: float = 1.0, **differences: Any) -> Attention:
    """Return the usual attention, with ``differences`` to it.

    ``rope_theta`` and the rotated part of a head, ``partial``, hold unless the file has others.
    """
    heads, hidden = fields.size("num_attention_heads"), fields.size("hidden_size")
    kv_heads = fields.size("num_key_value_heads", heads)
    head_dim = fields.size("head_dim", max(hidden // heads, 1))
    rotated = ("rotary_dim",) if fields.value("rotary_dim") is not None else ()
    with fields.sizes("num_attention_heads", "num_key_value_heads", "head_dim", *rotated):
        if max(heads, kv_heads) * head_dim > MAX_WIDTH:
            raise ValueError(f"{heads} heads of {head_dim} are wider than any model's")
        usual = {
            "norm": norm_of(fields),
            "scale": head_dim**-0.5,
            "rope": rope_of(fields, head_dim, rope_theta, partial=partial),
        }
        return Attention(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, **{**usual, **differences})


def mlp_of(fields: Fields, **differences: Any) -> GatedMlp:
    """Return the usual MLP, with ``differences`` to it."""
    return GatedMlp(**{"norm": norm_of(fields), "width": fields.size("intermediate_size"), **differences})


def experts_of(
    fields: Fields,
    *,
    shared: SharedExpert | None = None,
    transposed: bool = False,
    gguf_norm: str = "ffn_norm",
    **picks: Any,
) -> Experts:
    """Return the usual experts, whose router differs by ``picks``."""
    key = next((key for key in EXPERT_KEYS if fields.value(key) is not None), EXPERT_KEYS[0])
    num_layers = fields.size("num_hidden_layers")
    with fields.sizes(key, "num_experts_per_tok", "num_hidden_layers"):
        router = Router(fields.size(key), fields.size("num_experts_per_tok"), **picks)
        if router.num_experts * num_layers > MAX_EXPERT_MATRICES:
            raise ValueError(f"{router.num_experts} experts in {num_layers} layers are more than any model has")
    width = fields.size("moe_intermediate_size")
    return Experts(norm_of(fields), router, width, shared, transposed, gguf_norm)


def sparse_layers(fields: Fields) -> list[bool]:
    """Return for each layer of a Qwen model whether it has experts."""
    num_layers, every = fields.size("num_hidden_layers"), fields.size("decoder_sparse_step", 1)
    dense = fields.value("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(i, int) for i in dense):
        raise CorruptWeightsError(fields.path, f"mlp_only_layers is {quoted(dense)}, not a list of numbers")
    return [i not in dense and (i + 1) % every == 0 for i in range(num_layers)]


def decoder_of(
    name: str,
    fields: Fields,
    blocks: Sequence[tuple[Layer, ...]],
    *,
    activation: str = "silu",
    embedding_scale: float = 1.0,
    ties_embeddings: bool = False,
    logit_cap: float = 0.0,
    draft_head: DraftHead | None = None,
    unused: tuple[str, ...] = (),
) -> ModelConfig:
    """Return the model of ``blocks``.

    ``activation`` is the one, by its name in ``config.json``, that the layers have; ``ties_embeddings``: the head is
    the embedding where the file has no key for it. Raises :class:`UnsupportedArchitectureError` for what no layer does.
    """
    path, values = fields.path, fields.values
    attentions = [layer for block in blocks for layer in block if isinstance(layer, Attention)]
    known = {NOT_WINDOWED} if len(attentions) == len(blocks) else {NOT_WINDOWED, RECURRENT}
    windows = bool(values.get("use_sliding_window") or set(fields.names("layer_types")) - known)
    if windows and not any(layer.window_tokens for layer in attentions):
        raise UnsupportedArchitectureError(f"{path}: sliding-window attention is not supported")
    if values.get("mlp_bias"):
        raise UnsupportedArchitectureError(f"{path}: biases in the MLP are not supported")
    if values.get("attn_logit_softcapping") or values.get("use_bidirectional_attention"):
        raise UnsupportedArchitectureError(f"{path}: attention with a soft cap, or both ways, is not supported")
    key = "hidden_activation" if values.get("hidden_activation") else "hidden_act"
    found = values.get(key) or activation
    if found != activation:
        raise UnsupportedArchitectureError(f"{path}: {key} {quoted(found)} is not supported")
    norm = attentions[0].norm
    vocab_size = fields.size("vocab_size")
    return ModelConfig(
        family=name,
        embedding=Embedding(vocab_size, norm.size, embedding_scale),
        blocks=tuple(blocks),
        head=Head(norm, vocab_size, fields.flag("tie_word_embeddings", ties_embeddings), logit_cap),
        draft_head=draft_head,
        unused=unused,
        context_tokens=max(
            fields.size("max_position_embeddings"), *(layer.rope.longest_tokens for layer in attentions)
        ),
    )


def kinds_of(fields: Fields, other: str = WINDOWED) -> tuple[str, ...]:
    """Return the kind of each layer, attention or ``other``; nothing where the file does not tell."""
    kinds, num_layers = fields.layer_kinds(), fields.size("num_hidden_layers")
    if kinds and (len(kinds) != num_layers or set(kinds) - {other, NOT_WINDOWED}):
        raise CorruptWeightsError(
            fields.path,
            f"{fields.key('layer_types')} does not name a known kind for each layer, and "
            f"{fields.key('num_hidden_layers')} is {num_layers}",
        )
    return kinds


def window_of(fields: Fields) -> int:
    """Return the window of attention in tokens; 0 where there is none that is shorter than the context."""
    window = fields.size("sliding_window") if fields.value("sliding_window") else 0
    return window if window < fields.size("max_position_embeddings") else 0


def blocks_of(fields: Fields, *layers: Layer) -> list[tuple[Layer, ...]]:
    """Return as many blocks of ``layers`` as the model has."""
    return [layers] * fields.size("num_hidden_layers")
