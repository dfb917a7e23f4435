"""The engine against transformers on the same weights: logits of every step, and the sampled tokens."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from cpu_levels import FLOAT32_LEVELS
from gguf_reference import transformers_model

from neuron.engine.speculation import Speculation
from neuron.models import packed
from neuron.models.config import read_config

NUM_TOKENS = 64
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"kind": "llama"},
    "llama-tied": {"kind": "llama", "tie_word_embeddings": True},
    "llama-bias": {"kind": "llama", "attention_bias": True},
    "llama-multi-query": {"kind": "llama", "num_key_value_heads": 1},
    "llama-no-sharing": {"kind": "llama", "num_key_value_heads": 6},
    "llama-rope-linear": {
        "kind": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
    },
    "llama-rope-llama3": {
        "kind": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral-window": {"kind": "mistral", "sliding_window": 20},
    "ministral3": {
        "kind": "ministral3", "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16,
            "beta_fast": 4.0, "beta_slow": 1.0, "mscale": 0.5, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3,
        },
    },
    # A quarter of each head is not rotated; every context is longer than the original one.
    "phi3": {
        "kind": "phi3", "hidden_size": 64, "num_attention_heads": 4, "original_max_position_embeddings": 1,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 100.0, "partial_rotary_factor": 0.75, "factor": 32.0,
            "original_max_position_embeddings": 1, "attention_factor": 1.25,
            "short_factor": [1.0] * 6, "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 4.0],
        },
    },
    "smollm3": {"kind": "smollm3", "no_rope_layers": [1, 0, 1], "attention_bias": True},
    "qwen3": {"kind": "qwen3"},
    "qwen3-tied": {"kind": "qwen3", "tie_word_embeddings": True, "head_dim": 16, "num_attention_heads": 4},
    "qwen2": {"kind": "qwen2"},
    "qwen3-moe": {
        "kind": "qwen3_moe",
        "num_experts": 7,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 28,  # transformers requires multiples of 16 bytes
        "norm_topk_prob": True,
    },
    "qwen3-moe-plain-sum": {
        "kind": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40,
        "norm_topk_prob": False,
    },
    "qwen2-moe": {
        "kind": "qwen2_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 28,
        "shared_expert_intermediate_size": 36, "mlp_only_layers": [1],
    },
    "glm4-moe": {
        "kind": "glm4_moe", "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 28,
        "n_shared_experts": 2, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 1.8,
        "attention_bias": True, "use_qk_norm": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    },
    # A window shorter than the prompts, in two layers of three, and in the other none.
    "gemma3": {
        "kind": "gemma3", "sliding_window": 20, "sliding_window_pattern": 3, "query_pre_attn_scalar": 9,
        "final_logit_softcapping": 5.0, "tie_word_embeddings": True,
    },
    "gemma3-wide-window": {  # and one longer
        "kind": "gemma3", "sliding_window": 300, "num_hidden_layers": 6, "tie_word_embeddings": True,
    },
}  # fmt: skip


class Recorder:
    """Sampler that records the logits of each step."""

    def __init__(self, sampler: Any, scheduler: Any) -> None:
        self._sampler = sampler
        self._scheduler = scheduler
        self.logits: dict[int, dict[int, torch.Tensor]] = {}
        self.admit, self.can_verify_drafts = sampler.admit, sampler.can_verify_drafts

    report = None

    def draws_plainly(self, slots: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.zeros(len(slots), np.bool_)

    def sample(self, logits: torch.Tensor, slots: np.ndarray[Any, Any], num_output: np.ndarray[Any, Any]) -> Any:
        number_of = {sequence.slot: number for number, sequence in self._scheduler.running.items()}
        for row, (slot, index) in enumerate(zip(slots.tolist(), num_output.tolist(), strict=True)):
            # A row behind a rejected draft token is sampled again in a later step, which counts.
            self.logits.setdefault(number_of[slot], {})[index] = logits[row].clone()
        return self._sampler.sample(logits, slots, num_output)


def expected_of(
    model: transformers.PreTrainedModel, prompt: list[int], num_tokens: int = NUM_TOKENS
) -> tuple[list[int], torch.Tensor]:
    """Return transformers' greedy tokens and the logits of each step."""
    # Without the model's own, whose end-of-text tokens would end the comparison.
    model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([prompt]), max_new_tokens=num_tokens, output_logits=True, return_dict_in_generate=True
        )
    return output.sequences[0, len(prompt) :].tolist(), torch.cat(output.logits).float()


def run_engine(
    harness: Any,
    path: pathlib.Path,
    prompts: list[list[int]],
    step_tokens: int,
    num_tokens: int = NUM_TOKENS,
    **spec: Any,
) -> tuple[dict[int, list[int]], dict[int, torch.Tensor]]:
    """Return the engine's greedy tokens and logits for ``prompts``, all at once, in chunks of ``step_tokens``."""
    driver = harness()
    driver.load(path, **spec)
    model = driver.engine._models["m"]
    limits = dataclasses.replace(model.scheduler.limits, step_tokens=step_tokens, mixed_step_tokens=step_tokens)
    model.scheduler.limits = limits
    model.executor.sampler = recorder = Recorder(model.executor.sampler, model.scheduler)
    for number, prompt in enumerate(prompts):
        driver.generate(number, prompt, num_tokens)
    driver.run()
    assert not driver.failures()
    logits = {
        number: torch.stack([rows[index] for index in range(num_tokens)]) for number, rows in recorder.logits.items()
    }
    return driver.outputs(), logits


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    error = (found - expected).abs().amax(-1) / expected.abs().amax(-1)
    assert error.max() < 1e-3, f"relative error {error.max():.2e} at step {int(error.argmax())}"


@pytest.fixture(params=["eager", *FLOAT32_LEVELS], autouse=True)
def executor(request: pytest.FixtureRequest, set_engine: Callable[..., None]) -> None:
    """Eager torch, and the native kernels at every level of this processor whose float32 differs."""
    if request.param == "eager":
        set_engine(cpu_kernels=False)
    else:
        set_engine(cpu_level=request.param)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(
    request: pytest.FixtureRequest, make_checkpoint: Callable[..., pathlib.Path]
) -> tuple[pathlib.Path, list[list[int]], list[tuple[list[int], torch.Tensor]]]:
    path = make_checkpoint(**ARCHITECTURES[request.param])
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    random = np.random.default_rng(7)
    prompts = [random.integers(3, 131, size).tolist() for size in (1, 5, 16, 17, 33, 150)]
    return path, prompts, [expected_of(model, prompt) for prompt in prompts]


@pytest.fixture
def once(case: Any, request: pytest.FixtureRequest) -> None:
    """Skip native levels of a model that no kernels run: it is eager torch on each of them."""
    if request.node.callspec.params["executor"] != "eager" and packed.obstacle(read_config(case[0])):
        pytest.skip("eager torch, as another case")


@pytest.mark.usefixtures("once")
@pytest.mark.parametrize("step_tokens", [7, 32, 512])
def test_a_batch_of_mixed_lengths_equals_transformers(case: Any, harness: Any, step_tokens: int) -> None:
    path, prompts, expected = case
    tokens, logits = run_engine(harness, path, prompts, step_tokens)
    for number, (expected_tokens, expected_logits) in enumerate(expected):
        assert tokens[number][: len(expected_tokens)] == expected_tokens
        assert_close(logits[number][: len(expected_logits)], expected_logits)


@pytest.mark.usefixtures("once")
def test_a_single_sequence_equals_transformers(case: Any, harness: Any) -> None:
    path, prompts, expected = case
    for prompt, (expected_tokens, expected_logits) in zip(prompts[3:5], expected[3:5], strict=True):
        tokens, logits = run_engine(harness, path, [prompt], 16)
        assert tokens[0] == expected_tokens
        assert_close(logits[0], expected_logits)


@pytest.mark.parametrize("context_tokens", [64, 512])
def test_longrope_has_the_factors_of_the_context_that_is_loaded(
    make_checkpoint: Callable[..., pathlib.Path], harness: Any, context_tokens: int
) -> None:
    rope = {**ARCHITECTURES["phi3"]["rope_parameters"], "original_max_position_embeddings": 64}
    rope["short_factor"] = [1.0, 1.0, 1.25, 1.5, 1.5, 2.0]
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    path = make_checkpoint("phi3", **sizes, original_max_position_embeddings=64, rope_parameters=rope)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    prompt = list(range(3, 43 if context_tokens == 64 else 103))
    tokens, logits = expected_of(model, prompt, 16)
    found_tokens, found = run_engine(harness, path, [prompt], 32, 16, context_tokens=context_tokens)
    assert found_tokens[0] == tokens
    assert_close(found[0], logits)


# A question and the beginning of a sentence, in each model's own tokens.
REAL_MODELS = {
    # "What is the capital of France?" in the chat template.
    "smollm2_gguf": [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198],
    # "The capital of France is" behind <bos>; its window of 512 is shorter than the prose.
    "gemma3_gguf": [2, 818, 5279, 529, 7001, 563],
}
PROSE_TOKENS = {"smollm2_gguf": 150, "gemma3_gguf": 600}


@pytest.fixture(scope="module", params=REAL_MODELS)
def real_model(request: pytest.FixtureRequest) -> tuple[str, pathlib.Path, transformers.PreTrainedModel]:
    path: pathlib.Path = request.getfixturevalue(request.param)
    return request.param, path, transformers_model(path)


@pytest.mark.slow
def test_a_real_model_equals_transformers(
    real_model: tuple[str, pathlib.Path, transformers.PreTrainedModel], harness: Any
) -> None:
    name, path, model = real_model
    question = REAL_MODELS[name]
    prose = np.random.default_rng(3).integers(1000, 49000, PROSE_TOKENS[name]).tolist()
    # The prose shares the batch; eight of its tokens show whether it is right.
    expected = [expected_of(model, question), expected_of(model, prose, 8)]
    tokens, logits = run_engine(harness, path, [question, prose], 100)
    for number, (expected_tokens, expected_logits) in enumerate(expected):
        assert tokens[number][: len(expected_tokens)] == expected_tokens
        assert_close(logits[number][: len(expected_logits)], expected_logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL_MODELS)
def test_how_a_real_model_is_run_does_not_show(
    name: str,
    request: pytest.FixtureRequest,
    harness: Any,
    set_engine: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prefix cache, chunks, one or sixteen streams, speculation: the same greedy tokens."""
    if harness.settings.cpu_level != FLOAT32_LEVELS[0]:
        pytest.skip("once, on the fastest kernels")
    path: pathlib.Path = request.getfixturevalue(name)
    monkeypatch.setattr(Speculation, "_depth", lambda self, decoding, able, available: min(3, max(available)))
    random = np.random.default_rng(9)
    prompts = [REAL_MODELS[name] * 3, *(random.integers(1000, 40_000, size).tolist() for size in (70, 130))]
    found = []
    for speculates in (False, True):
        set_engine(speculation=speculates)
        for prefix_cache in (False, True):
            for step_tokens in (40, 512):
                driver = harness()
                driver.load(path, prefix_cache=prefix_cache)
                model = driver.engine._models["m"]
                model.scheduler.limits = dataclasses.replace(
                    model.scheduler.limits, step_tokens=step_tokens, mixed_step_tokens=step_tokens
                )
                for number, prompt in enumerate(prompts):
                    driver.generate(number, prompt, NUM_TOKENS)
                    driver.run()
                for number in range(16):
                    driver.generate(10 + number, prompts[number % 3], NUM_TOKENS)
                driver.run()
                outputs = driver.outputs()
                found.append([outputs[number] for number in range(3)])
                assert all(outputs[10 + number] == outputs[number % 3] for number in range(16))
                assert (model.speculation.num_accepted > 0) == speculates
    assert all(tokens == found[0] for tokens in found)
