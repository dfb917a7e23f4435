"""Multi-step decode through the engine's messages: several tokens at once, with the same tokens, ends and errors."""

import dataclasses
import os
import pathlib
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cortex.wire.node import ModelSpec
from neuron.device import jobs
from neuron.device.jobs import SamplerSettings, SequenceEnd
from neuron.engine import multi_step
from neuron.engine.multi_step import MULTI_STEP_S, MultiStep
from neuron.engine.scheduler import Step
from neuron.engine.sequence import Sequence
from neuron.engine.step_timer import StepTimer

PROMPT = list(range(3, 43))


@pytest.fixture(autouse=True)
def ten_steps(monkeypatch: pytest.MonkeyPatch, set_engine: Callable[..., None]) -> None:
    """Have multi-step decodes of ten steps, however fast the machine is, and no speculation in their place."""
    monkeypatch.setattr(StepTimer, "step_s", lambda *_: MULTI_STEP_S / 10.5)
    set_engine(speculation=False)


def lengths(driver: Any) -> list[int]:
    """Return the number of tokens of each row."""
    return [len(row.ids) // 4 for row in driver.rows]


REQUESTS: dict[int, dict[str, Any]] = {
    1: {"prompt": PROMPT, "max_tokens": 50},
    2: {"prompt": PROMPT[:20], "max_tokens": 33},
    3: {"prompt": PROMPT[5:], "max_tokens": 1},
    4: {"prompt": [9] * 70, "max_tokens": 80},
    5: {"prompt": [9] * 500, "max_tokens": 400},
    6: {"prompt": PROMPT[7:], "max_tokens": 60, "temperature": 1.0, "seed": 3},
    7: {"prompt": PROMPT[7:], "max_tokens": 60, "temperature": 0.8, "top_p": 0.9, "top_k": 30, "seed": 4},
}
EOS = {1: 23, 4: 41}
"""The sequences that end at the token which, left alone, they have at this place."""


def outcome(driver: Any, requests: dict[int, dict[str, Any]]) -> tuple[dict[int, list[int]], dict[int, SequenceEnd]]:
    driver.sent.clear()
    for number, request in requests.items():
        driver.generate(number, **request)
    driver.run()
    return driver.outputs(), driver.ends()


def test_multi_step_changes_only_the_number_of_tokens_per_message(
    harness: Callable[..., Any], tiny_llama: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = harness()
    driver.load(tiny_llama)
    plain, _ = outcome(driver, REQUESTS)
    assert max(lengths(driver)) == 10
    requests = {n: {**request, "eos": (plain[n][EOS[n]],)} if n in EOS else request for n, request in REQUESTS.items()}
    with_multi_step = outcome(driver, requests)
    assert max(lengths(driver)) == 10
    monkeypatch.setattr(multi_step, "MULTI_STEP_S", 0.0)
    assert outcome(driver, REQUESTS)[0] == plain
    assert outcome(driver, requests) == with_multi_step
    assert with_multi_step[0][6] != with_multi_step[0][7]
    assert with_multi_step[1] == {n: SequenceEnd.STOP if n in EOS else SequenceEnd.LENGTH for n in REQUESTS}
    assert max(lengths(driver)) <= 1


def test_a_preempted_sequence_generates_the_same(harness: Callable[..., Any], tiny_llama: pathlib.Path) -> None:
    """Pages run out in the middle: no multi-step decode takes pages that another sequence was promised."""
    requests = {n: {"prompt": [3 + n] * (5 + 9 * n), "max_tokens": 150} for n in range(8)}
    roomy = harness()
    page_bytes = roomy.load(tiny_llama).result.kv_cache_bytes // roomy.engine._models["m"].plan.num_pages
    expected = outcome(roomy, requests)
    driver = harness()
    driver.load(tiny_llama, context_tokens=400, kv_cache_bytes=40 * page_bytes)
    assert outcome(driver, requests) == expected
    assert driver.engine._models["m"].scheduler.num_preemptions > 0
    assert max(lengths(driver)) > 4


def test_a_message_of_the_daemon_waits_for_one_step(harness: Callable[..., Any], tiny_llama: pathlib.Path) -> None:
    reader, writer = os.pipe()
    driver = harness(channel_fd=reader)
    driver.load(tiny_llama)
    try:
        driver.sent.clear()
        driver.generate(1, PROMPT, 200)
        driver.engine.step()
        driver.engine.step()
        os.write(writer, b"x")
        driver.engine.step()
        os.read(reader, 1)
        driver.engine.step()
        assert lengths(driver) == [1, 10, 1, 10], "the prompt's, a multi-step decode, one cut short, another"
        driver.post(jobs.Cancel(1))
        assert driver.rows[-1] == jobs.TokenRow(1, b"", SequenceEnd.CANCELLED)
        assert not driver.engine.busy
    finally:
        os.close(reader)
        os.close(writer)


def test_multi_step_is_for_a_model_that_has_the_device_to_itself(
    harness: Callable[..., Any], tiny_llama: pathlib.Path
) -> None:
    driver = harness()
    driver.load(tiny_llama)
    driver.load(tiny_llama, "other")
    driver.sent.clear()
    driver.generate(1, PROMPT, 60)
    driver.generate(2, PROMPT, 60, model="other")
    for _ in range(40):
        driver.engine.step()
    assert max(lengths(driver)) == 1
    driver.run()
    driver.generate(3, PROMPT, 200)
    driver.engine.step()
    driver.sent.clear()
    driver.post(jobs.Load(7, ModelSpec("third", "test", dtype="float32"), str(tiny_llama)))
    while driver.engine._loads:
        driver.engine.step()
    assert lengths(driver) == [1] * 9 + [10], "a load goes on by a layer a step, until it is done"


@pytest.mark.parametrize(
    "setting",
    [{"repetition_penalty": 1.1}, {"presence_penalty": 0.1}, {"top_logprobs": 0}, {"logit_bias": ((5, 1.0),)}],
)
def test_rows_that_need_the_sampler_have_no_multi_step(
    harness: Callable[..., Any], tiny_llama: pathlib.Path, setting: dict[str, Any]
) -> None:
    driver = harness()
    driver.load(tiny_llama)
    driver.sent.clear()
    driver.generate(1, PROMPT, 30, **setting)
    driver.generate(2, PROMPT, 30)
    driver.run()
    assert max(lengths(driver)) == 1


def step_of(sequences: list[Sequence]) -> Step:
    return Step(tuple(sequences), (1,) * len(sequences), len(sequences))


def bounded(step: Step, step_s: float | None = MULTI_STEP_S / 6, reserved: int = 99, *, plainly: bool = True) -> int:
    sampler = types.SimpleNamespace(draws_plainly=lambda _: np.array([plainly]))
    executor: Any = types.SimpleNamespace(max_steps=1000, sampler=sampler)
    step_timer: Any = types.SimpleNamespace(step_s=lambda _: step_s)
    return MultiStep(executor, step_timer, 1000).num_steps(step, lambda _, count: min(count, reserved))


def test_the_bounds_of_multi_step() -> None:
    one, other = (Sequence(n, np.arange(5, dtype=np.int32), 100, frozenset(), SamplerSettings()) for n in (1, 2))
    step = step_of([one, other])
    assert bounded(step) in (5, 6), "its time"
    assert bounded(step, reserved=2) == 3, "pages, or max_tokens"
    assert bounded(step, reserved=0) == 1
    assert bounded(step, step_s=None) == 1
    assert bounded(step, step_s=MULTI_STEP_S) == 1
    assert bounded(step, plainly=False) == 1
    assert bounded(dataclasses.replace(step, num_decodes=1)) == 1, "a prompt, or drafts"
    other.constraint = types.SimpleNamespace(free_tokens=3)  # type: ignore[assignment]
    assert bounded(step) == 1, "a grammar"
