"""Gemma 3, its text models: norms on both sides of attention and MLP, and five layers with a window for each without.

Layers with a window attend to the last 512 or 1,024 tokens, with their own rotary base. Embeddings are scaled by the
square root of the hidden size, norms multiply by one more than their weight (GGUF has the one added), GELU is the tanh
form. Gemma 2's soft cap of attention is not supported.
"""

import dataclasses
from typing import Final

from neuron.models.errors import UnsupportedRopeError
from neuron.models.family import ACTIVATIONS, Family, attention_of, decoder_of, kinds_of, mlp_of, norm_of
from neuron.models.fields import NOT_WINDOWED, WINDOWED, Fields, GgufFields
from neuron.models.model import ModelConfig
from neuron.models.rope import rope_of

ACTIVATION: Final = "gelu_pytorch_tanh"


def build(fields: Fields) -> ModelConfig:
    """Return the model of a configuration."""
    is_gguf = isinstance(fields, GgufFields)
    num_layers, norm = fields.size("num_hidden_layers"), norm_of(fields, less_one=True)
    whole = attention_of(fields, rope_theta=1e4 if is_gguf else 1e6, norm=norm, qk_norm=True, out_norm=True)
    if is_gguf:
        # As in llama.cpp: only the 27B model, of 62 layers, scales its queries by hidden size over heads.
        scalar = norm.size / whole.num_heads if num_layers == 62 else whole.head_dim
    else:
        scalar = fields.number("query_pre_attn_scalar", 256)
    whole = dataclasses.replace(whole, scale=scalar**-0.5)
    window_rope = rope_of(fields, whole.head_dim, kind=WINDOWED)
    if window_rope.scaling is not None:
        raise UnsupportedRopeError(f"{fields.path}: rope scaling in layers with a window is not supported")
    windowed = dataclasses.replace(whole, rope=window_rope, window_tokens=fields.size("sliding_window"))
    mlp = mlp_of(fields, norm=norm, activation=ACTIVATIONS[ACTIVATION], out_norm=True)
    return decoder_of(
        "gemma3_text",
        fields,
        [(windowed if kind == WINDOWED else whole, mlp) for kind in _kinds(fields, num_layers)],
        activation=ACTIVATION,
        embedding_scale=norm.size**0.5,
        ties_embeddings=True,
        logit_cap=fields.number("final_logit_softcapping", 1) if fields.values.get("final_logit_softcapping") else 0.0,
    )


def _kinds(fields: Fields, num_layers: int) -> tuple[str, ...]:
    """Return the kind of each layer. By convention every sixth has no window, unless the file has another pattern."""
    if kinds := kinds_of(fields):
        return kinds
    every = fields.size("sliding_window_pattern", 6)
    return tuple(WINDOWED if (i + 1) % every else NOT_WINDOWED for i in range(num_layers))


DEFAULTS: Final = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
}
"""Values of Gemma3TextConfig that the published files of the 4B model leave out."""
FAMILY: Final = Family("gemma3_text", ("Gemma3ForCausalLM",), build, gguf_name="gemma3", defaults=DEFAULTS)
