"""SmolLM3: Llama's decoder, in which every fourth layer is told no position (arXiv:2501.18795)."""

import dataclasses
from typing import Final

from neuron.models.errors import CorruptWeightsError
from neuron.models.family import Family, attention_of, decoder_of, mlp_of
from neuron.models.fields import Fields
from neuron.models.files import quoted
from neuron.models.model import ModelConfig


def build(fields: Fields) -> ModelConfig:
    """Return the model of a configuration."""
    has_bias = fields.flag("attention_bias")
    rotated = attention_of(fields, rope_theta=2e6, gguf_interleaves=True, qkv_bias=has_bias, output_bias=has_bias)
    # GGUF interleaves the rows of these layers too; without a rotation the order of queries and keys does not matter.
    unrotated = dataclasses.replace(rotated, rope=dataclasses.replace(rotated.rope, scaling=None, rotary_dim=0))
    mlp = mlp_of(fields)
    blocks = [(rotated if rotates else unrotated, mlp) for rotates in _layers(fields)]
    return decoder_of("smollm3", fields, blocks, ties_embeddings=True)


def _layers(fields: Fields) -> list[int]:
    """Return 1 for each layer that rotates, 0 for others; GGUF has no key for the pattern."""
    num_layers, found = fields.size("num_hidden_layers"), fields.value("no_rope_layers")
    if found is None:
        every = fields.size("no_rope_layer_interval", 4)
        return [int((i + 1) % every != 0) for i in range(num_layers)]
    if not isinstance(found, list) or len(found) < num_layers or not all(each in (0, 1) for each in found):
        raise CorruptWeightsError(
            fields.path, f"no_rope_layers is {quoted(found)}, not 0 or 1 for each of {num_layers} layers"
        )
    return found[:num_layers]


FAMILY: Final = Family("smollm3", ("SmolLM3ForCausalLM",), build)
