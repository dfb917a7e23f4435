"""Models of gated delta nets as GGUF, as llama.cpp's converter writes them.

Norms have the one added and decays are negative numbers; value heads of Qwen3.5 are tiled (head h has key head
``h % K``), inputs that Qwen3-Next joins are taken apart, experts are stacked, and the head that drafts tokens is a
block behind the others.
"""

import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf_blocks import stored_as
from safetensors.torch import load_file

Array = np.ndarray[Any, Any]
ARCHITECTURES = {"qwen3_5_text": "qwen35", "qwen3_5_moe_text": "qwen35moe", "qwen3_next": "qwen3next"}
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm",
    "linear_attn.in_proj_qkv": "attn_qkv", "linear_attn.in_proj_z": "attn_gate", "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.in_proj_b": "ssm_beta", "linear_attn.in_proj_ba": "ssm_ba", "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.norm": "ssm_norm", "linear_attn.out_proj": "ssm_out", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp", "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mtp.fc": "nextn.eh_proj", "mtp.pre_fc_norm_embedding": "nextn.enorm", "mtp.pre_fc_norm_hidden": "nextn.hnorm",
    "mtp.norm": "nextn.shared_head_norm",
}  # fmt: skip
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
PLAIN = ("ffn_gate_inp", "ffn_gate_inp_shexp", "ssm_alpha", "ssm_beta", "ssm_ba", "ssm_conv1d")
"""Matrices that stay in float32."""
TOKEN_TYPES = {"normal": 1, "special": 3, "added": 4}


def write_gguf(
    folder: pathlib.Path,
    path: pathlib.Path,
    kind: Kind | Callable[[str], Kind] = Kind.F32,
    *,
    tensors_of_part: int = 0,
    expanded: bool = False,
) -> pathlib.Path:
    """Write the model of a folder, and its tokenizer if it has one.

    Its matrices are of a ``kind``, or of one by their names; with ``expanded`` they hold the numbers of that kind as
    float32. ``tensors_of_part`` splits the file.
    """
    values = json.loads((folder / "config.json").read_text())
    tensors = {name: tensor.float().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}
    num_drafting = int("mtp.fc.weight" in tensors)
    writer = gguf.GGUFWriter(path, ARCHITECTURES[values["model_type"]], split_max_tensors=tensors_of_part)
    _add_settings(writer, values, num_drafting)
    if (folder / "tokenizer.json").exists():
        _add_tokenizer(writer, folder)
    for name, array in _gguf_tensors(values, tensors):
        packs = array.ndim > 1 and not name.removesuffix(".weight").endswith(PLAIN)
        own = Kind.F32 if not packs else kind if isinstance(kind, Kind) else kind(name)
        stored = stored_as(np.ascontiguousarray(array), own)
        if expanded:
            stored, own = gguf.quants.dequantize(stored, own), Kind.F32
        writer.add_tensor(name, stored, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_settings(writer: gguf.GGUFWriter, values: dict[str, Any], num_drafting: int) -> None:
    writer.add_block_count(values["num_hidden_layers"] + num_drafting)
    if num_drafting:
        writer.add_nextn_predict_layers(num_drafting)
    writer.add_context_length(values["max_position_embeddings"])
    writer.add_embedding_length(values["hidden_size"])
    writer.add_feed_forward_length(values.get("intermediate_size", 0))
    writer.add_head_count(values["num_attention_heads"])
    writer.add_head_count_kv(values["num_key_value_heads"])
    writer.add_key_length(values["head_dim"])
    writer.add_value_length(values["head_dim"])
    writer.add_layer_norm_rms_eps(values["rms_norm_eps"])
    writer.add_rope_freq_base(values["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(values["head_dim"] // 4)
    writer.add_full_attention_interval(values["layer_types"].index("full_attention") + 1)
    writer.add_ssm_conv_kernel(values["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(values["linear_key_head_dim"])
    writer.add_ssm_group_count(values["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(values["linear_num_value_heads"])
    writer.add_ssm_inner_size(values["linear_num_value_heads"] * values["linear_value_head_dim"])
    if "num_experts" in values:
        writer.add_expert_count(values["num_experts"])
        writer.add_expert_weights_norm(values.get("norm_topk_prob", True))
        writer.add_expert_used_count(values["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(values["moe_intermediate_size"])
        writer.add_expert_shared_feed_forward_length(values["shared_expert_intermediate_size"])


def _add_tokenizer(writer: gguf.GGUFWriter, folder: pathlib.Path) -> None:
    values = json.loads((folder / "tokenizer.json").read_text())
    kinds = {
        **dict.fromkeys(values["model"]["vocab"], "normal"),
        **{token["content"]: "special" if token["special"] else "added" for token in values["added_tokens"]},
    }
    ids = {**values["model"]["vocab"], **{token["content"]: token["id"] for token in values["added_tokens"]}}
    tokens = sorted(ids, key=ids.__getitem__)
    config = json.loads((folder / "config.json").read_text())
    padding = [f"[PAD{number}]" for number in range(len(tokens), config["vocab_size"])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen35")
    writer.add_token_list([*tokens, *padding])
    writer.add_token_types([*(TOKEN_TYPES[kinds[token]] for token in tokens), *(5 for _ in padding)])
    writer.add_token_merges([" ".join(pair) for pair in values["model"]["merges"]])
    writer.add_eos_token_id(ids["<|im_end|>"])
    writer.add_add_bos_token(False)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())


def _gguf_tensors(values: dict[str, Any], tensors: dict[str, Array]) -> Iterator[tuple[str, Array]]:
    """Yield the names and contents of a file's tensors."""
    key_heads, heads = values["linear_num_key_heads"], values["linear_num_value_heads"]
    key_width, value_dim = key_heads * values["linear_key_head_dim"], values["linear_value_head_dim"]
    tiled = values["model_type"] != "qwen3_next"
    order = np.arange(heads)
    if tiled:
        order = (order % key_heads) * (heads // key_heads) + order // key_heads
    rows = np.arange(heads * value_dim).reshape(heads, value_dim)[order].ravel()
    behind = np.concatenate((np.arange(2 * key_width), 2 * key_width + rows))
    orders = {"in_proj_qkv": behind, "conv1d": behind, "in_proj_z": rows}
    orders |= dict.fromkeys(("in_proj_a", "in_proj_b", "A_log", "dt_bias"), order)
    experts: dict[str, dict[int, Array]] = {}
    for name, tensor in tensors.items():
        block, stem = _place(name.removesuffix(".weight"), values["num_hidden_layers"])
        adds_one = (stem.endswith("norm") or "norm_" in stem) and stem != "linear_attn.norm"
        array = tensor + 1 if adds_one else tensor
        if stem in WHOLE:
            yield WHOLE[stem] + ".weight", array
            continue
        last = stem.removeprefix("linear_attn.")
        if last in orders:
            array = array[orders[last]]
        elif last == "out_proj":
            array = array[:, rows]
        match stem.split("."):
            case ["mlp", "experts", "gate_up_proj"]:
                for part, half in zip(("gate", "up"), np.split(array, 2, axis=1), strict=True):
                    yield f"blk.{block}.ffn_{part}_exps.weight", np.ascontiguousarray(half)
            case ["mlp", "experts", "down_proj"]:
                yield f"blk.{block}.ffn_down_exps.weight", array
            case ["mlp", "experts", number, which]:
                experts.setdefault(f"blk.{block}.ffn_{which.removesuffix('_proj')}_exps.weight", {})[int(number)] = (
                    array
                )
            case ["linear_attn", "A_log"]:
                yield f"blk.{block}.ssm_a", -np.exp(array)
            case ["linear_attn", "dt_bias"]:
                yield f"blk.{block}.ssm_dt.bias", array
            case ["linear_attn", "conv1d"]:
                yield f"blk.{block}.ssm_conv1d.weight", array[:, 0]
            case ["mlp", "shared_expert_gate"]:
                yield f"blk.{block}.{NAMES[stem]}.weight", array[0]
            case ["linear_attn", "in_proj_qkvz"]:
                of_head = array.reshape(key_heads, -1, array.shape[1])
                widths = np.cumsum([*[key_width // key_heads] * 2, heads // key_heads * value_dim])
                *parts, z = (part.reshape(-1, array.shape[1]) for part in np.split(of_head, widths, axis=1))
                yield f"blk.{block}.attn_qkv.weight", np.concatenate(parts)
                yield f"blk.{block}.attn_gate.weight", z
            case [*_, "bias"]:
                yield f"blk.{block}.{NAMES[stem.removesuffix('.bias')]}.bias", array
            case _:
                yield f"blk.{block}.{NAMES[stem]}.weight", array
    for own, parts_of in experts.items():
        yield own, np.stack([parts_of[number] for number in range(len(parts_of))])


def _place(name: str, num_layers: int) -> tuple[int, str]:
    """Return the number of a tensor's block and its name there; of a tensor outside of blocks the whole name."""
    if name.startswith("mtp."):
        return num_layers, name.removeprefix("mtp.layers.0.")
    if not name.startswith("model.layers."):
        return -1, name
    number, _, stem = name.removeprefix("model.layers.").partition(".")
    return int(number), stem
