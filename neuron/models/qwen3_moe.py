"""Qwen3 mixture of experts: Qwen3 whose MLP is the sum of the few experts that a router picks for each token.

30B-A3B has 128 experts of 768 and picks 8. Layers without experts, which no released checkpoint has, are refused.
"""

from typing import Final

from neuron.models.architecture import Architecture

QWEN3_MOE: Final = Architecture(
    name="qwen3_moe",
    gguf_architecture="qwen3moe",
    class_names=("Qwen3MoeForCausalLM",),
    qk_norm=True,
    has_experts=True,
)
