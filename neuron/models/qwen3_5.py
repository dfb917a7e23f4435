"""Qwen3.5, 3.6 and 3.8, dense or with experts: gated delta nets, and every fourth layer gated attention.

A quarter of each head of attention is rotated, as text alone needs it, and norms multiply by one more than their weight
(GGUF has the one added). Each expert layer has a gated expert that all tokens share. A head drafts tokens by one more
layer of attention; of several only the first is used. The encoder of images is left in the file.
"""

import dataclasses
from typing import Any, Final

from neuron.layers.draft_head import DraftHead
from neuron.layers.experts import Experts, SharedExpert
from neuron.layers.gated_delta import GatedDelta
from neuron.layers.layer import Layer
from neuron.layers.mlp import GatedMlp
from neuron.layers.norm import Norm
from neuron.models.errors import UnsupportedArchitectureError
from neuron.models.family import Family, attention_of, decoder_of, experts_of, kinds_of, mlp_of, norm_of
from neuron.models.fields import MAX_WIDTH, NOT_WINDOWED, RECURRENT, Fields, GgufFields
from neuron.models.files import quoted
from neuron.models.model import ModelConfig

GGUF_NORM: Final = "post_attention_norm"
"""Name of the norm of the MLP or experts in GGUF."""


def build(fields: Fields) -> ModelConfig:
    """Return the dense model of a configuration."""
    return hybrid("qwen3_5", fields, (dense_mlp(fields),) * num_layers(fields), tiled=isinstance(fields, GgufFields))


def build_moe(fields: Fields) -> ModelConfig:
    """Return the model with experts of a configuration."""
    experts = gated_experts(fields, normalise=True)
    return hybrid("qwen3_5_moe", fields, (experts,) * num_layers(fields), tiled=isinstance(fields, GgufFields))


def dense_mlp(fields: Fields) -> GatedMlp:
    """Return the MLP of a layer without experts."""
    return mlp_of(fields, norm=norm_of(fields, less_one=True), gguf_norm=GGUF_NORM)


def gated_experts(fields: Fields, *, normalise: bool) -> Experts:
    """Return the experts of a layer, with the one that all tokens share."""
    shared = SharedExpert(fields.size("shared_expert_intermediate_size"), "mlp.shared_expert", gated=True)
    experts = experts_of(fields, shared=shared, gguf_norm=GGUF_NORM, normalise=normalise)
    return dataclasses.replace(experts, norm=norm_of(fields, less_one=True))


def num_layers(fields: Fields) -> int:
    """Return the number of layers without the heads that draft tokens, which GGUF counts."""
    found = fields.size("num_hidden_layers")
    if not isinstance(fields, GgufFields):
        return found
    with fields.sizes("num_hidden_layers", "num_nextn_predict_layers"):
        if found <= _num_drafting(fields):
            raise ValueError("no layer is left beside those that draft tokens")
    return found - _num_drafting(fields)


def hybrid(name: str, fields: Fields, feed_forward: tuple[Layer, ...], **differences: Any) -> ModelConfig:
    """Return a model of gated delta nets, with ``differences``, and gated attention, each before its feed-forward."""
    if not fields.flag("attn_output_gate", True):
        raise UnsupportedArchitectureError(
            f"{fields.path}: attn_output_gate is false, and attention without a gate is not supported"
        )
    found = fields.value("output_gate_type")
    if found not in (None, "swish", "silu"):
        raise UnsupportedArchitectureError(f"{fields.path}: output_gate_type {quoted(found)} is not supported")
    norm, has_bias = norm_of(fields, less_one=True), fields.flag("attention_bias")
    attention = attention_of(
        fields, partial=0.25, norm=norm, qk_norm=True, gated=True, qkv_bias=has_bias, output_bias=has_bias
    )
    delta = _delta_of(fields, norm, **differences)
    count, every = len(feed_forward), fields.size("full_attention_interval", 4)
    kinds = kinds_of(fields, RECURRENT) or [RECURRENT if (i + 1) % every else NOT_WINDOWED for i in range(count)]
    if NOT_WINDOWED not in kinds[:count]:
        raise UnsupportedArchitectureError(
            f"{fields.path}: none of {count} layers ({fields.key('num_hidden_layers')} less "
            f"{fields.key('num_nextn_predict_layers')}) has attention by {fields.key('layer_types')} or a "
            f"full_attention_interval of {every}, which is not supported"
        )
    mixers = [delta if kind == RECURRENT else attention for kind in kinds[:count]]
    num_drafting = _num_drafting(fields)
    drafting = range(count, count + num_drafting)
    return decoder_of(
        name,
        fields,
        list(zip(mixers, feed_forward, strict=True)),
        draft_head=DraftHead(norm, (attention, feed_forward[-1])) if num_drafting else None,
        unused=("mtp.", *(f"blk.{number}." for number in drafting)),
    )


def _delta_of(fields: Fields, norm: Norm, **differences: Any) -> GatedDelta:
    """Return the gated delta net; GGUF has the width of all values in place of a head's."""
    width_key = "linear_value_width" if isinstance(fields, GgufFields) else "linear_value_head_dim"
    of_heads = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim")
    names = (*of_heads, width_key, "linear_conv_kernel_dim")
    key_heads, heads, key_dim, width, conv_width = (fields.size(name) for name in names)
    with fields.sizes(*names):
        value_dim, rest = divmod(width, heads) if width_key == "linear_value_width" else (width, 0)
        if rest:
            raise ValueError(f"{width} values cannot be shared out to {heads} heads")
        if max(key_heads * key_dim, heads * value_dim, conv_width) > MAX_WIDTH:
            raise ValueError(f"{heads} heads of {key_dim} and {value_dim} are wider than any model's")
        return GatedDelta(norm, key_heads, heads, key_dim, value_dim, conv_width, **differences)


def _num_drafting(fields: Fields) -> int:
    # Of safetensors, the tensors tell.
    if isinstance(fields, GgufFields):
        return fields.size("num_nextn_predict_layers", 0, least=0)
    return fields.size("mtp_num_hidden_layers", 1, least=0)


FAMILY: Final = Family(
    "qwen3_5_text",
    ("Qwen3_5ForCausalLM",),
    build,
    gguf_name="qwen35",
    other_names=("qwen3_5", "qwen3_8", "qwen3_8_text"),
)
MOE_FAMILY: Final = Family(
    "qwen3_5_moe_text",
    ("Qwen3_5MoeForCausalLM",),
    build_moe,
    gguf_name="qwen35moe",
    other_names=("qwen3_5_moe", "qwen3_8_moe", "qwen3_8_moe_text"),
)
