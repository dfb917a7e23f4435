"""Embeddings are the hidden states that transformers computes, pooled: in chunks, among others, on either executor."""

import array
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from neuron.device import jobs
from neuron.device.jobs import Pooling
from neuron.models.config import read_config


@pytest.fixture
def expected(tiny_llama: pathlib.Path) -> Callable[[list[int], Pooling], np.ndarray[Any, Any]]:
    model = transformers.AutoModel.from_pretrained(tiny_llama, dtype=torch.float32)

    def embed(prompt: list[int], pooling: Pooling) -> np.ndarray[Any, Any]:
        with torch.inference_mode():
            hidden = model(torch.tensor([prompt])).last_hidden_state[0]
        vector = hidden[-1] if pooling is Pooling.LAST else hidden.mean(0)
        found: np.ndarray[Any, Any] = torch.nn.functional.normalize(vector, dim=0).numpy()
        return found

    return embed


def embed(driver: Any, number: int, prompt: list[int], pooling: Pooling) -> None:
    driver.post(jobs.Embed(number, "m", array.array("i", prompt).tobytes(), pooling))


def vectors(driver: Any) -> dict[int, np.ndarray[Any, Any]]:
    sent = [message for message in driver.sent if isinstance(message, jobs.Embedding)]
    return {message.sequence: np.frombuffer(message.vector, np.float32) for message in sent}


@pytest.mark.parametrize("pooling", list(Pooling))
def test_they_equal_those_of_transformers(
    executor: str, harness: Any, tiny_llama: pathlib.Path, expected: Any, pooling: Pooling
) -> None:
    driver = harness()
    driver.load(tiny_llama)
    random = np.random.default_rng(5)
    prompts = [random.integers(3, 131, size).tolist() for size in (1, 16, 40, 200)]
    driver.generate(99, prompts[2], 30)
    for number, prompt in enumerate(prompts):
        embed(driver, number, prompt, pooling)
    driver.run()
    found = vectors(driver)
    for number, prompt in enumerate(prompts):
        np.testing.assert_allclose(found[number], expected(prompt, pooling), atol=1e-4)
    assert len(driver.outputs()[99]) == 30
    # Again, with the whole prompt in the prefix cache where that may be used.
    for number, prompt in enumerate(prompts):
        embed(driver, 100 + number, prompt, pooling)
    driver.run()
    for number in range(4):
        np.testing.assert_allclose(vectors(driver)[100 + number], found[number], atol=1e-5)
    driver.engine._models["m"].scheduler.check_integrity()


def test_they_are_cancelled_and_refused_like_any_sequence(harness: Any, tiny_llama: pathlib.Path) -> None:
    driver = harness()
    driver.load(tiny_llama)
    embed(driver, 1, [5] * 300, Pooling.MEAN)
    driver.post(jobs.Cancel(1))
    embed(driver, 2, [5, 131], Pooling.LAST)
    embed(driver, 3, [5] * 512, Pooling.LAST)
    driver.run()
    assert not vectors(driver)
    assert {number: error.code for number, error in driver.failures().items()} == {
        2: "invalid_value", 3: "context_length_exceeded",
    }  # fmt: skip


def test_pooling_is_as_the_model_was_made_for(tiny_llama: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert read_config(tiny_llama).pooling is Pooling.LAST
    for file in tiny_llama.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    assert read_config(tmp_path).pooling is Pooling.MEAN
