"""Qwen3 mixture of experts: Qwen3 whose MLP is the sum of the few experts that a router picks for each token.

30B-A3B has 128 experts of 768 and picks 8. Some layers may have an ordinary MLP.
"""

from typing import Final

from neuron.models.family import Family, decoder_of, experts_of, mlp_of, sparse_layers
from neuron.models.fields import Fields, GgufFields
from neuron.models.model import ModelConfig
from neuron.models.qwen3 import qwen3_attention

WRAPPED: Final = "qwen3_vl_moe_text"
"""Type of the language model within Qwen3-VL, whose files have the experts of a layer as one tensor."""


def build(fields: Fields) -> ModelConfig:
    """Return the model of a configuration."""
    is_wrapped = fields.value("model_type") == WRAPPED
    normalise = is_wrapped or isinstance(fields, GgufFields) or fields.flag("norm_topk_prob")
    experts = experts_of(fields, normalise=normalise, transposed=is_wrapped)
    is_sparse = sparse_layers(fields)
    # Released models have no width for it.
    mlp = experts if all(is_sparse) else mlp_of(fields)
    attention = qwen3_attention(fields)
    return decoder_of("qwen3_moe", fields, [(attention, experts if sparse else mlp) for sparse in is_sparse])


FAMILY: Final = Family("qwen3_moe", ("Qwen3MoeForCausalLM",), build, "qwen3moe", other_names=(WRAPPED, "qwen3vlmoe"))
