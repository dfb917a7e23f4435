"""Llama 2 and 3, SmolLM2, and the many checkpoints of the same shape.

Grouped-query attention, SwiGLU, RMSNorm; long contexts by the ``llama3`` scaling of the rotary embedding.
"""

from typing import Final

from neuron.models.family import Family, attention_of, blocks_of, decoder_of, mlp_of
from neuron.models.fields import Fields
from neuron.models.model import ModelConfig


def build(fields: Fields) -> ModelConfig:
    """Return the model of a configuration."""
    has_bias = fields.flag("attention_bias")
    attention = attention_of(fields, qkv_bias=has_bias, output_bias=has_bias, gguf_interleaves=True)
    return decoder_of("llama", fields, blocks_of(fields, attention, mlp_of(fields)))


FAMILY: Final = Family("llama", ("LlamaForCausalLM",), build)
