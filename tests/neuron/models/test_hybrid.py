"""Models of gated delta nets and gated attention against transformers: logits, however a prompt is divided."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from cpu_levels import FLOAT32_LEVELS
from hybrid_gguf import write_gguf
from hybrid_models import CONFIG, forgetting, make_model

from cortex.wire.errors import ApiError
from neuron.layers.attention import Attention
from neuron.layers.cache import MAX_DRAFTS, SequenceState
from neuron.layers.gated_delta import GatedDelta
from neuron.layers.shard import Shard
from neuron.models import packed
from neuron.models.config import config_from_gguf, read_config
from neuron.models.decoder import Decoder
from neuron.models.errors import CorruptWeightsError
from neuron.models.gguf_parts import read_parts

from .test_parity import assert_close, expected_of, run_engine

LENGTHS = (1, 5, 64, 65, 150)
"""Of prompts: some of several chunks, and not a multiple of one."""
NUM_TOKENS = 20
Expected = list[tuple[list[int], torch.Tensor]]


@pytest.fixture(scope="module", params=["qwen3_5", "qwen3_5_tied", "qwen3_5_moe", "qwen3_next"])
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[pathlib.Path, list[list[int]], Expected]:
    path = make_model(request.param, tmp_path_factory.mktemp(request.param))
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    random = np.random.default_rng(7)
    prompts = [random.integers(3, 64, size).tolist() for size in LENGTHS]
    prompts.append([9] * 100)  # alike keys
    return path, prompts, [expected_of(model, prompt, NUM_TOKENS) for prompt in prompts]


@pytest.fixture(params=["eager", *FLOAT32_LEVELS])
def executor(request: pytest.FixtureRequest, case: Any, set_engine: Callable[..., None]) -> None:
    """Eager torch, and the kernels at every level whose float32 differs, where they run the model."""
    if request.param == "eager":
        set_engine(cpu_kernels=False)
    elif packed.obstacle(read_config(case[0])):
        pytest.skip("eager torch, as another case")
    else:
        set_engine(cpu_level=request.param)


@pytest.mark.usefixtures("executor")
@pytest.mark.parametrize("step_tokens", [1, 7, 512])
def test_logits_equal_transformers(case: Any, harness: Any, step_tokens: int) -> None:
    path, prompts, expected = case
    chosen = slice(None) if step_tokens > 1 else slice(3, 4)
    check(run_engine(harness, path, prompts[chosen], step_tokens, NUM_TOKENS), expected[chosen])


def check(found: tuple[dict[int, list[int]], dict[int, torch.Tensor]], expected: Expected) -> None:
    tokens, logits = found
    for number, (expected_tokens, expected_logits) in enumerate(expected):
        assert tokens[number] == expected_tokens
        assert_close(logits[number], expected_logits)


@pytest.mark.parametrize("tensor", [0, 1], ids=["inputs of the convolution", "state of the rule"])
def test_a_lost_state_shows(
    case: Any, harness: Any, set_engine: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tensor: int
) -> None:
    """The comparison notices a state that is zeroed before one of the steps of an answer."""
    path, prompts, expected = case
    set_engine(cpu_kernels=False)
    monkeypatch.setattr(Decoder, "hidden", forgetting(tensor))
    found = run_engine(harness, path, prompts[4:5], 512, NUM_TOKENS)
    with pytest.raises(AssertionError):
        check(found, expected[4:5])


# ------------------------------------------------------------------ files


def test_bfloat16_keeps_decays_and_states_in_float32(case: Any, harness: Any, set_engine: Callable[..., None]) -> None:
    path, prompts, _ = case
    set_engine(cpu_kernels=False)
    driver = harness()
    driver.load(path, dtype="bfloat16")
    layers = driver.model().executor.forward.weights.layers
    assert {layers[0][name].dtype for name in ("decay", "bias")} == {torch.float32}
    assert layers[0]["convolution"].weight.dtype == torch.bfloat16
    for number, prompt in enumerate(prompts):
        driver.generate(number, prompt, 4)
    driver.run()
    assert not driver.failures()


@pytest.mark.usefixtures("executor")
def test_gguf_has_the_logits_of_safetensors(case: Any, harness: Any, tmp_path: pathlib.Path) -> None:
    path, prompts, expected = case
    write_gguf(path, tmp_path / "model.gguf")
    tokens, logits = run_engine(harness, tmp_path / "model.gguf", prompts[3:], 512, NUM_TOKENS)
    check((tokens, logits), expected[3:])


def test_gguf_tells_which_layers_are_recurrent(tmp_path: pathlib.Path) -> None:
    path = write_gguf(make_model("small", tmp_path), tmp_path / "model.gguf")
    header, key = read_parts(path), "qwen35.attention.recurrent_layers"
    header = dataclasses.replace(header, tensors=tuple(t for t in header.tensors if "blk." not in t.name))

    def kinds(**values: Any) -> list[type]:
        changed = dataclasses.replace(header, metadata={**header.metadata, **values})
        return [type(block[0]) for block in config_from_gguf(path, changed).blocks]

    assert kinds() == [GatedDelta, Attention, GatedDelta], "every second has attention"
    assert kinds(**{key: [False, True, True]}) == [Attention, GatedDelta, GatedDelta]
    for value in ([True, False], [True] * 4, [1, 0, 1], True, "all"):
        with pytest.raises(CorruptWeightsError, match="recurrent_layers"):
            kinds(**{key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_output_gate": False}, "attn_output_gate is false"),
        ({"output_gate_type": "tanh"}, "output_gate_type 'tanh'"),
        ({"linear_num_value_heads": 3}, "3 value heads cannot share 2 key heads"),
        ({"linear_conv_kernel_dim": 1}, "a convolution of 1 tokens"),
        ({"layer_types": ["linear_attention"] * 4}, "has attention by layer_types"),
        ({"layer_types": ["linear_attention"] * 3 + ["mamba"]}, "layer_types does not name"),
        ({"linear_key_head_dim": 1 << 20}, "linear_key_head_dim is 1048576"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: pathlib.Path, change: dict[str, Any], message: str) -> None:
    values = {**CONFIG, "model_type": "qwen3_5_text", "architectures": ["Qwen3_5ForCausalLM"], **change}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ApiError) as raised:
        read_config(tmp_path)
    assert message in str(raised.value)


def test_a_published_shape_has_the_known_sizes(tmp_path: pathlib.Path) -> None:
    """Qwen3.5-27B in its wrapper: 64 KiB a token in 16 layers, 3 MiB and 60 KiB of state in each of 48, and drafts'."""
    text = {
        **CONFIG, "model_type": "qwen3_5_text", "vocab_size": 248320, "hidden_size": 5120, "intermediate_size": 17408,
        "num_hidden_layers": 64, "num_attention_heads": 24, "num_key_value_heads": 4, "head_dim": 256,
        "linear_num_key_heads": 16, "linear_num_value_heads": 48, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
    }  # fmt: skip
    values = {"model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"], "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = read_config(tmp_path)
    assert config.kv_bytes_per_token("bfloat16") == 64 << 10
    states = [cache.num_bytes(2) for cache in config.caches() if isinstance(cache, SequenceState)]
    drafts = MAX_DRAFTS * (10240 + 2 * 48) * 2
    assert states == [(3 << 20) + (60 << 10) + drafts] * 48
    assert 26e9 < config.num_parameters() < 28e9
    assert config.blocks[3][0].rope.rotary_dim == 64


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_the_parts_of_ranks_are_the_whole(case: Any, num_ranks: int) -> None:
    config = read_config(case[0])
    (delta,) = {layer for layer in config.layers if isinstance(layer, GatedDelta)}
    if num_ranks > delta.num_key_heads and (num_ranks % delta.num_key_heads or num_ranks > delta.num_value_heads):
        with pytest.raises(ApiError, match="tensor_parallel"):
            delta.cache(Shard(0, num_ranks))
        return
    parts = [delta.cache(Shard(rank, num_ranks)).tensors[1].shape[0] for rank in range(num_ranks)]
    assert sum(parts) == delta.num_value_heads
    rows = [delta.parameters(Shard(rank, num_ranks))["output"].tensors[0].columns for rank in range(num_ranks)]
    assert [i for runs in rows for run in runs for i in run] == list(range(delta.num_value_heads * delta.value_dim))
    tiled = dataclasses.replace(delta, tiled=True, joins_inputs=False, joins_gates=False)
    rows = [tiled.parameters(Shard(rank, num_ranks))["output"].tensors[0].columns for rank in range(num_ranks)]
    for rank, runs in enumerate(rows):
        own = Shard(rank, num_ranks).kv_heads(delta.num_key_heads)
        heads = [i // delta.value_dim for run in runs for i in run][:: delta.value_dim]
        assert [head % delta.num_key_heads for head in heads] == [own[i % len(own)] for i in range(len(heads))]
    assert sorted(i for runs in rows for run in runs for i in run) == list(
        range(delta.num_value_heads * delta.value_dim)
    )
