"""Differences between architectures, as values of :class:`Architecture`.

All architectures are pre-norm decoders with rotary attention and a gated MLP, and one forward pass,
:mod:`neuron.models.decoder`, runs them all. Tensor names differ by file format only.
"""

import dataclasses
from typing import Final


@dataclasses.dataclass(frozen=True, slots=True)
class Architecture:
    """Architecture: its names in ``config.json`` and GGUF files, and its differences."""

    name: str
    """``model_type`` in ``config.json``, and ``general.architecture`` in GGUF unless given below."""
    class_names: tuple[str, ...]
    """Values of ``architectures`` in ``config.json``: a reward model shares the type, not these."""
    qk_norm: bool = False
    """Whether each query and key head is RMS-normalised before the rotary embedding."""
    output_bias_follows_qkv: bool = True
    """Whether ``attention_bias`` means a bias of the attention's output too."""
    gguf_interleaves_heads: bool = False
    """Whether GGUF stores the rows of each query and key head as pairs (2i, 2i+1), not as halves (i, i + D/2)."""
    gguf_architecture: str = ""
    qkv_bias: bool = False
    """Whether queries, keys and values have biases, regardless of ``attention_bias``."""
    has_experts: bool = False
    """Whether the MLP is a router and experts."""
    sandwich_norms: bool = False
    """Whether the outputs of attention and MLP are normalised too, before the residual."""
    norm_adds_one: bool = False
    """Whether norm weights in safetensors are stored less one."""
    scales_embedding: bool = False
    """Whether embeddings are multiplied by the square root of the hidden size."""
    activation: str = "silu"
    """Activation of the gate, by its name in ``config.json``: ``silu`` or ``gelu_pytorch_tanh``."""
    windowed: bool = False
    """Whether some layers attend to a window of the last tokens only, with their own rotary base."""
    ties_embeddings: bool = False
    """Whether the head is the embedding where ``config.json`` has no key for it."""


TENSOR_NAMES: Final = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
"""GGUF names of tensors, by their names in safetensors checkpoints."""

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
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
"""GGUF names within a layer, by safetensors names: ``blk.N.`` for ``model.layers.N.``."""


SANDWICH_TENSOR_NAMES: Final = {
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
}
"""Names of norms with sandwich norms, where ``post_attention_layernorm`` has another meaning."""


def gguf_name(name: str, architecture: Architecture | None = None) -> str:
    """Return the GGUF name of the tensor ``name`` of a safetensors checkpoint.

    GGUF has one tensor for a layer's experts; expert 7 of ``ffn_up_exps`` is ``ffn_up_exps.7`` here.
    """
    if name in TENSOR_NAMES:
        return TENSOR_NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    if rest.startswith("mlp.experts."):
        _, _, expert, which, _ = rest.split(".")
        return f"blk.{layer}.ffn_{which.removesuffix('_proj')}_exps.{expert}"
    if architecture is not None and architecture.sandwich_norms and rest in SANDWICH_TENSOR_NAMES:
        return f"blk.{layer}.{SANDWICH_TENSOR_NAMES[rest]}"
    return f"blk.{layer}.{LAYER_TENSOR_NAMES[rest]}"
