"""The recipes of CONTRIBUTING.md, followed for a family, a layer and a storage format that no model has."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from neuron.formats import SUPER_BLOCK, Quantization
from neuron.formats.format import Layout, Parts, StoredFormat, planes
from neuron.formats.matrix import QuantizedMatrix
from neuron.formats.registry import FORMATS, STORED_FORMATS
from neuron.layers.layer import Weights
from neuron.layers.parameters import Parameters, Tensor, Vector
from neuron.layers.shard import WHOLE, Shard
from neuron.layers.step import Step
from neuron.models import quantization
from neuron.models.config import read_config
from neuron.models.family import Family, attention_of, blocks_of, decoder_of, mlp_of
from neuron.models.fields import Fields
from neuron.models.model import ModelConfig
from neuron.models.registry import FAMILIES
from neuron.models.weights import open_weights

from .test_quantization import WIDE, loaded, run
from .test_weights import export_gguf

CONFIG = {
    "model_type": "shifted", "architectures": ["ShiftedForCausalLM"], "vocab_size": 64, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "eos_token_id": 0,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Shift:
    """Layer that adds a vector to the residual."""

    size: int

    def parameters(self, shard: Shard = WHOLE) -> Parameters:
        return {"shift": Vector((Tensor("shift.weight", "shift.weight", (self.size,)),))}

    def cache(self, shard: Shard = WHOLE) -> None: ...

    def workspace(self, shard: Shard = WHOLE) -> int:
        return 0

    def forward(self, step: Step, weights: Weights, residual: torch.Tensor, cache: Any) -> None:
        residual.add_(weights["shift"])


def build(fields: Fields) -> ModelConfig:
    attention, mlp = attention_of(fields, qk_norm=True), mlp_of(fields)
    return decoder_of("shifted", fields, blocks_of(fields, attention, Shift(mlp.norm.size), mlp))


@pytest.fixture
def shifted(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> pathlib.Path:
    monkeypatch.setitem(FAMILIES, "shifted", Family("shifted", ("ShiftedForCausalLM",), build))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(3)
    shapes = read_config(tmp_path).tensor_shapes()
    tensors = {name: torch.randn(shape) * (1.0 if len(shape) == 1 else 0.3) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_a_family_with_a_layer_of_its_own_loads_and_generates(
    shifted: pathlib.Path, harness: Callable[..., Any]
) -> None:
    driver = harness()
    driver.load(shifted)
    first = driver.output_alone([5, 6, 7], 12)
    assert len(first) == 12
    again = harness()
    tensors = load_file(shifted / "model.safetensors")
    for name in (name for name in tensors if "shift" in name):
        tensors[name] += 5
    save_file(tensors, shifted / "model.safetensors")
    again.load(shifted)
    assert again.output_alone([5, 6, 7], 12) != first, "the layer is computed"
    assert driver.model().plan.weights_bytes > 0


def test_a_checkpoint_lacks_no_tensor_of_the_new_layer(shifted: pathlib.Path, harness: Callable[..., Any]) -> None:
    tensors = load_file(shifted / "model.safetensors")
    del tensors["model.layers.1.shift.weight"]
    save_file(tensors, shifted / "model.safetensors")
    answer = harness().load(shifted)
    assert "lacks model.layers.1.shift.weight" in answer.error.message


def unpack_tq2_0(blocks: torch.Tensor) -> Parts:
    """Return the parts of blocks of two runs of 32 bytes, with a quant of 2 bits of each 32 elements, and a scale."""
    return Parts(planes(blocks[:, :64].reshape(-1, 2, 32), 2) - 1, blocks[:, 64:])


def test_a_storage_format_loads_and_multiplies(
    make_checkpoint: Callable[..., pathlib.Path], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout(Quantization.INT8, SUPER_BLOCK, "float16")
    format = StoredFormat("TQ2_0", layout, unpack_tq2_0)
    monkeypatch.setitem(STORED_FORMATS, "TQ2_0", format)
    monkeypatch.setitem(FORMATS, "TQ2_0", format)
    path = tmp_path / "tq2_0.gguf"
    export_gguf(make_checkpoint(**WIDE | {"hidden_size": 256}), path, gguf.GGMLQuantizationType.TQ2_0)
    source = open_weights(path)
    kept, plain = loaded(source, quant=quantization.STORED), loaded(source)
    assert isinstance(kept.layers[0]["qkv"].weight, QuantizedMatrix)
    for found, expected in zip(run(kept, source.config), run(plain, source.config), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    kept_bytes = quantization.weights_bytes(source.config, "bfloat16", quantization.STORED)
    assert kept_bytes < 0.7 * quantization.weights_bytes(source.config, "bfloat16", quantization.NONE)
    source.close()
