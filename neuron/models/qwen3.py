"""Qwen3 dense: Llama's decoder with every query and key head normalised before the rotary embedding.

The head dimension (128) is independent of the hidden size, so the query projection is not square.
"""

from typing import Final

from neuron.models.architecture import Architecture

QWEN3: Final = Architecture(
    name="qwen3",
    class_names=("Qwen3ForCausalLM",),
    qk_norm=True,
)
