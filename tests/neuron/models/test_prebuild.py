"""The list of a model's kernels, which is made without Triton and without a GPU."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from model_files import model_of

from neuron.formats.registry import FORMATS
from neuron.layers.shard import Shard
from neuron.layers.step import Linear
from neuron.models import decoder, prebuild
from neuron.models.model import ModelConfig
from neuron.models.parameter_reader import some_rows
from neuron.models.prebuild import any_plan, variants
from neuron.triton_kernels.launch import Variant, recording, target_for
from neuron.triton_kernels.operations import KERNELS


def config(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288,
        "rope_theta": 1e6, "tie_word_embeddings": False, "max_position_embeddings": 40960, **changes,
    }  # fmt: skip
    return model_of(values.pop("model_type"), **values)


def test_a_step_of_decodes_takes_five_kernels_a_layer() -> None:
    names = [v.kernel.partition(":")[2] for v in variants(config(), any_plan(config(), "bfloat16"), 90)]
    first = ["_rotary_kernel", "_gemv_kernel", "_decode_attention_kernel", "_gemv_kernel", "_gemv_kernel"]
    assert names[:5] == first


MODELS = {
    "llama": {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "model_type": "llama"},
    "gemma3": {
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "model_type": "gemma3",
        "num_hidden_layers": 6, "sliding_window": 512, "final_logit_softcapping": 30.0,
    },
    "qwen3_moe": {
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "model_type": "qwen3_moe",
        "num_hidden_layers": 1, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256,
    },
    "qwen3_next": {
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "model_type": "qwen3_next",
        "num_hidden_layers": 4, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256,
        "shared_expert_intermediate_size": 256, "linear_num_key_heads": 4, "linear_num_value_heads": 8,
        "linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_conv_kernel_dim": 4,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "quant", "capability", "most"),
    [
        *(("llama", "none", 80, 30), ("llama", "int4", 90, 30), ("gemma3", "none", 90, 40)),
        *(("qwen3_moe", "int8", 90, 40), ("qwen3_next", "none", 90, 60)),
    ],
)
def test_no_number_of_rows_needs_a_variant_that_is_not_listed(
    name: str, quant: str, capability: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = config(hidden_size=576, intermediate_size=1536, **MODELS[name])
    plan = any_plan(model, "bfloat16", quant)
    listed = variants(model, plan, capability)
    # Every number about which a launcher may choose, and some of the many between.
    monkeypatch.setattr(prebuild, "STEPS", (*range(1, 70), *range(70, 300, 11), *range(250, 262)))
    assert set(variants(model, plan, capability)) == set(listed)
    assert len(listed) < most


def test_a_shard_adds_to_the_residual_after_the_sum() -> None:
    model = config(hidden_size=576, intermediate_size=1536, **MODELS["llama"])
    plan = any_plan(model, "bfloat16")
    alone, part = (variants(model, plan, 90, in_group=in_group) for in_group in (False, True))

    def adds(listed: tuple[Variant, ...]) -> set[str]:
        return {v.kernel for v in listed if "residual" in [parameter.name for parameter in v.parameters]}

    assert len(adds(alone)) == 2
    assert not adds(part)


@pytest.mark.parametrize("vocab_size", [151936, 50001])
@pytest.mark.parametrize("form", ["none", "Q8_0"])
def test_a_shard_of_a_tied_head_launches_listed_variants(form: str, vocab_size: int) -> None:
    """The list is made of shapes; a launch also looks where tensors begin, and a part of a table is a view of it."""
    shapes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 1, **MODELS["llama"]}
    model, quant = prebuild._stored_as(config(vocab_size=vocab_size, tie_word_embeddings=True, **shapes), form)
    plan = any_plan(model, "bfloat16", quant)
    whole = (vocab_size, model.hidden_size)
    layout = None if form == "none" else FORMATS[form].layout(model.hidden_size)
    table = torch.zeros(whole, dtype=torch.bfloat16) if layout is None else layout.empty(*whole, torch.device("cpu"))
    for shard in (Shard(rank, 3) for rank in range(3)):
        _, weights = prebuild._distinct_layers(model, torch.bfloat16, quant, shard)
        head = {**weights.head, "matrix": Linear(some_rows(table, shard.vocabulary(vocab_size)), None)}
        weights = dataclasses.replace(weights, head=head)
        with recording(target_for(90)) as recorded:
            for rows in (1, 40, plan.sampled_rows):
                hidden = torch.zeros((rows, model.hidden_size), dtype=torch.bfloat16)
                decoder.Decoder(model, weights, KERNELS).logits(hidden)
        assert shapes_of(recorded) <= shapes_of(variants(model, plan, 90, shard=shard)), f"rank {shard.rank}"


def shapes_of(found: Iterable[Variant]) -> set[Any]:
    """Return the variants that were launched, without earlier ones."""
    return {(v.kernel, v.parameters, frozenset(v.constants) - {("PDL", True), ("PDL", False)}) for v in found}


def test_a_shard_whose_columns_cut_a_block_lists_them_as_they_are_loaded() -> None:
    """Heads 1 and 2 of 6, of 128 columns each: their run begins within a block, though it is as long as one."""
    shapes = {
        "num_attention_heads": 6,
        "num_key_value_heads": 1,
        "head_dim": 128,
        "hidden_size": 768,
        "intermediate_size": 2048,
    }
    model, quant = prebuild._stored_as(config(model_type="llama", num_hidden_layers=1, **shapes), "Q4_K")
    listed = variants(model, any_plan(model, "bfloat16", quant), 90, shard=Shard(1, 4))
    assert "_gemv_kernel" in {v.kernel.partition(":")[2] for v in listed}


def test_drafts_may_take_more_logits_than_there_are_sequences() -> None:
    model = config(hidden_size=576, intermediate_size=1536, **MODELS["llama"])
    plan = dataclasses.replace(any_plan(model, "bfloat16"), sampled_rows=200, max_sequences=4, step_tokens=8)
    kernels = {v.kernel.partition(":")[2] for v in variants(model, plan, 90)}
    assert "_persistent_matmul_kernel" in kernels


def test_windows_and_experts_are_listed() -> None:
    model = config(hidden_size=576, intermediate_size=1536, **MODELS["gemma3"])
    constants = [dict(v.constants) for v in variants(model, any_plan(model, "bfloat16"), 90)]
    assert {c["HAS_WINDOW"] for c in constants if "HAS_WINDOW" in c} == {True, False}
    model = config(hidden_size=576, intermediate_size=1536, **MODELS["qwen3_moe"])
    kernels = {v.kernel.partition(":")[2] for v in variants(model, any_plan(model, "bfloat16"), 90)}
    assert "_moe_matmul_kernel" in kernels
