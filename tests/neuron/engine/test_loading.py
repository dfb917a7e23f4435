"""Loads and unloads of a model beside running sequences: steps, errors and memory."""

import gc
import pathlib
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import psutil
import pytest
import torch

from cortex.wire.node import ModelSpec
from neuron.device import jobs
from neuron.engine import engine, loading
from neuron.engine.engine import Engine
from neuron.layers.parameters import Matrix
from neuron.models.parameter_reader import ParameterReader

PROMPT = list(range(3, 43))


def test_a_load_does_not_stall_running_models(driver: Any, tiny_llama: pathlib.Path) -> None:
    driver.generate(1, PROMPT, 60)
    driver.engine.step()
    driver.sent.clear()
    driver.post(jobs.Load(7, ModelSpec("second", "x", dtype="float32"), str(tiny_llama)))
    while not any(isinstance(message, jobs.Done) for message in driver.sent):
        before = len(driver.rows)
        driver.engine.step()
        assert len(driver.rows) == before + 1
    assert 2 < len(driver.rows) < 59


class SlowKernels:
    """A preparation that takes many steps, or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.closed = 0

    def finish(self, driver_version: tuple[int, int]) -> Iterator[None]:
        for _ in range(20):
            yield
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        self.closed += 1


def test_compiling_for_a_load_does_not_stall_running_models(
    driver: Any, tiny_llama: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.set(cpu_kernels=False)
    kernels = SlowKernels()
    monkeypatch.setattr(loading, "Preparation", lambda *_, **__: kernels)
    driver.generate(1, PROMPT, 200)
    driver.post(jobs.Load(7, ModelSpec("second", "test", dtype="float32"), str(tiny_llama)))
    for _ in range(15):
        driver.engine.step()
    assert not kernels.closed
    assert len(driver.outputs()[1]) >= 10
    driver.run()
    assert kernels.closed == 1
    assert any(isinstance(message, jobs.Done) and message.job == 7 for message in driver.sent)


def test_kernels_that_cannot_be_made_fail_the_load_alone(
    driver: Any, tiny_llama: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.set(cpu_kernels=False)
    kernels = SlowKernels(RuntimeError("Triton Error [CUDA]: out of memory"))
    monkeypatch.setattr(loading, "Preparation", lambda *_, **__: kernels)
    answer = driver.load(tiny_llama, "second")
    assert isinstance(answer, jobs.JobFailed)
    assert answer.error.code == "out_of_memory"
    assert kernels.closed == 1
    driver.generate(1, PROMPT, 5)
    driver.run()
    assert len(driver.outputs()[1]) == 5


def test_a_load_that_fails_names_the_reason_and_the_engine_goes_on(
    driver: Any, tiny_llama: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "config.json").write_text((tiny_llama / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((tiny_llama / "model.safetensors").read_bytes()[:-100])
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    for path, spec, code, status in (
        (tmp_path, {}, "corrupt_weights", 422),
        (broken, {}, "corrupt_weights", 422),
        (tmp_path / "absent", {}, "corrupt_weights", 422),
        (tiny_llama, {"dtype": "int2"}, "invalid_value", 400),
        (tiny_llama, {"context_tokens": 513}, "invalid_value", 400),
        (tiny_llama, {"tensor_parallel": 2}, "unprocessable", 422),
        (tiny_llama, {"name": "m"}, "unprocessable", 422),
    ):
        answer = driver.load(path, **{"name": "new", **spec})
        assert isinstance(answer, jobs.JobFailed), (path, spec)
        assert (answer.error.code, answer.error.status) == (code, status)
    driver.free_bytes = 1 << 20
    answer = driver.load(tiny_llama, "new")
    assert isinstance(answer, jobs.JobFailed)
    assert answer.error.code == "model_does_not_fit"
    assert "needs" in answer.error.message
    assert len(driver.output_alone(PROMPT, 3)) == 3


def test_out_of_memory_in_a_load_is_reported_and_freed(
    driver: Any, make_checkpoint: Callable[..., pathlib.Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process took the memory after the plan was made."""
    driver.set(cpu_kernels=False)
    path = make_checkpoint("llama", num_hidden_layers=4)
    matrix, held = ParameterReader._matrix, []

    def scarce(self: ParameterReader, wanted: Matrix) -> Any:
        if ".layers.2." in wanted.tensors[0].name:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        found = matrix(self, wanted)
        held.append(weakref.ref(found))
        return found

    monkeypatch.setattr(ParameterReader, "_matrix", scarce)
    failed = driver.load(path, "other")
    assert isinstance(failed, jobs.JobFailed)
    assert failed.error.code == "out_of_memory"
    assert "Tried to allocate 2.00 GiB" in failed.error.message
    assert held
    assert not [ref for ref in held if ref() is not None], "what was loaded is freed"
    monkeypatch.setattr(ParameterReader, "_matrix", matrix)
    assert isinstance(driver.load(path, "other"), jobs.Done)
    assert len(driver.output_alone(PROMPT, 5)) == 5


def test_the_cache_planned_for_a_model_is_not_free_for_the_next(driver: Any, tiny_llama: pathlib.Path) -> None:
    taken = driver.model().plan.kv_cache_bytes
    driver.post(jobs.QueryMemory(3))
    memory = driver.sent[-1].result
    assert memory.free_bytes == driver.free_bytes - taken
    assert memory.used_bytes > 0
    driver.free_bytes = taken + (1 << 20)
    assert isinstance(driver.load(tiny_llama, "second"), jobs.JobFailed)


def test_the_workspace_on_a_gpu_is_not_free_for_the_next_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step allocates it, which may be after the next load."""
    sent: list[bytes] = []
    gpu = Engine("cuda:0", sent.append, lambda: (1000, 2000), lambda: None)
    held = 0
    monkeypatch.setattr(engine, "used_bytes", lambda device: held)

    def free_bytes() -> int:
        gpu.handle(msgspec.msgpack.encode(jobs.QueryMemory(1)))
        return int(msgspec.msgpack.decode(sent[-1], type=jobs.FromWorker).result.free_bytes)

    assert free_bytes() == 1000
    for name, workspace_bytes in (("a", 70), ("b", 50)):
        plan = types.SimpleNamespace(weights_bytes=200, kv_cache_bytes=100, workspace_bytes=workspace_bytes)
        plan.parts = (plan,)
        gpu._models[name] = types.SimpleNamespace(plan=plan)  # type: ignore[assignment]
    held = 600
    assert free_bytes() == 1000 - 70
    held = 640
    assert free_bytes() == 1000 - 30
    held = 900  # torch keeps freed memory
    assert free_bytes() == 1000


def test_unload_while_loading_ends_both(driver: Any, tiny_llama: pathlib.Path) -> None:
    driver.post(jobs.Load(7, ModelSpec("second", "x"), str(tiny_llama)))
    driver.engine.step()
    driver.post(jobs.Unload(8, "second"))
    assert [type(message) for message in driver.sent[-2:]] == [jobs.JobFailed, jobs.Done]
    assert driver.sent[-2].job == 7
    assert not driver.engine.busy
    assert isinstance(driver.load(tiny_llama, "second"), jobs.Done)


def test_an_unforeseen_error_of_a_load_is_about_the_files(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr("neuron.engine.loading.open_weights", broken)
    driver.load(pathlib.Path("/no/such"), name="other")
    failed = [sent for sent in driver.sent if isinstance(sent, jobs.JobFailed)]
    assert [(sent.error.status, sent.error.code) for sent in failed] == [(422, "load_failed")]
    assert "surprise" in failed[0].error.message


def num_tensors() -> int:
    return sum(type(found) is torch.Tensor for found in gc.get_objects())


@pytest.mark.parametrize("cycles", [12, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
def test_unload_returns_every_byte(
    executor: str, harness: Callable[..., Any], make_checkpoint: Callable[..., pathlib.Path], cycles: int
) -> None:
    """12 MB of weights and some touched cache, loaded and dropped again and again: the process does not grow."""
    path = make_checkpoint("llama", hidden_size=384, intermediate_size=1024, vocab_size=2000, num_hidden_layers=2)
    driver = harness()
    process = psutil.Process()

    def cycle() -> None:
        assert isinstance(driver.load(path), jobs.Done)
        driver.generate(1, PROMPT * 8, 40, temperature=1.0, presence_penalty=0.1)
        driver.run()
        assert len(driver.outputs()[1]) == 40
        driver.post(jobs.Unload(2, "m"))
        driver.sent.clear()

    for _ in range(3):
        cycle()
    tensors = num_tensors()
    before = process.memory_info().rss
    for _ in range(cycles):
        cycle()
    assert num_tensors() == tensors
    # A leak of one model a cycle would be 140 MB.
    assert process.memory_info().rss - before < 8 << 20
