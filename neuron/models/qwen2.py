"""Qwen2 and Qwen2.5: Llama's decoder with biases on queries, keys and values, and nowhere else."""

from typing import Final

from neuron.models.family import Family, attention_of, blocks_of, decoder_of, mlp_of
from neuron.models.fields import Fields
from neuron.models.model import ModelConfig


def build(fields: Fields) -> ModelConfig:
    """Return the model of a configuration."""
    return decoder_of("qwen2", fields, blocks_of(fields, attention_of(fields, qkv_bias=True), mlp_of(fields)))


FAMILY: Final = Family("qwen2", ("Qwen2ForCausalLM",), build)
