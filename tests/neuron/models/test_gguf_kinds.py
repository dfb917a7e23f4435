"""Every kind of GGUF's blocks: kept packed, expanded, and in the C kernels' formats, one model."""

import itertools
import pathlib
from collections.abc import Callable
from typing import Any

import gguf
import pytest
import torch

from cortex.wire.node import ModelSpec
from neuron.formats.matrix import StackedMatrix
from neuron.formats.registry import STORED_FORMATS
from neuron.models import quantization
from neuron.models.config import read_config
from neuron.models.expansion import expansions
from neuron.models.gguf import UNREADABLE, TensorKind
from neuron.models.sizing import plan_memory
from neuron.models.weights import open_weights

from .test_quantization import allocated, loaded
from .test_schemes import native_logits, prefill
from .test_weights import export_gguf

KINDS = [kind for kind in TensorKind if kind.block > 1 and kind not in UNREADABLE]
SIZES = {
    "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 64
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_logits_are_those_of_the_dequantised_model(
    make_checkpoint: Callable[..., pathlib.Path], tmp_path: pathlib.Path, harness: Callable[..., Any], kind: TensorKind
) -> None:
    path = tmp_path / "model.gguf"
    export_gguf(make_checkpoint("llama", **SIZES), path, gguf.GGMLQuantizationType(kind))
    source = open_weights(path)
    expected = prefill(loaded(source), source.config)[-1]
    assert expected.isfinite().all()
    kept = loaded(source, quant=quantization.STORED)
    source.close()
    assert (prefill(kept, source.config)[-1] - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (native_logits(harness(), path, "float32") - expected).abs().max() < 1e-3 * expected.abs().max()
    found = native_logits(harness(), path, "bfloat16")
    assert torch.cosine_similarity(found, expected, 0) > 0.98


def test_each_tensor_of_a_mixed_file_stays_in_its_own_form(
    make_checkpoint: Callable[..., pathlib.Path], tmp_path: pathlib.Path, harness: Callable[..., Any]
) -> None:
    """As in files whose kinds follow the importance of a tensor: every projection of a layer in another."""
    path, folder = tmp_path / "model.gguf", make_checkpoint("llama", **SIZES | {"num_hidden_layers": 4})
    names = [tensor.gguf for tensor in read_config(folder).tensors().values() if len(tensor.shape) == 2]
    kinds = dict(zip(names, itertools.cycle(gguf.GGMLQuantizationType(kind) for kind in KINDS), strict=False))
    export_gguf(folder, path, gguf.GGMLQuantizationType.F16, kinds=kinds)
    source = open_weights(path)
    assert set(KINDS) <= set(source.config.tensor_kinds.values())
    expected = prefill(loaded(source), source.config)[-1]
    kept = loaded(source, quant=quantization.STORED)
    assert isinstance(kept.layers[0]["qkv"].weight, StackedMatrix)
    assert allocated(kept) == quantization.weights_bytes(source.config, "float32", quantization.STORED)
    source.close()
    assert (prefill(kept, source.config)[-1] - expected).abs().max() < 1e-4 * expected.abs().max()
    assert torch.cosine_similarity(native_logits(harness(), path, "bfloat16"), expected, 0) > 0.98


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_bytes_beyond_the_files_are_told(
    make_checkpoint: Callable[..., pathlib.Path], tmp_path: pathlib.Path, kind: TensorKind
) -> None:
    path = tmp_path / "model.gguf"
    export_gguf(make_checkpoint("llama", **SIZES), path, gguf.GGMLQuantizationType(kind))
    config, block, block_bytes = read_config(path), kind.block, kind.block_bytes
    elements = sum(shape[0] * shape[1] for shape in config.tensor_shapes().values() if len(shape) == 2)
    gpu, cpu = (plan_memory(config, ModelSpec("m", str(path)), device, 1 << 32) for device in ("cuda:0", "cpu:0"))
    told = expansions(config, gpu.dtype, gpu.quant, native=False)
    if kind.name in STORED_FORMATS:
        layout = STORED_FORMATS[kind.name].device_layout
        more = elements // 256 * layout.row_bytes(256) - elements * block_bytes // block
        assert gpu.expanded_bytes == (more if told else 0)
    else:
        assert gpu.expanded_bytes == elements * (2 - block_bytes / block)
        assert str(told[0]).startswith(f"{told[0].num_weights} weights in {kind.name} are expanded to bfloat16: ")
    kept = {"Q4_0", "Q4_1", "Q4_K", "IQ4_NL", "IQ4_XS", "MXFP4", "Q8_0"}
    assert bool(cpu.expanded_bytes) == (kind.name not in kept), "kinds that the C kernels have a form for"
