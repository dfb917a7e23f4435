"""GLM 4.5, 4.6 and 4.7: experts behind a few ordinary layers, picked by sigmoids that a bias corrects, and one for all.

Half of each head is rotated. The layer that drafts tokens, behind the last one, is left in the file. The router is that
of DeepSeek-V3 (arXiv:2412.19437).
"""

from typing import Final

from neuron.layers.experts import SharedExpert
from neuron.models.family import Family, attention_of, decoder_of, experts_of, mlp_of
from neuron.models.fields import Fields, GgufFields
from neuron.models.model import ModelConfig

GGUF_NORM: Final = "post_attention_norm"


def build(fields: Fields) -> ModelConfig:
    """Return the model of a configuration."""
    num_drafting = fields.size("num_nextn_predict_layers", 1, least=0)
    num_layers = fields.size("num_hidden_layers")
    if isinstance(fields, GgufFields):
        num_drafting = fields.size("num_nextn_predict_layers", 0, least=0)
        num_layers -= num_drafting
    width = fields.size("moe_intermediate_size")
    experts = experts_of(
        fields,
        sigmoid=True,
        corrected=True,
        normalise=fields.flag("norm_topk_prob", True),
        num_groups=fields.size("n_group", 1),
        top_groups=fields.size("topk_group", 1),
        scale=fields.number("routed_scaling_factor", 1.0),
        shared=SharedExpert(width * fields.size("n_shared_experts", 1), "mlp.shared_experts"),
        gguf_norm=GGUF_NORM,
    )
    attention = attention_of(
        fields, partial=0.5, qkv_bias=fields.flag("attention_bias"), qk_norm=fields.flag("use_qk_norm")
    )
    mlp, num_dense = mlp_of(fields, gguf_norm=GGUF_NORM), fields.size("first_k_dense_replace", 1, least=0)
    blocks = [(attention, mlp if i < num_dense else experts) for i in range(num_layers)]
    drafting = range(num_layers, num_layers + num_drafting)
    unused = [name for i in drafting for name in (f"model.layers.{i}.", f"blk.{i}.")]
    return decoder_of("glm4_moe", fields, blocks, unused=tuple(unused))


FAMILY: Final = Family("glm4_moe", ("Glm4MoeForCausalLM",), build, gguf_name="glm4moe")
