"""Published shapes of gated delta nets: their sizes, what a preflight asks for, and the kernels that packages ship."""

import dataclasses
import pathlib
from typing import Any

import pytest
import torch

from cortex.wire.node import ModelSpec
from neuron.layers.cache import MAX_DRAFTS, SequenceState
from neuron.layers.draft_head import DraftHead
from neuron.layers.shard import WHOLE, Shard
from neuron.layers.step import Linear
from neuron.models import prebuild, quantization
from neuron.models.config import read_config
from neuron.models.errors import DoesNotFitError
from neuron.models.sizing import least_bytes, plan_memory

FOLDER = pathlib.Path(__file__).parents[3] / "packaging" / "kernels"
SHAPES: dict[str, tuple[float, int, int, int]] = {
    "Qwen3.5-0.8B": (0.75, 12 << 10, 18, 16),
    "Qwen3.5-9B": (8.95, 32 << 10, 24, 32),
    "Qwen3.5-27B": (26.90, 64 << 10, 48, 48),
    "Qwen3.5-35B-A3B": (34.66, 20 << 10, 30, 32),
    "Qwen3-Next-80B-A3B": (79.67, 24 << 10, 36, 32),
}
"""Billions of parameters, bytes of a token's keys and values in bfloat16, layers with a state, their value heads."""
FORMS = [quantization.NONE, "fp8-blocks", "Q4_K"]


@pytest.mark.parametrize("name", SHAPES)
def test_sizes_are_those_of_the_model(name: str) -> None:
    billions, kv_bytes, num_states, heads = SHAPES[name]
    config = read_config(FOLDER / name)
    assert round(config.num_parameters() / 1e9, 2) == billions
    assert config.kv_bytes_per_token("bfloat16") == kv_bytes
    channels = (2 * 16 + heads) * 128
    # Float32 [H, 128, 128], the last three inputs of the convolution, and what drafts leave behind.
    each = heads * (64 << 10) + 3 * channels * 2 + MAX_DRAFTS * (channels + 2 * heads) * 2
    assert [kind.num_bytes(2) for kind in config.caches() if isinstance(kind, SequenceState)] == [each] * num_states


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_a_preflight_asks_for_what_a_load_takes(name: str, form: str) -> None:
    """Each tensor is counted as a load allocates it, on one device or several; a byte less is refused."""
    config, quant = prebuild._stored_as(read_config(FOLDER / name), form)
    # Seconds pass with the 512 experts of all layers in each form: a period of layers tells.
    period = dataclasses.replace(config, blocks=config.blocks[:4])
    config = config if form == quantization.NONE else period
    for shard in (WHOLE, Shard(1, 2)):
        assert bytes_on_meta(period, quant, shard) == quantization.weights_bytes(period, "bfloat16", quant, shard)
    spec = ModelSpec("m", name)
    needed = least_bytes(config, spec, "cuda:0")
    plan = plan_memory(config, spec, "cuda:0", needed)
    assert plan.total_bytes <= needed
    assert plan.weights_bytes == quantization.weights_bytes(config, "bfloat16", quant)
    with pytest.raises(DoesNotFitError):
        plan_memory(config, spec, "cuda:0", needed - 1)


def bytes_on_meta(config: Any, quant: str, shard: Shard) -> int:
    """Return the bytes of the tensors that a load makes."""
    weights = prebuild.weights_on_meta(config, torch.bfloat16, quant, shard)
    arrays: dict[int, int] = {}
    for layer in (weights.embedding, *weights.layers, weights.head):
        for loaded in layer.values():
            matrix = loaded.weight if isinstance(loaded, Linear) else loaded
            parts = getattr(matrix, "parts", (matrix,))
            for part in parts:
                for array in (part,) if isinstance(part, torch.Tensor) else part.arrays():
                    storage = array.untyped_storage()
                    arrays[storage._cdata] = storage.nbytes()
    return sum(arrays.values())


@pytest.mark.parametrize("name", SHAPES)
def test_kernels_are_listed_for_its_layers(name: str) -> None:
    config = read_config(FOLDER / name)
    plan = prebuild.any_plan(config, "bfloat16")
    listed = prebuild.variants(config, plan, 90)
    modules = {variant.kernel.partition(":")[0].rpartition(".")[2] for variant in listed}
    assert {"gated_delta", "causal_convolution", "gated_norm", "prefill_attention", "decode_attention"} <= modules
    assert ("moe_matmul" in modules) == ("A3B" in name)
    # A folder without weights tells of no draft head, which launches no others.
    mixer, feed_forward = config.blocks[3]
    drafting = dataclasses.replace(config, draft_head=DraftHead(mixer.norm, (mixer, feed_forward)))
    assert set(prebuild.variants(drafting, plan, 90)) == set(listed)
