"""Phi-3, Phi-4 and Phi-4-mini: Llama's decoder, with queries, keys and values, and gate and up, as one tensor each.

Long contexts are by longrope; Phi-4-mini rotates three quarters of each head, Phi-3-mini has a window in all layers.
"""

from typing import Final

from neuron.models.family import Family, attention_of, blocks_of, decoder_of, mlp_of, window_of
from neuron.models.fields import Fields
from neuron.models.model import ModelConfig


def build(fields: Fields) -> ModelConfig:
    """Return the model of a configuration."""
    attention = attention_of(fields, window_tokens=window_of(fields))
    return decoder_of("phi3", fields, blocks_of(fields, attention, mlp_of(fields)))


FAMILY: Final = Family("phi3", ("Phi3ForCausalLM",), build)
