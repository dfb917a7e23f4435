"""Qwen3 mixture of experts: Qwen3 whose MLP is the sum of the few experts that a router picks for each token.

30B-A3B has 128 experts of 768 and picks 8. Layers without experts, which no released checkpoint has, are refused.
"""

from typing import Final

from neuron.layers.experts import Experts
from neuron.models.errors import UnsupportedArchitectureError
from neuron.models.family import Family, blocks_of, decoder_of, norm_of
from neuron.models.fields import Fields, GgufFields
from neuron.models.model import ModelConfig
from neuron.models.qwen3 import qwen3_attention

WRAPPED: Final = "qwen3_vl_moe_text"
"""Type of the language model within Qwen3-VL, whose files have the experts of a layer as one tensor."""
MAX_EXPERT_MATRICES: Final = 1 << 17
"""Bound on the experts of all layers together."""


def build(fields: Fields) -> ModelConfig:
    """Return the model of a configuration."""
    if fields.values.get("mlp_only_layers") or fields.size("decoder_sparse_step", 1) != 1:
        raise UnsupportedArchitectureError(f"{fields.path}: layers without experts among others are not supported")
    is_gguf, is_wrapped = isinstance(fields, GgufFields), fields.value("model_type") == WRAPPED
    experts = Experts(
        norm_of(fields),
        fields.size("num_experts" if is_gguf or "num_experts" in fields.values else "num_local_experts"),
        fields.size("num_experts_per_tok"),
        fields.size("moe_intermediate_size"),
        normalise=is_gguf or is_wrapped or fields.flag("norm_topk_prob"),
        transposed=is_wrapped,
    )
    blocks = blocks_of(fields, qwen3_attention(fields), experts)
    if experts.num_experts * len(blocks) > MAX_EXPERT_MATRICES:
        raise ValueError(f"{experts.num_experts} experts in {len(blocks)} layers are more than any model has")
    return decoder_of("qwen3_moe", fields, blocks)


FAMILY: Final = Family("qwen3_moe", ("Qwen3MoeForCausalLM",), build, "qwen3moe", other_names=(WRAPPED, "qwen3vlmoe"))
