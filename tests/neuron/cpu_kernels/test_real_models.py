"""Real models on the kernels: tokens at every level, and perplexity against float32 on the same weights."""

import math
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from neuron.cpu_kernels import native
from neuron.text import tokenizer

QUESTION = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]
ANSWER = [504, 3575, 282, 4649, 314, 7042, 30, 2]  # The capital of France is Paris.<|im_end|>
TEXT = pathlib.Path(__file__).with_name("text.txt")


class Likelihood:
    """Sampler that returns the next token of a text, and records its probability."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.total = 0.0
        self.report = None

    def can_verify_drafts(self, _: object) -> bool:
        return False

    def admit(self, *_: object) -> None:
        pass

    def draws_plainly(self, slots: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.zeros(len(slots), np.bool_)

    def take_logprobs(self, _: object) -> None:
        pass

    def sample(self, logits: torch.Tensor, _: object, num_output: np.ndarray[Any, Any]) -> torch.Tensor:
        token = self.tokens[int(num_output[0]) + 1]
        self.total -= float(logits[0].log_softmax(-1)[token])
        return torch.tensor([token], dtype=torch.int32)


def perplexity(
    harness: Callable[..., Any], path: pathlib.Path, tokens: list[int], dtype: str, kv_dtype: str = "auto"
) -> float:
    driver = harness()
    driver.load(path, dtype=dtype, kv_dtype=kv_dtype)
    driver.engine._models["m"].executor.sampler = likelihood = Likelihood(tokens)
    driver.generate(1, tokens[:1], len(tokens) - 1)
    driver.run()
    assert driver.outputs()[1] == tokens[1:]
    return math.exp(likelihood.total / (len(tokens) - 1))


@pytest.mark.slow
@pytest.mark.parametrize("level", native.levels())
def test_the_answer_is_paris_at_every_level(
    level: str, smollm2_gguf: pathlib.Path, harness: Callable[..., Any], set_engine: Callable[..., None]
) -> None:
    set_engine(cpu_level=level)
    # Draft tokens change which rows are in a step from run to run, and with a bfloat16 cache that may change a tie.
    set_engine(speculation=False)
    driver = harness()
    driver.load(smollm2_gguf, dtype="auto")
    # Alone, and eight together: different tiles of the same products.
    for number in range(9):
        driver.generate(number, QUESTION, 40)
        if number == 0:
            driver.run()
    driver.run()
    found = driver.outputs()
    assert found[0][:8] == ANSWER
    assert len(found[0]) == 40
    assert all(found[number] == found[0] for number in range(1, 9))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("model", "levels", "begin"),
    [("smollm2_gguf", native.levels(), []), ("gemma3_gguf", native.levels()[:1], [2])],
    ids=["smollm2", "gemma3"],
)
def test_quantised_activations_and_keys_cost_less_than_a_hundredth_of_perplexity(
    model: str,
    levels: tuple[str, ...],
    begin: list[int],
    request: pytest.FixtureRequest,
    harness: Callable[..., Any],
    set_engine: Callable[..., None],
) -> None:
    path = request.getfixturevalue(model)
    text = tokenizer.load(path).tokenizer
    tokens = begin + text.encode(TEXT.read_text(), add_special_tokens=False).ids
    assert len(tokens) > 400
    exact = perplexity(harness, path, tokens, "float32")
    for level in levels:
        set_engine(cpu_level=level)
        for kv_dtype in ("auto", "int8"):
            found = perplexity(harness, path, tokens, "auto", kv_dtype)
            print(f"{model} at {level}, keys {kv_dtype}: perplexity {found:.4f}, in float32 {exact:.4f}")
            assert abs(found / exact - 1) < 0.01, f"perplexity {found:.4f}, in float32 {exact:.4f}"


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_a_hit_in_the_prefix_cache_changes_nothing(
    harness: Callable[..., Any], smollm2_gguf: pathlib.Path, kv_dtype: str
) -> None:
    """The real model: tokens and their probabilities, to the bit, alone and in a batch, from the cache or not."""
    text = TEXT.read_text()
    ids = tokenizer.load(smollm2_gguf).tokenizer.encode(text, add_special_tokens=False).ids
    prompts = [ids[13 * number :][: 30 + 47 * number] for number in range(5)]

    def run(driver: Any, numbers: list[int], size: float = 1.0) -> dict[int, list[tuple[bytes, bytes]]]:
        driver.sent.clear()
        for number in numbers:
            prompt = prompts[number][: int(size * len(prompts[number]))]
            driver.generate(number, prompt, 6, top_logprobs=3)
        driver.run()
        assert not driver.failures()
        found: dict[int, list[tuple[bytes, bytes]]] = {number: [] for number in numbers}
        for row in driver.rows:
            found[row.sequence].append((row.ids, row.logprobs.chosen + row.logprobs.top))
        # A token may come in a row of its own or with others.
        return {number: [tuple(map(b"".join, zip(*rows, strict=True)))] for number, rows in found.items()}  # type: ignore[misc]

    cold = harness()
    cold.load(smollm2_gguf, dtype="auto", kv_dtype=kv_dtype, prefix_cache=False)
    alone = {number: run(cold, [number])[number] for number in range(5)}
    assert run(cold, list(range(5))) == alone
    warm = harness()
    warm.load(smollm2_gguf, dtype="auto", kv_dtype=kv_dtype)
    for number in range(5):
        run(warm, [number], 0.6)
    assert run(warm, list(range(5))) == alone
    assert all(row.prompt_cached for row in warm.rows if row.prompt_cached is not None)
    assert run(warm, [4]) == {4: alone[4]}
