"""Tensors that a file has within others: each is a run of the file's bytes, in either format."""

import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_files import GLM, PHI, model_of
from safetensors.torch import load_file, save_file

from neuron.models.errors import CorruptWeightsError
from neuron.models.gguf import TensorInfo, TensorKind
from neuron.models.stored import by_tensor, unstacked
from neuron.models.weights import open_weights

FILE = pathlib.Path("model.gguf")
PLACES = ["model_type", "architectures"]


def info(name: str, *shape: int, kind: TensorKind = TensorKind.F32, offset: int = 1000) -> TensorInfo:
    num_bytes = 4
    for size in shape:
        num_bytes *= size
    return TensorInfo(FILE, name, shape, kind, offset, num_bytes)


def without(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in PLACES}


def test_a_stack_of_gate_and_up_is_cut_into_its_experts() -> None:
    config = model_of("glm4_moe", **{**without(GLM), "num_hidden_layers": 2})
    whole = info("blk.1.ffn_gate_up_exps.weight", 4, 16, 8)
    down = info("blk.1.ffn_down_exps.weight", 4, 8, 8, offset=9000)
    found = by_tensor(config, unstacked((whole, down)), FILE, gguf=True)
    up = found["model.layers.1.mlp.experts.2.up_proj.weight"]
    assert (up.shape, up.offset, up.nbytes) == ((8, 8), 1000 + 4 * 8 * (2 * 16 + 8), 4 * 8 * 8)
    assert found["model.layers.1.mlp.experts.3.down_proj.weight"].offset == 9000 + 4 * 8 * 8 * 3
    assert not {whole.name, down.name} & found.keys()


def test_queries_keys_and_values_are_runs_of_one_tensor() -> None:
    config = model_of("phi3", **without(PHI))
    found = by_tensor(config, {"blk.0.attn_qkv.weight": info("blk.0.attn_qkv.weight", 16, 8)}, FILE, gguf=True)
    starts = [found[f"model.layers.0.self_attn.{each}_proj.weight"].offset for each in "qkv"]
    assert starts == [1000, 1000 + 4 * 8 * 8, 1000 + 4 * 8 * 12]


def test_a_tensor_with_other_rows_is_named() -> None:
    config = model_of("phi3", **without(PHI))
    for shape in ((15, 8), (16, 9), (2, 8, 9), (16,)):
        wrong = {"blk.0.attn_qkv.weight": info("blk.0.attn_qkv.weight", *shape)}
        with pytest.raises(CorruptWeightsError, match=r"attn_qkv.weight has shape .* says 16 rows of 8"):
            by_tensor(config, wrong, FILE, gguf=True)


def test_a_matrix_of_one_row_may_be_a_vector() -> None:
    config = model_of("qwen2_moe", **{**without(GLM), "num_experts": 4, "shared_expert_intermediate_size": 8})
    share = info("blk.0.ffn_gate_inp_shexp.weight", 8)
    assert by_tensor(config, {share.name: share}, FILE, gguf=True)[
        "model.layers.0.mlp.shared_expert_gate.weight"
    ].shape == (1, 8)


def test_the_layer_that_drafts_is_left_in_its_file(
    make_checkpoint: Callable[..., pathlib.Path], tmp_path: pathlib.Path
) -> None:
    sizes = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 28, "num_hidden_layers": 2}
    folder = make_checkpoint("glm4_moe", **sizes)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    for number, is_known in ((2, True), (3, False)):
        tensors = load_file(folder / "model.safetensors")
        tensors[f"model.layers.{number}.eh_proj.weight"] = torch.zeros(48, 96)
        save_file(tensors, tmp_path / "model.safetensors")
        if is_known:
            open_weights(tmp_path).close()
        else:
            with pytest.raises(CorruptWeightsError, match=r"has unexpected model\.layers\.3\.eh_proj"):
                open_weights(tmp_path)
