"""What sets one architecture apart from the next: a value, not a class of its own.

All architectures here are pre-norm decoders with rotary attention and a gated MLP, and one forward pass,
:mod:`neuron.models.decoder`, runs them all. What differs is in :class:`Architecture`; the tensors' names differ by file
format only.
"""

import dataclasses
from typing import Final


@dataclasses.dataclass(frozen=True, slots=True)
class Architecture:
    """One architecture as ``config.json`` and GGUF files call it, and what it does differently."""

    name: str
    """``model_type`` in ``config.json`` and ``general.architecture`` in GGUF."""
    class_names: tuple[str, ...]
    """The ``architectures`` in ``config.json`` that are this one: a reward model shares its type, not these."""
    qk_norm: bool = False
    """Each query and key head is RMS-normalised before the rotary embedding."""
    output_bias_follows_qkv: bool = True
    """Whether ``attention_bias`` puts a bias on the attention's output too."""
    gguf_interleaves_heads: bool = False
    """GGUF stores the rows of each query and key head as pairs (2i, 2i+1), not as halves (i, i + D/2)."""


TENSOR_NAMES: Final = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
"""Names in safetensors checkpoints, and what GGUF calls them."""

LAYER_TENSOR_NAMES: Final = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.o_proj.bias": "attn_output.bias",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
"""The same within one layer: ``model.layers.N.`` there, ``blk.N.`` in GGUF."""


def gguf_name(name: str) -> str:
    """Return what GGUF calls the tensor that a safetensors checkpoint calls ``name``."""
    if name in TENSOR_NAMES:
        return TENSOR_NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{LAYER_TENSOR_NAMES[rest]}"
