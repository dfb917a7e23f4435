"""Small random models of gated delta nets and gated attention, written by transformers, that remember for long.

As transformers starts them, a state forgets within a token, and its loss would not show.
"""

import itertools
import pathlib
from collections.abc import Callable
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from neuron.layers.cache import SequenceState
from neuron.models.decoder import Decoder

CONFIG: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 77, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "linear_num_key_heads": 2,
    "linear_num_value_heads": 6, "linear_key_head_dim": 16, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5": ("Qwen3_5", {}),
    "small": (
        "Qwen3_5",
        {
            "num_hidden_layers": 3,
            "linear_num_key_heads": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
    ),
    "qwen3_5_tied": ("Qwen3_5", {"linear_num_value_heads": 2, "tie_word_embeddings": True, "attention_bias": True}),
    "qwen3_5_moe": ("Qwen3_5Moe", EXPERTS),
    "qwen3_next": ("Qwen3Next", {**EXPERTS, "mlp_only_layers": [1], "norm_topk_prob": False}),
}
"""Class of each kind of model, and its differences."""

TRAINED: dict[str, pathlib.Path] = {
    kind: pathlib.Path(__file__).parents[1] / "data" / kind for kind in ("qwen3_5", "qwen3_5_moe")
}
"""Folders of models that ``train_hybrid.py`` has trained: chat with reasoning, a head that drafts tokens."""


def make_model(kind: str, folder: pathlib.Path, *, with_draft_head: bool = False, **sizes: Any) -> pathlib.Path:
    """Write a model of a kind, with other ``sizes`` where given, to ``folder``, and return this.

    ``with_draft_head``: with a random head that drafts tokens, as published files have it.
    """
    name, changes = MODELS[kind]
    values = {**CONFIG, **changes, **sizes}
    if "Moe" in name:
        del values["intermediate_size"]
    config_name = name + ("Config" if name == "Qwen3Next" else "TextConfig")
    torch.manual_seed(5)
    model = getattr(transformers, name + "ForCausalLM")(getattr(transformers, config_name)(**values))
    for parameter_name, parameter in model.named_parameters():
        remember(parameter_name, parameter.data)
    model.save_pretrained(folder)
    if with_draft_head:
        path = folder / "model.safetensors"
        save_file({**load_file(path), **draft_head(model)}, path, {"format": "pt"})
    return folder


def draft_head(model: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a random head, whose layer is one of attention with the feed-forward of the model's."""
    config = model.config
    values = {**config.to_dict(), "num_hidden_layers": 1, "layer_types": ["full_attention"], "mlp_only_layers": []}
    names = "norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"
    found = {f"mtp.{name}.weight": torch.empty(config.hidden_size) for name in names}
    found["mtp.fc.weight"] = torch.empty(config.hidden_size, 2 * config.hidden_size)
    for name, tensor in type(model)(type(config)(**values)).state_dict().items():
        if name.startswith("model.layers."):
            found[name.replace("model.", "mtp.")] = tensor
    for name, tensor in found.items():
        remember(name, tensor)
    return {name: tensor.clone().contiguous() for name, tensor in found.items()}


def remember(name: str, values: torch.Tensor) -> None:
    """Start a parameter so that states matter to the logits for many tokens."""
    match name.rpartition("layers.")[2].partition(".")[2] or name:
        case "linear_attn.A_log":
            values.uniform_(0.001, 0.1).log_()
        case "linear_attn.dt_bias":
            values.uniform_(-3, 0)
        case "linear_attn.conv1d.weight":
            values.normal_(std=0.5)
        case "linear_attn.norm.weight":
            values.uniform_(0.5, 1.5)
        case "mlp.gate.weight" | "mlp.shared_expert_gate.weight":
            values.normal_(std=0.3)
        case _ if "norm" in name or name.endswith("bias"):
            values.normal_(std=0.3)
        case _:
            values.normal_(std=0.16)


def forgetting(tensor: int) -> Callable[..., torch.Tensor]:
    """Return :meth:`Decoder.hidden` that zeroes a tensor of each state, by its number, before the sixth step."""
    hidden, steps = Decoder.hidden, itertools.count()

    def forgetful(self: Decoder, token_ids: torch.Tensor, batches: Any, caches: Any) -> torch.Tensor:
        if next(steps) == 5:
            for kind, cache in zip(self.config.caches(), caches, strict=True):
                if isinstance(kind, SequenceState):
                    cache[tensor].zero_()
        return hidden(self, token_ids, batches, caches)

    return forgetful
