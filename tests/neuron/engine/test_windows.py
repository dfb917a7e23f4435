"""Layers with a window: they keep its pages and no more, and no token differs from those of a cache of all pages."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
from graph_rig import ByDefinition, Recorded

from cortex.wire.node import ModelSpec
from neuron.device import jobs
from neuron.engine import multi_step
from neuron.engine import scheduler as scheduler_module
from neuron.engine.step_timer import StepTimer
from neuron.layers.cache import chunk_pages, window_pages
from neuron.models import sizing
from neuron.models.config import read_config
from neuron.models.sizing import PAGE_TOKENS, plan_memory
from neuron.triton_kernels import dispatch

WINDOW = 20
SYSTEM = [3 + 7 * i % 120 for i in range(420)]
REQUESTS: dict[int, dict[str, Any]] = {
    0: {"prompt": SYSTEM[:5], "max_tokens": 400},
    1: {"prompt": SYSTEM, "max_tokens": 60},
    2: {"prompt": [*SYSTEM[:300], 9, 9], "max_tokens": 90, "temperature": 0.8, "seed": 3},
    3: {"prompt": [*SYSTEM[:97], 50], "max_tokens": 100, "presence_penalty": 0.5},
    4: {"prompt": [8, 9, 10] * 30, "max_tokens": 200},
}


@pytest.fixture(scope="module")
def gemma(make_checkpoint: Callable[..., pathlib.Path]) -> pathlib.Path:
    return make_checkpoint("gemma3", sliding_window=WINDOW, sliding_window_pattern=3, tie_word_embeddings=True)


@pytest.fixture(params=["eager", "native", "graphs"])
def load(
    request: pytest.FixtureRequest,
    harness: Callable[..., Any],
    set_engine: Callable[..., None],
    gemma: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Any]:
    """Load the model with windowed page tables, or with one for all layers."""
    set_engine(cpu_kernels=request.param == "native")
    if request.param == "graphs":
        operations = ByDefinition()
        monkeypatch.setattr(dispatch, "operations_for", lambda *_, **__: operations)

    def make(*, has_windows: bool = True, **spec: object) -> Any:
        driver = harness()
        if request.param == "graphs":
            driver.engine._graphs = lambda: Recorded(late=True)
        with monkeypatch.context() as patch:
            if not has_windows:
                patch.setattr(sizing, "chunk_pages", lambda *_: 1 << 30)
            answer = driver.load(gemma, max_sequences=5, **spec)
        assert isinstance(answer, jobs.Done), answer
        model = driver.model()
        assert len(model.plan.tables) == len(model.scheduler.cache.windows) == has_windows
        return driver

    return make


def run(driver: Any, requests: dict[int, dict[str, Any]] = REQUESTS) -> dict[int, list[int]]:
    """Return the outputs; check after each step that every sequence holds its window, and what is ahead of it."""
    driver.sent.clear()
    for number, request in requests.items():
        driver.generate(number, **request)
    model = driver.model()
    most = window_pages(WINDOW, PAGE_TOKENS)
    while driver.engine.busy:
        driver.engine.step()
        for window in model.scheduler.cache.windows:
            held = {s.number: len(window.held(s.slot)) for s in model.scheduler.running.values()}
            settled = (s for s in model.scheduler.running.values() if s.num_settled >= s.num_fill)
            assert all(held[s.number] <= most for s in settled)
            assert sum(held.values()) <= len(held) * most + chunk_pages(model.plan.step_tokens, PAGE_TOKENS)
        model.scheduler.check_integrity()
    assert not driver.failures()
    for window in model.scheduler.cache.windows:
        assert window.pool.num_free == window.pool.num_pages
    found: dict[int, list[int]] = driver.outputs()
    return found


def test_no_token_differs_and_prefixes_are_reused(load: Callable[..., Any]) -> None:
    expected = run(load(has_windows=False))
    driver = load()
    assert run(driver) == expected
    # Once more, from the cache: of a prefix, the last window's pages are wanted and all of the layers without one.
    assert run(driver) == expected
    cached = {row.sequence: row.prompt_cached for row in driver.rows if row.prompt_cached is not None}
    assert cached[1] == (len(SYSTEM) - 1) // PAGE_TOKENS * PAGE_TOKENS
    assert cached[3] == 96
    model = driver.model()
    pages = {table.num_pages for table in model.plan.tables}
    assert pages == {5 * window_pages(WINDOW, PAGE_TOKENS) + chunk_pages(model.plan.step_tokens, PAGE_TOKENS)}


def test_a_turn_resumes_at_its_breakpoint_whatever_came_between(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The window's pages before a breakpoint outlast those that no breakpoint sees, many times as many."""
    short = dataclasses.replace(sizing.CPU_DEFAULTS, step_tokens=64, mixed_step_tokens=32)
    monkeypatch.setattr(sizing, "CPU_DEFAULTS", short)
    driver = load()
    question = SYSTEM[:200]
    run(driver, {0: {"prompt": [*question, *[5, 6, 7] * 60], "max_tokens": 60, "breakpoints": (200,)}})
    others = {number: {"prompt": [number] * 400, "max_tokens": 60} for number in range(1, 5)}
    for number, other in others.items():
        run(driver, {number: other})
    (window,) = driver.model().scheduler.cache.windows
    assert len(others) * 400 > 2 * PAGE_TOKENS * window.pool.num_pages
    turn = {9: {"prompt": [*question, *SYSTEM[250:300]], "max_tokens": 20}}
    found = run(driver, turn)
    assert [row.prompt_cached for row in driver.rows if row.prompt_cached is not None] == [192]
    assert found == run(load(has_windows=False), turn)


def test_multi_step_decodes_read_no_page_too_many(load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepTimer, "step_s", lambda *_: multi_step.MULTI_STEP_S / 40.5)
    monkeypatch.setattr(multi_step, "is_worth_it", lambda *_: True)
    requests = {number: {"prompt": SYSTEM[: 5 + 60 * number], "max_tokens": 110} for number in range(4)}
    assert run(load(), requests) == run(load(has_windows=False), requests)


@pytest.mark.parametrize(("num_pages", "num_windows"), [(45, 5), (32, 2)])
def test_a_cache_that_is_too_small_changes_no_token(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, num_pages: int, num_windows: int
) -> None:
    """Sequences are preempted, or wait for a window, where the context asked for leaves too few for all slots."""
    monkeypatch.setattr(scheduler_module, "GROWTH_PAGES", 0)
    short = dataclasses.replace(sizing.CPU_DEFAULTS, step_tokens=64, mixed_step_tokens=32)
    monkeypatch.setattr(sizing, "CPU_DEFAULTS", short)
    plan = load(has_windows=False).model().plan
    expected = run(load(has_windows=False))
    (table,) = plan.window_tables
    page_bytes = plan.kv_cache_bytes // plan.num_pages - table.page_bytes
    few = num_windows * window_pages(WINDOW, PAGE_TOKENS) + chunk_pages(64, PAGE_TOKENS)
    driver = load(context_tokens=512, kv_cache_bytes=num_pages * page_bytes + few * table.page_bytes)
    model = driver.model()
    assert model.plan.cache_sizes == (num_pages, few, 0)
    assert model.plan.kv_cache_bytes == num_pages * page_bytes + few * table.page_bytes
    assert run(driver) == expected
    assert num_windows == 2 or model.scheduler.num_preemptions


def test_a_nan_clears_the_pages_of_each_table(
    harness: Callable[..., Any], set_engine: Callable[..., None], gemma: pathlib.Path
) -> None:
    set_engine(cpu_kernels=False)
    driver = harness()
    assert isinstance(driver.load(gemma, max_sequences=5), jobs.Done)
    expected = run(driver)
    executor, cache = driver.model().executor, driver.model().scheduler.cache
    embedding = executor.forward.weights.embedding["table"].weight
    sound = embedding[130].clone()
    embedding[130] = float("nan")
    driver.generate(9, [*SYSTEM[:70], 130], 5)
    driver.run()
    assert driver.failures()[9].code == "non_finite_logits"
    embedding[130] = sound
    assert all(each.keys.isfinite().all() for each in executor.caches.layers if each is not None)
    assert cache.windows[0].pool.num_free == cache.windows[0].pool.num_pages
    assert run(driver) == expected


@pytest.mark.parametrize("name", ["gemma-3-270m", "gemma-3-4b"])
@pytest.mark.parametrize("device", ["cpu:0", "cuda:0"])
def test_a_long_context_takes_less_than_a_third(name: str, device: str) -> None:
    """At most 0.3 of the cache of all pages, for as many sequences as there are slots and for one."""
    config = read_config(pathlib.Path(__file__).parents[3] / "packaging" / "kernels" / name)
    page_bytes = PAGE_TOKENS * config.kv_bytes_per_token("bfloat16")
    for spec in (
        ModelSpec("m", "x", dtype="bfloat16", context_tokens=32768),
        ModelSpec("m", "x", dtype="bfloat16", context_tokens=32768, kv_cache_bytes=int(0.3 * 2048 * page_bytes)),
    ):
        plan = plan_memory(config, spec, device, 1 << 40)
        assert plan.context_tokens == 32768
        assert plan.num_pages >= 2048
        assert plan.kv_cache_bytes <= 0.3 * plan.num_pages * page_bytes
