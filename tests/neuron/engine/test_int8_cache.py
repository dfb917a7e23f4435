"""Keys and values in int8: half the memory, nearly the same answers, and errors as without."""

import pathlib
from collections.abc import Callable
from typing import Any

import pytest

from cortex.wire.errors import InvalidRequestError
from cortex.wire.node import ModelSpec
from neuron.device import jobs
from neuron.layers.attention import Attention
from neuron.models.config import read_config
from neuron.models.packed import padded
from neuron.models.sizing import PAGE_TOKENS, plan_memory

PROMPT = list(range(3, 43))


def loaded(harness: Callable[..., Any], path: pathlib.Path, **spec: Any) -> Any:
    driver = harness()
    answer = driver.load(path, **spec)
    assert isinstance(answer, jobs.Done), answer
    return driver


def test_a_page_of_int8_has_the_planned_size(harness: Callable[..., Any], tiny_llama: pathlib.Path) -> None:
    config = read_config(tiny_llama)
    driver = loaded(harness, tiny_llama, kv_dtype="int8")
    model = driver.engine._models["m"]
    attention, _ = config.blocks[0]
    assert isinstance(attention, Attention)
    vectors = 2 * len(config.blocks) * attention.num_kv_heads * PAGE_TOKENS
    assert model.plan.kv_cache_bytes == model.plan.num_pages * vectors * (padded(attention.head_dim) + 4)
    assert model.executor.caches.tables[0][1:].nbytes == model.plan.kv_cache_bytes
    assert driver.sent[-1].result.kv_cache_bytes == model.plan.kv_cache_bytes


def test_answers_hardly_differ_and_never_by_neighbours(harness: Callable[..., Any], tiny_llama: pathlib.Path) -> None:
    requests = {number: PROMPT[: 4 + 3 * number] for number in range(9)}
    exact, rounded = loaded(harness, tiny_llama), loaded(harness, tiny_llama, kv_dtype="int8")
    for number, prompt in requests.items():
        rounded.generate(number, prompt, 1)
        rounded.run()
        exact.generate(number, prompt, 1)
        exact.run()
    same = [exact.outputs()[number] == rounded.outputs()[number] for number in requests]
    assert sum(same) >= 8, "the next token, which may be a near tie"
    rounded.sent.clear()
    for number, prompt in requests.items():
        rounded.generate(number, prompt, 30)
        rounded.run()
    alone = rounded.outputs()
    rounded.sent.clear()
    for number, prompt in requests.items():
        rounded.generate(number, prompt, 30)
    rounded.run()
    assert rounded.outputs() == alone


def test_a_nan_is_one_in_int8_too(harness: Callable[..., Any], tiny_llama: pathlib.Path) -> None:
    """A NaN is in a token's scale, as its elements cannot hold one. The pages are sound for the next sequence."""
    driver = loaded(harness, tiny_llama, kv_dtype="int8", prefix_cache=False)
    driver.generate(1, PROMPT, 20)
    driver.run()
    expected = driver.outputs()[1]
    executor = driver.engine._models["m"].executor
    hidden = executor.config.hidden_size
    blocks = (
        executor.weights.region[: 4 * padded(executor.config.vocab_size) * hidden].view("f4").reshape(-1, hidden, 16)
    )
    blocks[100 // 16, :, 100 % 16] = float("nan")
    driver.generate(2, [*PROMPT, 100, *PROMPT], 20)
    driver.run()
    assert driver.failures()[2].code == "non_finite_logits"
    driver.sent.clear()
    driver.generate(3, PROMPT, 20)
    driver.run()
    assert driver.outputs()[3] == expected


@pytest.mark.parametrize("device", ["cuda:0", "cpu:0"])
def test_only_the_kernels_of_the_cpu_keep_int8(device: str, tiny_llama: pathlib.Path) -> None:
    with pytest.raises(InvalidRequestError, match=f"on {device}") as caught:
        plan_memory(read_config(tiny_llama), ModelSpec("m", "x", kv_dtype="int8"), device, 1 << 33, cpu_kernels=False)
    assert caught.value.param == "kv_dtype"
