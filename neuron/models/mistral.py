"""Mistral, Ministral, Mistral Small, Magistral and Devstral: Llama's decoder, with heads that may not fill the width.

The first models have a window in all layers, Ministral 8B in some. Ministral 3 and Devstral 2 extend their context by
YaRN, and their queries grow with the position.
"""

import dataclasses
from typing import Final

from neuron.layers.attention import QueryGrowth
from neuron.models.family import Family, attention_of, decoder_of, kinds_of, mlp_of, window_of
from neuron.models.fields import WINDOWED, Fields
from neuron.models.model import ModelConfig


def build(fields: Fields) -> ModelConfig:
    """Return the model of a configuration."""
    scaling = fields.rope_fields()
    growth = QueryGrowth()
    if scaling.value("llama_4_scaling_beta"):
        context_tokens = scaling.size("original_max_position_embeddings")
        growth = QueryGrowth(scaling.number("llama_4_scaling_beta", most=1e3), context_tokens)
    whole = attention_of(fields, gguf_interleaves=True, query_growth=growth)
    windowed = dataclasses.replace(whole, window_tokens=window_of(fields))
    kinds = kinds_of(fields) or (WINDOWED,) * fields.size("num_hidden_layers")
    mlp = mlp_of(fields)
    return decoder_of("mistral", fields, [(windowed if kind == WINDOWED else whole, mlp) for kind in kinds])


CLASS_NAMES: Final = ("MistralForCausalLM", "MinistralForCausalLM", "Ministral3ForCausalLM")
FAMILY: Final = Family("mistral", CLASS_NAMES, build, "mistral3", other_names=("ministral", "ministral3"))
