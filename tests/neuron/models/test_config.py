"""Configurations and memory plans: values, errors, and sizes that agree with the real weights."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cortex.wire.errors import ApiError, InvalidRequestError
from cortex.wire.node import ModelSpec
from neuron.layers.attention import Attention
from neuron.models import sizing
from neuron.models.config import read_config
from neuron.models.ends import gguf_ends
from neuron.models.errors import (
    CorruptWeightsError,
    DoesNotFitError,
    UnsupportedArchitectureError,
    UnsupportedQuantizationError,
    UnsupportedRopeError,
)
from neuron.models.model import ModelConfig
from neuron.models.sizing import plan_memory, resolve_dtype

QWEN3_8B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "eos_token_id": 151645,
    "bos_token_id": 151643,
}


def write(folder: pathlib.Path, generation: dict[str, Any] | None = None, **changes: Any) -> pathlib.Path:
    values = {key: value for key, value in {**QWEN3_8B, **changes}.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(values))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def test_a_published_configuration(tmp_path: pathlib.Path) -> None:
    generation = {"eos_token_id": [151645, 151643], "temperature": 0.6, "top_k": 20, "top_p": 0.95, "do_sample": True}
    config = read_config(write(tmp_path, generation))
    assert config.family == "qwen3"
    assert config.eos_ids == (151645, 151643)
    assert config.bos_id == 151643
    assert (config.generation.temperature, config.generation.top_k, config.generation.top_p) == (0.6, 20, 0.95)
    assert (config.generation.min_p, config.generation.repetition_penalty) == (None, None)
    # As published: 8,190,735,360 parameters.
    assert config.num_parameters() == 8_190_735_360
    assert config.kv_bytes_per_token("bfloat16") == 147_456


def test_the_number_of_parameters_is_that_of_the_tensors(make_checkpoint: Callable[..., pathlib.Path]) -> None:
    import math

    for changes in ({"kind": "llama", "attention_bias": True}, {"kind": "qwen3", "tie_word_embeddings": True}):
        config = read_config(make_checkpoint(**changes))
        assert config.num_parameters() == sum(math.prod(shape) for shape in config.tensor_shapes().values())


def test_gguf_metadata(smollm2_gguf: pathlib.Path) -> None:
    config = read_config(smollm2_gguf)
    assert config.num_parameters() == 134_515_008
    attention = config.layers[0]
    assert isinstance(attention, Attention)
    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim) == (9, 3, 64)
    assert config.context_tokens == 8192
    assert config.head.tied
    assert config.eos_ids == (2, 0), "the end of a turn and of a text"
    assert attention.rope.theta == 100000.0


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"model_type": "mamba"}, UnsupportedArchitectureError, "mamba"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, UnsupportedArchitectureError, "SequenceClass"),
        ({"use_sliding_window": True}, UnsupportedArchitectureError, "sliding"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, UnsupportedArchitectureError, "sliding"),
        ({"hidden_act": "gelu"}, UnsupportedArchitectureError, "gelu"),
        ({"mlp_bias": True}, UnsupportedArchitectureError, "MLP"),
        ({"rope_scaling": {"rope_type": "mrope", "factor": 4.0}}, UnsupportedRopeError, "mrope"),
        ({"rope_scaling": {"type": "linear"}}, CorruptWeightsError, "factor is None"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, CorruptWeightsError, "factor is -1"),
        ({"rope_scaling": {"type": "yarn", "factor": 1e30}}, CorruptWeightsError, "factor is 1e"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": 1}}, CorruptWeightsError, "truncate is 1"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_theta": 1.0}, CorruptWeightsError, "rope_theta 1.0"),
        ({"rope_scaling": {"type": "dynamic", "factor": "2"}}, CorruptWeightsError, "factor is '2'"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, CorruptWeightsError, "long_factor is None"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
            CorruptWeightsError,
            "1 short and 1 long factors, not 64",
        ),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, CorruptWeightsError, "low_freq_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.26}}, CorruptWeightsError, "33 of 128 elements"),
        ({"rope_parameters": {"partial_rotary_factor": 1.5}}, CorruptWeightsError, "partial_rotary_factor"),
        ({"rope_parameters": [1]}, CorruptWeightsError, "rope"),
        ({"quantization_config": {"quant_method": "hqq"}}, UnsupportedQuantizationError, "hqq"),
        ({"hidden_size": "absent"}, CorruptWeightsError, "hidden_size"),
        ({"hidden_size": -4}, CorruptWeightsError, "hidden_size"),
        ({"vocab_size": True}, CorruptWeightsError, "vocab_size"),
        ({"num_hidden_layers": 1 << 40}, CorruptWeightsError, "num_hidden_layers"),
        ({"num_hidden_layers": 1 << 20}, CorruptWeightsError, "layers"),
        ({"num_key_value_heads": 5}, CorruptWeightsError, "5 key-value heads"),
        ({"head_dim": 7}, CorruptWeightsError, "7 of 7 elements"),
        ({"rms_norm_eps": "small"}, CorruptWeightsError, "rms_norm_eps"),
        ({"eos_token_id": "</s>"}, CorruptWeightsError, "eos_token_id is"),
        ({"tie_word_embeddings": 1}, CorruptWeightsError, "tie_word_embeddings"),
    ],
)
def test_an_unsupported_model_is_refused_by_name(
    tmp_path: pathlib.Path, changes: dict[str, Any], error: type[ApiError], named: str
) -> None:
    with pytest.raises(error, match=named) as caught:
        read_config(write(tmp_path, **changes))
    assert str(tmp_path) in caught.value.message
    assert caught.value.status == 422


def test_broken_files(tmp_path: pathlib.Path) -> None:
    with pytest.raises(CorruptWeightsError, match="no such file"):
        read_config(tmp_path)
    with pytest.raises(CorruptWeightsError, match="no such file"):
        read_config(tmp_path / "model.gguf")
    for text in ("{", "[]", "\xff"):
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(CorruptWeightsError, match="JSON"):
            read_config(tmp_path)
    write(tmp_path, {"temperature": "hot"})
    with pytest.raises(CorruptWeightsError, match="temperature"):
        read_config(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 1 << 40) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["rope_type", "factor"]), inner),
    max_leaves=3,
)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from([*QWEN3_8B, "rope_parameters", "layer_types", "quantization_config"]), JSON))
def test_any_configuration_is_read_or_refused(tmp_path: pathlib.Path, changes: dict[str, Any]) -> None:
    try:
        read_config(write(tmp_path, **changes))
    except (CorruptWeightsError, UnsupportedArchitectureError, UnsupportedRopeError, UnsupportedQuantizationError):
        pass


# ------------------------------------------------------------------ sizing


@pytest.fixture
def config(tmp_path: pathlib.Path) -> ModelConfig:
    return read_config(write(tmp_path))


def test_a_model_that_does_not_fit_is_an_error_with_sizes(config: ModelConfig) -> None:
    with pytest.raises(DoesNotFitError, match=r"does not fit on cuda:0: needs 15\.\d GiB, free 12\.0 GiB") as caught:
        plan_memory(config, ModelSpec("m", "x", dtype="bfloat16"), "cuda:0", 12 << 30)
    assert caught.value.info().status == 422


@given(
    free_gib=st.integers(1, 200),
    context_tokens=st.integers(0, 40960),
    max_sequences=st.integers(0, 300),
    kv_cache_mib=st.integers(0, 1 << 16),
    device=st.sampled_from(["cpu:0", "cuda:3"]),
)
def test_a_plan_fits_its_limits(
    tmp_path_factory: pytest.TempPathFactory,
    free_gib: int,
    context_tokens: int,
    max_sequences: int,
    kv_cache_mib: int,
    device: str,
) -> None:
    config = read_config(write(tmp_path_factory.getbasetemp()))
    spec = ModelSpec(
        "m", "x", dtype="bfloat16", context_tokens=context_tokens, max_sequences=max_sequences,
        kv_cache_bytes=kv_cache_mib << 20,
    )  # fmt: skip
    try:
        plan = plan_memory(config, spec, device, free_gib << 30)
    except (DoesNotFitError, InvalidRequestError):
        return
    assert plan.total_bytes <= free_gib << 30
    assert plan.kv_cache_bytes == plan.num_pages * sizing.PAGE_TOKENS * config.kv_bytes_per_token("bfloat16")
    assert plan.num_pages * sizing.PAGE_TOKENS >= plan.context_tokens
    assert plan.context_tokens == context_tokens or (not context_tokens and plan.context_tokens >= 512)
    assert plan.max_sequences == max_sequences or not max_sequences
    assert not kv_cache_mib or plan.kv_cache_bytes <= kv_cache_mib << 20


@pytest.mark.parametrize(
    ("spec", "param"),
    [
        (ModelSpec("m", "x", context_tokens=40961), "context_tokens"),
        (ModelSpec("m", "x", kv_dtype="int4"), "kv_dtype"),
        (ModelSpec("m", "x", context_tokens=-1), "context_tokens"),
        (ModelSpec("m", "x", max_sequences=-1), "max_sequences"),
        (ModelSpec("m", "x", kv_cache_bytes=1), "kv_cache_bytes"),
        (ModelSpec("m", "x", dtype="int3"), "dtype"),
        (ModelSpec("m", "x", dtype="float16"), "dtype"),
    ],
)
def test_a_spec_that_contradicts_itself_is_refused(config: ModelConfig, spec: ModelSpec, param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        plan_memory(config, spec, "cpu:0", 1 << 40)
    assert caught.value.param == param


def test_auto_is_the_fastest_dtype_of_the_device(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_dtype("auto", "cuda:0") == "bfloat16"
    for flags, dtype in (("fpu avx512f avx512_bf16", "bfloat16"), ("fpu avx2", "float32")):
        cpuinfo = tmp_path / flags.replace(" ", "-")
        cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
        monkeypatch.setattr(sizing, "cpu_has_bfloat16", lambda path=cpuinfo: _has(path))
        assert resolve_dtype("auto", "cpu:0") == dtype
    assert not _has(tmp_path / "absent")


_has = sizing.cpu_has_bfloat16.__wrapped__


IM_END, END_OF_TEXT = 151645, 151643


def tokenizer_of(folder: pathlib.Path, added: dict[str, int], **config: Any) -> None:
    tokens = [{"id": index, "content": text, "special": True} for text, index in added.items()]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens, "model": {"vocab": {"</s>": 7}}}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "ends"),
    [
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 6}, {}, {5, 6}),
        ({}, {"eos_token_id": 6}, {"eos_token": "<a>"}, {6, 9}),
        (None, {"eos_token_id": None}, {"eos_token": {"content": "<a>", "lstrip": False}}, {9}),
        (None, {"eos_token_id": "absent", "text_config": {"eos_token_id": [3, 4]}}, {}, {3, 4}),
        (None, {"eos_token_id": "absent"}, {"eos_token": "</s>"}, {7}),
        (None, {"eos_token_id": "absent"}, {"eos_token": "<no token>"}, set()),
        (None, {"eos_token_id": 1 << 20}, {"eos_token": None}, set()),
        (
            {"eos_token_id": 5},
            {"eos_token_id": 5},
            {"eos_token": "<b>", "added_tokens_decoder": {"11": {"content": "<b>"}}},
            {5, 11},
        ),
    ],
)
def test_an_answer_ends_with_all_that_any_file_calls_an_end(
    tmp_path: pathlib.Path, generation: Any, config: Any, tokenizer: Any, ends: set[int]
) -> None:
    write(tmp_path, generation, **config)
    tokenizer_of(tmp_path, {"<a>": 9, "<c>": 10}, **tokenizer)
    assert set(read_config(tmp_path).eos_ids) == ends


def test_an_end_of_message_is_found_by_its_text(tmp_path: pathlib.Path) -> None:
    """A file that names the end of a text alone, as base models' and GGUF files do, has chats that never end."""
    write(tmp_path, {"eos_token_id": END_OF_TEXT}, eos_token_id=END_OF_TEXT)
    tokenizer_of(tmp_path, {"<|im_end|>": IM_END, "<|im_start|>": 151644})
    assert read_config(tmp_path).eos_ids == (END_OF_TEXT, IM_END)


def test_the_ends_of_qwen_3_5_are_those_of_all_its_files(tmp_path: pathlib.Path) -> None:
    """``text_config`` names the end of a text, ``generation_config.json`` that of a message too."""
    text = json.loads((write(tmp_path, None) / "config.json").read_text()) | {"eos_token_id": 44}
    text |= {"model_type": "qwen3_5_text", "linear_num_key_heads": 1, "linear_num_value_heads": 1}
    text |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4, "vocab_size": 99}
    wrapper = {"model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"], "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(wrapper))
    assert read_config(tmp_path).eos_ids == (44,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [46, 44]}))
    assert read_config(tmp_path).eos_ids == (46, 44)
    tokenizer_of(
        tmp_path, {"<|im_end|>": 46, "<|endoftext|>": 44, "<|fim_pad|>": 63, "<|repo_name|>": 64, "<|file_sep|>": 65}
    )
    assert read_config(tmp_path).eos_ids == (46, 44, 63, 64, 65)


@pytest.mark.parametrize(("named", "end"), [(None, 2), ([{"rank": 7, "token_str": "</s>", "is_control": True}], 7)])
def test_the_end_of_a_text_of_a_file_of_mistrals(tmp_path: pathlib.Path, named: object, end: int) -> None:
    write(tmp_path, eos_token_id=None)
    (tmp_path / "tekken.json").write_text(json.dumps({"config": {}, "vocab": [], "special_tokens": named}))
    assert read_config(tmp_path).eos_ids == (end,)


@pytest.mark.parametrize(
    ("tokens", "named", "ends"),
    [
        (["a", "</s>", "<|im_end|>"], {"eos": 1}, {1, 2}),
        (["a", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"], {"eos": 2, "eot": 1}, {1, 2, 3}),
        (["a", "<eos>", "<end_of_turn>", "<start_of_turn>"], {"eos": 1}, {1, 2}),
        (["<|return|>", "<|end|>", "<|call|>", "<|endoftext|>"], {"eos": 0}, {0, 2, 3}),
        (["<|endoftext|>", "<|user|>", "<|observation|>", "<|assistant|>"], {"eos": 0}, {0, 1, 2}),
        (["<|endoftext|>", "<|user|>", "<|end|>", "<|assistant|>"], {"eos": 0}, {0, 2}),
        (["<eos>", "<turn|>", "<|tool_response>"], {"eos": 0}, {0, 1, 2}),
        # Qwen3.5, whose converter names the end of a message alone.
        (
            ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "</think>"],
            {"eos": 2},
            {0, 2, 3, 4, 5},
        ),
        (["a", "b", "c"], {"eos": 2, "eot": 1, "eom": -1}, {1, 2}),
    ],
)
def test_the_ends_of_a_gguf_file(tokens: list[str], named: dict[str, int], ends: set[int]) -> None:
    metadata: dict[str, Any] = {f"tokenizer.ggml.{kind}_token_id": index for kind, index in named.items()}
    metadata |= {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1 if len(t) == 1 else 3 for t in tokens],
    }
    assert set(gguf_ends(metadata, pathlib.Path("m.gguf"))) == ends


def test_an_end_that_is_but_text_is_none() -> None:
    metadata = {"tokenizer.ggml.tokens": ["<|im_end|>"], "tokenizer.ggml.token_type": [1]}
    assert gguf_ends(metadata, pathlib.Path("m.gguf")) == ()
