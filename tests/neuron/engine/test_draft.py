"""Draft models: the output is the target's own whatever is proposed, and memory counts for both."""

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cortex.wire.node import ModelSpec
from neuron.device import jobs
from neuron.engine.speculation import Speculation
from neuron.models.config import read_config
from neuron.models.sizing import plan_memory


@pytest.fixture
def other_llama(make_checkpoint: Callable[..., pathlib.Path]) -> pathlib.Path:
    return make_checkpoint("llama", num_hidden_layers=1)


def outputs(harness: Any, path: pathlib.Path, free_bytes: int = 1 << 33, **spec: object) -> tuple[Any, Speculation]:
    driver = harness(free_bytes)
    answer = driver.load(path, **spec)
    assert isinstance(answer, jobs.Done), answer
    random = np.random.default_rng(3)
    for number, size in enumerate((3, 40, 17, 100)):
        prompt = random.integers(3, 131, size).tolist()
        driver.generate(number, prompt, 60)
        driver.generate(10 + number, prompt, 40, temperature=0.9, top_k=20, seed=number)
    driver.generate(20, [5, 6, 7] * 9, 30, frequency_penalty=0.5)
    driver.run()
    assert not driver.failures()
    model = driver.engine._models["m"]
    model.scheduler.check_integrity()
    return driver.outputs(), model.speculation


@pytest.mark.parametrize("kv_cache_tokens", [0, 512])
def test_the_output_is_the_same_with_every_drafter(
    executor: str, harness: Any, tiny_llama: pathlib.Path, other_llama: pathlib.Path, kv_cache_tokens: int,
    set_engine: Callable[..., None], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The same holds in a cache that is too small, where sequences are preempted."""
    limits: dict[str, object] = {"max_sequences": 40}
    if kv_cache_tokens:
        spec = ModelSpec("m", "x", dtype="float32", max_sequences=40)
        plan = plan_memory(read_config(tiny_llama), spec, "cpu:0", 1 << 33, cpu_kernels=executor == "native")
        limits["kv_cache_bytes"] = plan.kv_cache_bytes // plan.num_pages * (kv_cache_tokens // 16)
    set_engine(speculation=False)
    expected, no_drafter = outputs(harness, tiny_llama, **limits)
    assert no_drafter.num_proposed == 0
    set_engine(speculation=True)
    monkeypatch.setattr(Speculation, "_depth", lambda self, decoding, able, available: min(3, max(available)))
    rates = {}
    for draft in (None, tiny_llama, other_llama):
        if kv_cache_tokens and draft is not None:
            spec = ModelSpec("m", "x", dtype="float32", max_sequences=40)
            both = plan_memory(
                read_config(tiny_llama),
                spec,
                "cpu:0",
                1 << 33,
                draft=read_config(draft),
                cpu_kernels=executor == "native",
            )
            page_bytes = sum(part.kv_cache_bytes for part in both.parts) // both.num_pages
            limits["kv_cache_bytes"] = page_bytes * (kv_cache_tokens // 16)
        found, speculation = outputs(harness, tiny_llama, draft=str(draft or ""), **limits)
        assert found == expected
        assert speculation.num_proposed > (20 if draft else 0)
        rates[draft] = speculation.num_accepted / speculation.num_proposed
    # A model drafts for itself; only the batch sizes differ, and float32 products with them.
    assert rates[tiny_llama] > 0.95
    assert rates[other_llama] < 0.5


def test_memory_is_counted_for_both_and_given_back(
    harness: Any, tiny_llama: pathlib.Path, other_llama: pathlib.Path
) -> None:
    config, draft = read_config(tiny_llama), read_config(other_llama)
    spec = ModelSpec("m", "x", dtype="float32")
    alone = plan_memory(config, spec, "cpu:0", 1 << 33)
    both = plan_memory(config, spec, "cpu:0", 1 << 33, draft=draft)
    assert both.draft is not None
    assert both.draft.num_pages == both.num_pages
    assert both.total_bytes > alone.total_bytes
    driver = harness()
    answer = driver.load(tiny_llama, draft=str(other_llama))
    assert answer.result.weights_bytes == both.weights_bytes + both.draft.weights_bytes
    driver.post(jobs.Unload(2, "m"))
    assert isinstance(driver.sent[-1], jobs.Done)


def test_an_unfit_draft_model_is_refused(
    harness: Any, tiny_llama: pathlib.Path, make_checkpoint: Callable[..., pathlib.Path], tmp_path: pathlib.Path
) -> None:
    wide = make_checkpoint("llama", vocab_size=300)
    short = make_checkpoint("llama", max_position_embeddings=64)
    for draft, more, code in (
        (wide, {}, "invalid_value"),
        (short, {"context_tokens": 128}, "invalid_value"),
        (tmp_path, {}, "corrupt_weights"),
    ):
        driver = harness()
        answer = driver.load(tiny_llama, draft=str(draft), **more)
        assert isinstance(answer, jobs.JobFailed), draft
        assert answer.error.code == code
        assert isinstance(driver.load(tiny_llama), jobs.Done), "the engine goes on"
