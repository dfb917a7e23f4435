"""Log probabilities of a prompt's own tokens: those that transformers computes, in chunks, on any executor."""

import array
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from neuron.device import jobs


@pytest.fixture
def expected(tiny_llama: pathlib.Path) -> Callable[[list[int]], np.ndarray[Any, Any]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)

    def score(prompt: list[int]) -> np.ndarray[Any, Any]:
        """Return ``[T - 1, V]``: the distribution of each token but the first."""
        with torch.inference_mode():
            found: np.ndarray[Any, Any] = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1).numpy()
        return found

    return score


def score(driver: Any, number: int, prompt: list[int], max_tokens: int = 1, **settings: Any) -> None:
    sampler = jobs.SamplerSettings(**({"temperature": 0.0, "top_logprobs": 2} | settings))
    tokens = array.array("i", prompt).tobytes()
    driver.post(jobs.Generate(number, "m", tokens, max_tokens, (), sampler, scores_prompt=True))


def scores(driver: Any, number: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the scores of a prompt: each token's own, the likeliest ids, and theirs."""
    parts = [row.prompt for row in driver.rows if row.sequence == number and row.prompt is not None]
    own = np.frombuffer(b"".join(part.chosen for part in parts), np.float32)
    ids = np.frombuffer(b"".join(part.top_ids for part in parts), np.int32).reshape(len(own), 2)
    return own, ids, np.frombuffer(b"".join(part.top for part in parts), np.float32).reshape(len(own), 2)


def test_they_equal_those_of_transformers(executor: str, harness: Any, tiny_llama: pathlib.Path, expected: Any) -> None:
    driver = harness()
    driver.load(tiny_llama)
    random = np.random.default_rng(5)
    prompts = [random.integers(3, 131, size).tolist() for size in (1, 2, 16, 40, 200)]
    driver.generate(99, prompts[3], 30)  # beside a decode, and with its prompt in the cache
    for number, prompt in enumerate(prompts):
        score(driver, number, prompt, max_tokens=3)
    driver.run()
    for number, prompt in enumerate(prompts):
        own, ids, top = scores(driver, number)
        table = expected(prompt)
        assert len(own) == len(prompt) - 1
        np.testing.assert_allclose(own, table[np.arange(len(own)), prompt[1:]], atol=1e-4)
        if len(own):
            np.testing.assert_allclose(top, np.sort(table, -1)[:, :-3:-1], atol=1e-4)
            assert ids.shape == (len(own), 2)
    # The output is the same without scores, and no other sequence's tokens change.
    plain = harness()
    plain.load(tiny_llama)
    plain.generate(99, prompts[3], 30)
    for number, prompt in enumerate(prompts):
        plain.generate(number, prompt, 3)
    plain.run()
    assert driver.outputs() == plain.outputs()


def test_a_token_that_is_the_likeliest_has_the_very_number_of_the_likeliest(
    executor: str, harness: Any, tiny_llama: pathlib.Path
) -> None:
    driver = harness()
    driver.load(tiny_llama)
    driver.generate(0, [5, 6, 7], 12)
    driver.run()
    prompt = [5, 6, 7, *driver.outputs()[0]]
    score(driver, 1, prompt)
    driver.run()
    own, ids, top = scores(driver, 1)
    assert ids[2:, 0].tolist() == prompt[3:]
    assert (own[2:] == top[2:, 0]).all()


def test_penalties_are_of_the_answer_alone(
    executor: str, harness: Any, tiny_llama: pathlib.Path, expected: Any
) -> None:
    driver = harness()
    driver.load(tiny_llama)
    prompt = [5, 6, 7, 5, 6, 7, 8, 9]
    settings = {"presence_penalty": 1.5, "frequency_penalty": 0.5, "repetition_penalty": 1.3}
    score(driver, 0, prompt, max_tokens=6, **settings)
    driver.generate(1, prompt, 6, **settings)
    driver.run()
    np.testing.assert_allclose(scores(driver, 0)[0], expected(prompt)[np.arange(7), prompt[1:]], atol=1e-4)
    assert driver.outputs()[0] == driver.outputs()[1]


def test_nothing_of_it_comes_from_the_cache(harness: Any, tiny_llama: pathlib.Path) -> None:
    driver = harness()
    driver.load(tiny_llama)
    prompt = list(range(3, 100))
    driver.generate(0, prompt, 2)
    driver.run()
    score(driver, 1, prompt)
    driver.generate(2, prompt, 2)
    driver.run()
    cached = {row.sequence: row.prompt_cached for row in driver.rows if row.prompt_cached is not None}
    assert cached == {0: 0, 1: 0, 2: 96}
    assert len(scores(driver, 1)[0]) == len(prompt) - 1


def test_scores_need_log_probabilities(harness: Any, tiny_llama: pathlib.Path) -> None:
    driver = harness()
    driver.load(tiny_llama)
    score(driver, 0, [3, 4], top_logprobs=-1)
    assert driver.failures()[0].code == "invalid_value"
