"""Qwen2 and Qwen2.5: Llama's decoder with biases on queries, keys and values, and nowhere else."""

from typing import Final

from neuron.models.architecture import Architecture

QWEN2: Final = Architecture(
    name="qwen2",
    class_names=("Qwen2ForCausalLM",),
    qkv_bias=True,
    output_bias_follows_qkv=False,
)
