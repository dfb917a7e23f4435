"""Prefix cache, forks and preemption: no sharing of pages changes a token."""

import pathlib
from collections.abc import Callable
from typing import Any

import pytest

from neuron.device import jobs
from neuron.engine import scheduler as scheduler_module

SYSTEM = [3 + 7 * i % 120 for i in range(100)]


def run(driver: Any, requests: dict[int, dict[str, Any]]) -> dict[int, list[int]]:
    driver.sent.clear()
    for number, request in requests.items():
        driver.generate(number, **request)
    driver.run()
    assert not driver.failures()
    return driver.outputs()


def loaded(harness: Callable[..., Any], path: pathlib.Path, **spec: Any) -> Any:
    driver = harness()
    assert isinstance(driver.load(path, **spec), jobs.Done)
    return driver


REQUESTS = {
    number: {"prompt": SYSTEM[: 20 * number] + [50 + number] * 5, "max_tokens": 40, **settings}
    for number, settings in enumerate(
        [{}, {}, {}, {"temperature": 0.8, "seed": 3}, {"presence_penalty": 0.7, "frequency_penalty": 0.2}, {}]
    )
}


def test_the_prefix_cache_changes_no_token(harness: Callable[..., Any], tiny_llama: pathlib.Path) -> None:
    cold = run(loaded(harness, tiny_llama, prefix_cache=False), REQUESTS)
    driver = loaded(harness, tiny_llama)
    assert run(driver, REQUESTS) == cold
    # Once more, from a cache with the whole sequence, output included.
    assert run(driver, REQUESTS) == cold
    cached = {row.sequence: row.prompt_cached for row in driver.rows if row.prompt_cached is not None}
    assert cached == {number: (20 * number + 4) // 16 * 16 for number in REQUESTS}
    # A conversation goes on: the model's output is in the cache as well.
    prompt = [*REQUESTS[5]["prompt"], *cold[5], 9, 9]
    run(driver, {9: {"prompt": prompt, "max_tokens": 1}})
    assert driver.rows[0].prompt_cached == (len(prompt) - 2 - 1) // 16 * 16


def test_only_sequences_of_one_salt_share(harness: Callable[..., Any], tiny_llama: pathlib.Path) -> None:
    """Neither cached pages nor pages in computation are shared across salts; the tokens are the same."""
    driver = loaded(harness, tiny_llama)
    salts = ["a", "a", "b", "", "", "ab", "a"]
    together = {number: {"prompt": SYSTEM, "max_tokens": 4, "cache_salt": salt} for number, salt in enumerate(salts)}
    outputs = run(driver, together)
    assert len({tuple(tokens) for tokens in outputs.values()}) == 1
    cached = {row.sequence: row.prompt_cached for row in driver.rows if row.prompt_cached is not None}
    assert cached == {0: 0, 1: 96, 2: 0, 3: 0, 4: 96, 5: 0, 6: 96}
    for number, (salt, there) in enumerate([("a", 96), ("b", 96), ("", 96), ("c", 0)], 20):
        assert run(driver, {number: {"prompt": SYSTEM, "max_tokens": 4, "cache_salt": salt}})[number] == outputs[0]
        assert driver.rows[0].prompt_cached == there


def test_choices_of_one_prompt_are_computed_once(
    harness: Callable[..., Any], tiny_llama: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = loaded(harness, tiny_llama)
    executor = driver.engine._models["m"].executor
    num_rows = []
    plain_run = executor.launch
    monkeypatch.setattr(executor, "launch", lambda plan: (num_rows.append(len(plan.token_ids)), plain_run(plan))[1])
    prompt = [77, *SYSTEM[1:]]
    expected = run(driver, {number: {"prompt": prompt, "max_tokens": 8} for number in range(4)})
    assert len({tuple(tokens) for tokens in expected.values()}) == 1
    # 100 rows once, then for each of the other three the 4 that no full page holds.
    assert num_rows[:2] == [100, 1 + 3 * 4]


def test_preemption_changes_no_token(
    harness: Callable[..., Any], tiny_llama: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_module, "GROWTH_PAGES", 1)
    requests = {}
    for number in range(8):
        settings = {key: value for key, value in REQUESTS[number % 6].items() if key not in {"prompt", "max_tokens"}}
        requests[number] = {"prompt": [3 + number] * (5 + 9 * number), "max_tokens": 150, **settings}
    roomy = loaded(harness, tiny_llama)
    expected = run(roomy, requests)
    assert roomy.engine._models["m"].scheduler.num_preemptions == 0
    plan = roomy.engine._models["m"].plan
    page_bytes = plan.kv_cache_bytes // plan.num_pages
    for prefix_cache in (True, False):
        driver = loaded(
            harness, tiny_llama, prefix_cache=prefix_cache, context_tokens=400, kv_cache_bytes=40 * page_bytes
        )
        found = run(driver, requests)
        assert driver.engine._models["m"].scheduler.num_preemptions > 3
        assert found == expected
        firsts = [row.sequence for row in driver.rows if row.prompt_cached is not None]
        assert sorted(firsts) == list(range(8)), "a preempted sequence started again for its client"


def test_a_nan_clears_only_its_own_pages(
    harness: Callable[..., Any], tiny_llama: pathlib.Path, set_engine: Callable[..., None]
) -> None:
    set_engine(cpu_kernels=False)  # its weights are accessible to a test
    driver = loaded(harness, tiny_llama)
    expected = run(driver, {1: {"prompt": SYSTEM, "max_tokens": 10}})[1]
    driver.engine._models["m"].executor.forward.weights.embedding["table"].weight[130] = float("nan")
    driver.generate(2, [*SYSTEM[:70], 130], 5)
    driver.run()
    assert driver.failures()[2].code == "non_finite_logits"
    assert run(driver, {3: {"prompt": SYSTEM, "max_tokens": 10}})[3] == expected
    assert driver.rows[0].prompt_cached == 96
