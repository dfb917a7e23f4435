"""Qwen3-Next: the layers of Qwen3.5 with experts, whose gated delta nets have their projections in one matrix.

Some layers may have an ordinary MLP. GGUF keeps the order of the heads, and divides one of the matrices.
"""

from typing import Final

from neuron.models.family import Family, sparse_layers
from neuron.models.fields import Fields, GgufFields
from neuron.models.model import ModelConfig
from neuron.models.qwen3_5 import dense_mlp, gated_experts, hybrid, num_layers


def build(fields: Fields) -> ModelConfig:
    """Return the model of a configuration."""
    is_gguf = isinstance(fields, GgufFields)
    experts = gated_experts(fields, normalise=fields.flag("norm_topk_prob", True))
    are_sparse = sparse_layers(fields)[: num_layers(fields)]
    mlp = experts if all(are_sparse) else dense_mlp(fields)
    feed_forward = tuple(experts if is_sparse else mlp for is_sparse in are_sparse)
    return hybrid("qwen3_next", fields, feed_forward, joins_inputs=not is_gguf, joins_gates=True)


FAMILY: Final = Family("qwen3_next", ("Qwen3NextForCausalLM",), build, gguf_name="qwen3next")
