"""Qwen3 dense: Llama's decoder with every query and key head normalised before the rotary embedding.

The head dimension (128) is independent of the hidden size, so the query projection is not square.
"""

from typing import Any, Final

from neuron.layers.attention import Attention
from neuron.models.family import Family, attention_of, blocks_of, decoder_of, mlp_of
from neuron.models.fields import Fields
from neuron.models.model import ModelConfig


def qwen3_attention(fields: Fields, **differences: Any) -> Attention:
    """Return the attention of Qwen3, dense or not."""
    has_bias = fields.flag("attention_bias")
    return attention_of(fields, qk_norm=True, qkv_bias=has_bias, output_bias=has_bias, **differences)


def build(fields: Fields) -> ModelConfig:
    """Return the model of a configuration."""
    return decoder_of("qwen3", fields, blocks_of(fields, qwen3_attention(fields), mlp_of(fields)))


FAMILY: Final = Family("qwen3", ("Qwen3ForCausalLM",), build, other_names=("qwen3_vl_text", "qwen3vl"))
