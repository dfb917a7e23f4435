"""Llama 2 and 3, SmolLM2, and the many checkpoints of the same shape.

Grouped-query attention, SwiGLU, RMSNorm; long contexts by the ``llama3`` scaling of the rotary embedding.
"""

from typing import Final

from neuron.models.architecture import Architecture

LLAMA: Final = Architecture(
    name="llama",
    class_names=("LlamaForCausalLM",),
    gguf_interleaves_heads=True,
)
