"""The host's own work per step, without any model: scheduling, planning and messages, at 64 sequences."""

import pathlib

import gguf
import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from neuron.device.jobs import SamplerSettings
from neuron.engine.plan import build_plan
from neuron.engine.scheduler import Limits, Scheduler
from neuron.engine.sequence import Sequence
from neuron.models.gguf import read_header

LIMITS = Limits(
    num_pages=64 * 256, page_tokens=16, context_tokens=4096, max_sequences=64, step_tokens=2048, mixed_step_tokens=512
)


@pytest.fixture
def scheduler() -> Scheduler:
    """64 sequences, of 500 to 3,650 tokens so far; the last of them prefills."""
    found = Scheduler(LIMITS)
    for number in range(64):
        # Prompts of their own: one that begins as another that is being computed would wait for it.
        prompt = np.arange(500 + 50 * number, dtype=np.int32) + 10_000 * number
        found.add(Sequence(number, prompt, 400, frozenset(), SamplerSettings()))
    found.admit()
    for sequence in list(found.running.values())[:-1]:
        sequence.num_computed = sequence.num_settled = sequence.num_prompt
        sequence.append(1)
    return found


def test_schedule(benchmark: BenchmarkFixture, scheduler: Scheduler) -> None:
    """Schedule 63 decodes and a piece of a prompt."""
    step = benchmark(scheduler.schedule)
    assert step is not None
    assert len(step.sequences) == 64
    assert sum(step.num_tokens) == LIMITS.mixed_step_tokens


def test_plan_of_a_mixed_step(benchmark: BenchmarkFixture, scheduler: Scheduler) -> None:
    """The arrays of that step."""
    step = scheduler.schedule()
    assert step is not None
    plan = benchmark(build_plan, step, scheduler.cache)
    assert len(plan.token_ids) == LIMITS.mixed_step_tokens


def test_plan_of_a_decode_step(benchmark: BenchmarkFixture, scheduler: Scheduler) -> None:
    """The arrays of 63 decodes: the step that runs most."""
    scheduler.remove(63)
    step = scheduler.schedule()
    assert step is not None
    plan = benchmark(build_plan, step, scheduler.cache)
    assert len(plan.token_ids) == 63


def test_admit_and_remove(benchmark: BenchmarkFixture) -> None:
    """A sequence of 150 pages in and out."""
    empty = Scheduler(LIMITS)
    prompt = np.arange(2000, dtype=np.int32)

    def admit_and_remove() -> None:
        empty.add(Sequence(1, prompt, 400, frozenset(), SamplerSettings()))
        empty.admit()
        empty.remove(1)

    benchmark(admit_and_remove)
    empty.check_integrity()


def test_gguf_header(benchmark: BenchmarkFixture, tmp_path: pathlib.Path) -> None:
    """A vocabulary of 50,000 tokens, as every load and every start of the daemon reads it."""
    path = tmp_path / "header.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list([f"token{number}" for number in range(50_000)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert len(benchmark(read_header, path).metadata["tokenizer.ggml.tokens"]) == 50_000
