"""Qwen2 mixture of experts: Qwen2 whose MLP is a few picked experts and one that all tokens share, with a gate.

Some layers may have an ordinary MLP.
"""

from typing import Final

from neuron.layers.experts import SharedExpert
from neuron.models.family import Family, attention_of, decoder_of, experts_of, mlp_of, sparse_layers
from neuron.models.fields import Fields, GgufFields
from neuron.models.model import ModelConfig


def build(fields: Fields) -> ModelConfig:
    """Return the model of a configuration."""
    shared = SharedExpert(fields.size("shared_expert_intermediate_size"), "mlp.shared_expert", gated=True)
    # GGUF has no key for it: the shares of released models are not normalised.
    normalise = not isinstance(fields, GgufFields) and fields.flag("norm_topk_prob")
    experts = experts_of(fields, normalise=normalise, shared=shared)
    attention, mlp = attention_of(fields, qkv_bias=fields.flag("qkv_bias", True)), mlp_of(fields)
    return decoder_of(
        "qwen2_moe", fields, [(attention, experts if is_sparse else mlp) for is_sparse in sparse_layers(fields)]
    )


FAMILY: Final = Family("qwen2_moe", ("Qwen2MoeForCausalLM",), build, gguf_name="qwen2moe")
