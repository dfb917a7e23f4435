"""Gemma 3, its text models: norms on both sides of attention and MLP, and five layers with a window for each without.

Layers with a window attend to the last 512 or 1,024 tokens, with their own rotary base. Embeddings are scaled by the
square root of the hidden size, norms multiply by one more than their weight (GGUF has the one added), GELU is the tanh
form. Gemma 2's soft cap of attention is not supported.
"""

from typing import Final

from neuron.models.architecture import Architecture

GEMMA3: Final = Architecture(
    name="gemma3_text",
    gguf_architecture="gemma3",
    class_names=("Gemma3ForCausalLM",),
    qk_norm=True,
    sandwich_norms=True,
    norm_adds_one=True,
    scales_embedding=True,
    activation="gelu_pytorch_tanh",
    windowed=True,
    ties_embeddings=True,
)
