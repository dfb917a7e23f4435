"""Weights from safetensors and GGUF: the same numbers from both, and errors that name the tensor."""

import dataclasses
import json
import pathlib
import re
import struct
from collections.abc import Callable, Mapping
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_blocks import stored_as
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cortex.wire.errors import ApiError
from neuron.layers.experts import Experts
from neuron.layers.parameters import Matrix, Tensor
from neuron.layers.rope import Rope
from neuron.models.config import config_from_gguf, read_config
from neuron.models.errors import CorruptWeightsError, UnsupportedQuantizationError
from neuron.models.gguf import read_header
from neuron.models.model import ModelConfig
from neuron.models.registry import FAMILIES
from neuron.models.weights import open_weights

Kind = gguf.GGMLQuantizationType


def read_all(path: pathlib.Path) -> dict[str, torch.Tensor]:
    source = open_weights(path)
    found = {}
    for name, shape in source.config.tensor_shapes().items():
        found[name] = torch.empty(shape)
        source.read_into(name, found[name])
    source.close()
    return found


def in_order(values: np.ndarray, tensor: Tensor) -> np.ndarray:
    """Return a tensor of safetensors with the rows of each head in GGUF's order."""
    size = len(tensor.gguf_order or tensor.order)
    if not size:
        return values
    heads = values.reshape(-1, size, *values.shape[1:])
    ours = heads[:, list(tensor.order or range(size))]
    stored = np.empty_like(ours)
    stored[:, list(tensor.gguf_order or range(size))] = ours
    return stored.reshape(values.shape)


def export_gguf(
    folder: pathlib.Path,
    path: pathlib.Path,
    kind: Kind,
    extra: dict[str, np.ndarray] | None = None,
    *,
    tensors_of_part: int = 0,
    kinds: Mapping[str, Kind] | None = None,
) -> None:
    """Write a safetensors checkpoint as llama.cpp's converter does, Llama's query and key rows interleaved.

    ``kinds`` are those of tensors, by GGUF name, that are not of ``kind``; ``tensors_of_part`` splits the file.
    """
    config = read_config(folder)
    name = FAMILIES[config.family].gguf_name or config.family
    attention, mlp = config.blocks[0][0], config.blocks[-1][-1]
    declared = config.tensors()
    writer = gguf.GGUFWriter(path, name, split_max_tensors=tensors_of_part)
    drafting = int(name == "glm4moe")
    writer.add_block_count(len(config.blocks) + drafting)
    writer.add_context_length(config.context_tokens)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.blocks[0][-1].width)
    writer.add_head_count(attention.num_heads)
    writer.add_head_count_kv(attention.num_kv_heads)
    writer.add_key_length(attention.head_dim)
    writer.add_value_length(attention.head_dim)
    writer.add_layer_norm_rms_eps(attention.norm.eps)
    writer.add_rope_freq_base(config.blocks[-1][0].rope.theta)
    writer.add_rope_dimension_count(attention.rope.rotary_dim)
    rope = json.loads((folder / "config.json").read_text()).get("rope_parameters") or {}
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
        writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])
    if rope.get("rope_type") == "longrope":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_attn_factors(rope["attention_factor"])
        for length in ("long", "short"):
            writer.add_tensor(f"rope_factors_{length}.weight", np.array(rope[f"{length}_factor"], np.float32))
    if attention.window_tokens:
        writer.add_sliding_window(attention.window_tokens)
    if isinstance(mlp, Experts):
        writer.add_expert_count(mlp.router.num_experts)
        writer.add_expert_used_count(mlp.router.choices)
        writer.add_expert_feed_forward_length(mlp.width)
    if name == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(mlp.shared.width)
    if name == "glm4moe":
        raw = json.loads((folder / "config.json").read_text())
        writer.add_leading_dense_block_count(raw["first_k_dense_replace"])
        writer.add_expert_shared_count(raw["n_shared_experts"])
        writer.add_expert_weights_scale(raw["routed_scaling_factor"])
        writer.add_expert_weights_norm(raw["norm_topk_prob"])
        writer.add_expert_group_count(raw["n_group"])
        writer.add_expert_group_used_count(raw["topk_group"])
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_nextn_predict_layers(1)
    experts: dict[str, dict[int, np.ndarray]] = {}
    matrices = (each for parameters in config.parameters() for each in parameters.values() if isinstance(each, Matrix))
    fused = {matrix.fused.name: matrix.fused.gguf for matrix in matrices if matrix.fused}
    for tensor_name, tensor in load_file(folder / "model.safetensors").items():
        if tensor_name in fused:
            stored = kind if tensor.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else Kind.F32
            packed = gguf.quants.quantize(tensor.numpy(), stored)
            writer.add_tensor(fused[tensor_name], packed, raw_dtype=stored)
            continue
        values = tensor.numpy() + declared[tensor_name].less_one
        if ".experts." in tensor_name:
            stem, _, number = declared[tensor_name].gguf.rpartition(".")
            experts.setdefault(stem, {})[int(number)] = values
            continue
        values = in_order(values, declared[tensor_name])
        values = values[0] if tensor_name.endswith("shared_expert_gate.weight") else values
        own = (kinds or {}).get(declared[tensor_name].gguf, kind)
        packs = values.ndim == 2 and values.shape[1] % gguf.GGML_QUANT_SIZES[own][0] == 0
        stored = own if packs else Kind.F32
        packed = stored_as(values, stored)
        writer.add_tensor(declared[tensor_name].gguf, packed, raw_dtype=stored)
    for stem, parts in experts.items():
        values = np.stack([parts[number] for number in range(len(parts))])
        stored = kind if values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else Kind.F32
        writer.add_tensor(stem + ".weight", stored_as(values, stored), raw_dtype=stored)
    if drafting:
        writer.add_tensor(f"blk.{len(config.blocks)}.nextn.enorm.weight", np.ones(config.hidden_size, np.float32))
    for tensor_name, values in (extra or {}).items():
        writer.add_tensor(tensor_name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


MINISTRAL_ROPE = {
    "rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16,
    "beta_fast": 4.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.5, "llama_4_scaling_beta": 0.25,
}  # fmt: skip


PHI_ROPE = {
    "rope_type": "longrope", "rope_theta": 100.0, "partial_rotary_factor": 0.75, "attention_factor": 1.25,
    "original_max_position_embeddings": 64, "short_factor": [1.0] * 6, "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 4.0],
}  # fmt: skip


@pytest.fixture(
    scope="module",
    params=[
        "llama",
        "qwen3",
        "llama-bias",
        "qwen2",
        "qwen3_moe",
        "gemma3",
        "ministral3",
        "phi3",
        "smollm3",
        "qwen2_moe",
        "glm4_moe",
    ],
)
def checkpoint(request: pytest.FixtureRequest, make_checkpoint: Callable[..., pathlib.Path]) -> pathlib.Path:
    kind, _, bias = request.param.partition("-")
    more = {
        "qwen3_moe": {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
        "gemma3": {
            "sliding_window": 20,
            "num_hidden_layers": 6,
            "query_pre_attn_scalar": 16,
            "tie_word_embeddings": True,
        },
        "ministral3": {"rope_parameters": MINISTRAL_ROPE},
        "phi3": {"rope_parameters": PHI_ROPE, "original_max_position_embeddings": 64, "sliding_window": 100},
        "qwen2_moe": {
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
            "num_hidden_layers": 2,
        },
        "glm4_moe": {
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "n_shared_experts": 2,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.5,
            "attention_bias": True,
            "use_qk_norm": True,
            "num_hidden_layers": 2,
        },
        "smollm3": {"num_hidden_layers": 4, "tie_word_embeddings": True},
    }
    changes = {"attention_bias": bool(bias)} if kind in {"llama", "qwen3", "qwen3_moe"} else {}
    return make_checkpoint(
        kind, **more.get(kind, {}), **changes, hidden_size=64, intermediate_size=96, num_attention_heads=4, head_dim=16
    )


# Tensors that the exporter above does not write, or GGUF rounds.
UNREAD = {"eos_ids": (), "bos_id": None, "tensor_kinds": {}}
KINDS = (Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0)
TOLERANCE = {Kind.F32: 0.0, Kind.F16: 1e-3, Kind.BF16: 1e-2, Kind.Q8_0: 1e-2, Kind.Q5_0: 0.07, Kind.Q5_1: 0.07}


def without_eps(config: ModelConfig) -> str:
    """Return what both formats hold; GGUF rounds the constant of norms to float32."""
    return re.sub(r"eps=[^,)]*", "", repr(dataclasses.replace(config, **UNREAD)))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_gguf_and_safetensors_hold_equal_tensors(checkpoint: pathlib.Path, tmp_path: pathlib.Path, kind: Kind) -> None:
    path = tmp_path / "model.gguf"
    export_gguf(checkpoint, path, kind)
    expected = read_all(checkpoint)
    config, stored = read_config(checkpoint), load_file(checkpoint / "model.safetensors")
    declared = config.tensors()
    for matrix in (each for parameters in config.parameters() for each in parameters.values()):
        if isinstance(matrix, Matrix) and matrix.fused and matrix.fused.name in stored:
            parts = stored.pop(matrix.fused.name).split([tensor.shape[0] for tensor in matrix.tensors])
            stored |= {tensor.name: part for tensor, part in zip(matrix.tensors, parts, strict=True)}
    assert without_eps(read_config(path)) == without_eps(read_config(checkpoint))
    for name, tensor in read_all(path).items():
        order = declared[name].order
        own = stored[name] if not order else stored[name].view(-1, len(order), *stored[name].shape[1:])[:, list(order)]
        assert torch.equal(expected[name], own.view_as(stored[name]) + declared[name].less_one)
        error = (tensor - expected[name]).abs().max() / expected[name].abs().max()
        assert error <= TOLERANCE.get(kind, 0.15), name


def test_a_model_generates_the_same_from_either_format(
    checkpoint: pathlib.Path, tmp_path: pathlib.Path, harness: Callable[..., Any]
) -> None:
    """Its order of rows, rotary embedding and routers are those of transformers (test_parity)."""
    export_gguf(checkpoint, tmp_path / "model.gguf", Kind.F32)
    found = []
    for path in (checkpoint, tmp_path / "model.gguf"):
        driver = harness()
        driver.load(path)
        found.append(driver.output_alone(list(range(3, 80)), 24))
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", [Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K], ids=lambda kind: kind.name)
def test_k_quants_equal_the_library(
    make_checkpoint: Callable[..., pathlib.Path], tmp_path: pathlib.Path, kind: Kind
) -> None:
    """The library does not quantise to these, so the blocks are random; pieces must join without a seam."""
    folder = make_checkpoint(
        "llama", hidden_size=256, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1
    )
    config = read_config(folder)
    path = tmp_path / "k.gguf"
    random = np.random.default_rng(5)
    expected = {}
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_block_count, 1), (writer.add_context_length, 512), (writer.add_embedding_length, 256),
        (writer.add_feed_forward_length, 77), (writer.add_head_count, 4), (writer.add_head_count_kv, 2),
    ):  # fmt: skip
        add(value)
    for name, shape in config.tensor_shapes().items():
        quantised = len(shape) == 2 and shape[1] == 256
        stored = kind if quantised else Kind.F32
        if quantised:
            block, nbytes = gguf.GGML_QUANT_SIZES[kind]
            # Exponents of the float16 scales kept small, so that all numbers are finite.
            data = random.integers(0, 0x3C, (shape[0], shape[1] // block * nbytes), dtype=np.uint8)
        else:
            data = random.random(shape, np.float32)
        values = gguf.quants.dequantize(data, stored)
        if "q_proj" in name or "k_proj" in name:
            values = values.reshape(-1, 32, 2, 256).swapaxes(1, 2).reshape(shape)
        expected[name] = values
        writer.add_tensor(config.tensors()[name].gguf, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name, tensor in read_all(path).items():
        assert np.array_equal(tensor.numpy(), expected[name]), name


def test_a_sharded_checkpoint_is_one(make_checkpoint: Callable[..., pathlib.Path]) -> None:
    whole, sharded = make_checkpoint("llama"), make_checkpoint("llama", shard="50KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    expected = read_all(whole)
    for name, tensor in read_all(sharded).items():
        assert torch.equal(tensor, expected[name])


def test_llama3_scaling_in_gguf_is_that_of_the_configuration(
    make_checkpoint: Callable[..., pathlib.Path], tmp_path: pathlib.Path
) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    folder = make_checkpoint("llama", rope_parameters={**rope, "original_max_position_embeddings": 64})
    scaled = read_config(folder)
    expected = scaled.blocks[0][0].rope.table()
    plain = Rope(500.0, 8).table()
    factors = np.array([a / b for a, b in zip(plain[:4], expected, strict=False)], np.float32)
    path = tmp_path / "scaled.gguf"
    export_gguf(folder, path, Kind.F32, {"rope_freqs.weight": factors})
    found = read_config(path)
    assert found.blocks[0][0].rope.table() == pytest.approx(expected)
    assert max(factors) == 8
    assert min(factors) == 1
    assert read_all(path).keys() == read_all(folder).keys()
    header = read_header(path)
    path.unlink()
    # As for a file on a server, of which only the header is read.
    assert config_from_gguf(path, header).tensors() == found.tensors()


# ------------------------------------------------------------------ refused files


def copy_of(
    folder: pathlib.Path, target: pathlib.Path, change: Callable[[dict[str, torch.Tensor]], object]
) -> pathlib.Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_text((folder / "config.json").read_text())
    return target


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "lacks model.norm.weight"),
        (lambda tensors: tensors.update(more=torch.zeros(1)), "unexpected more"),
        (
            lambda tensors: tensors.update({"lm_head.weight": torch.zeros(131, 49)}),
            r"lm_head.weight has shape \[131, 49\]",
        ),
    ],
)
def test_tensors_that_do_not_match_are_named(
    tiny_llama: pathlib.Path, tmp_path: pathlib.Path, change: Callable[[dict[str, torch.Tensor]], object], reason: str
) -> None:
    with pytest.raises(CorruptWeightsError, match=reason):
        open_weights(copy_of(tiny_llama, tmp_path, change))


def test_constants_that_exporters_store_are_left_alone(tiny_llama: pathlib.Path, tmp_path: pathlib.Path) -> None:
    stored = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    open_weights(copy_of(tiny_llama, tmp_path, lambda tensors: tensors.update(stored)))


def test_integers_are_no_weights(tiny_llama: pathlib.Path, tmp_path: pathlib.Path) -> None:
    norm = {"model.norm.weight": torch.zeros(48, dtype=torch.int8)}
    source = open_weights(copy_of(tiny_llama, tmp_path, lambda tensors: tensors.update(norm)))
    with pytest.raises(UnsupportedQuantizationError, match=r"model\.norm\.weight is stored as I8"):
        source.read_into("model.norm.weight", torch.empty(48))


@pytest.mark.parametrize(
    "index",
    ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../model.safetensors"}}', '{"weight_map": {"a": ".."}}',
     '{"weight_map": {"a": "b"}}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "model.safetensors"}}'],
)  # fmt: skip
def test_a_broken_index(tiny_llama: pathlib.Path, tmp_path: pathlib.Path, index: str) -> None:
    copy_of(tiny_llama, tmp_path, lambda tensors: None)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CorruptWeightsError):
        open_weights(tmp_path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    position=st.integers(0, 4000), replacement=st.binary(min_size=1, max_size=8), cut=st.none() | st.integers(0, 5000)
)
def test_a_fuzzed_safetensors_file_is_read_or_refused(
    tiny_llama: pathlib.Path, tmp_path: pathlib.Path, position: int, replacement: bytes, cut: int | None
) -> None:
    data = bytearray((tiny_llama / "model.safetensors").read_bytes())
    data[position : position + len(replacement)] = replacement
    (tmp_path / "model.safetensors").write_bytes(bytes(data[:cut]))
    (tmp_path / "config.json").write_text((tiny_llama / "config.json").read_text())
    try:
        read_all(tmp_path)
    except ApiError as error:
        assert error.status == 422


def test_a_header_beyond_the_file_is_corrupt(tiny_llama: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text((tiny_llama / "config.json").read_text())
    header = json.dumps(
        {"model.norm.weight": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
    ).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CorruptWeightsError):
        open_weights(tmp_path)
