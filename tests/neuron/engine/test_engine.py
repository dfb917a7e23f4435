"""The engine through its messages: the outcome of every request, job and fault."""

import array
import pathlib
import re
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from capture_rig import cuda_error

from cortex.wire.node import ModelSpec
from neuron.device import jobs
from neuron.device.driver import DeviceFault
from neuron.device.jobs import SequenceEnd
from neuron.engine import engine
from neuron.engine.engine import Engine
from neuron.engine.native_executor import NativeExecutor
from neuron.models import packed
from neuron.models.decoder import DecoderWeights

PROMPT = list(range(3, 43))
HALF_A_TOKEN = jobs.Generate(1, "m", b"abc", 1, (), jobs.SamplerSettings())


def test_a_load_reports_its_progress_and_its_plan(driver: Any) -> None:
    fractions = [message.fraction for message in driver.sent if isinstance(message, jobs.Progress)]
    assert fractions == sorted(fractions)
    assert fractions[0] == 0
    done = driver.sent[-1]
    assert done.job == 1
    result = done.result
    assert (result.model, result.architecture, result.dtype) == ("m", "llama", "float32")
    assert result.context_tokens == 512
    assert result.weights_bytes == weights_bytes_of(driver)
    # All but page 0 and the one of rows without a sequence.
    caches = caches_of(driver)
    num_pages = driver.model().plan.num_pages
    assert result.kv_cache_bytes == sum(cache[1 : 1 + num_pages].nbytes for cache in caches)
    assert isinstance(driver.model().executor, NativeExecutor) or all(cache.dtype is torch.float32 for cache in caches)


def caches_of(driver: Any) -> list[torch.Tensor]:
    """Return the caches with their pages first."""
    executor = driver.model().executor
    if isinstance(executor, NativeExecutor):
        return [torch.from_numpy(pages) for pages in executor.caches.tables]
    return [tensor for cache in executor.caches.layers for tensor in cache or () if tensor is not None]


def poison(driver: Any, token: int) -> None:
    """Make the embedding of one token NaN."""
    executor = driver.model().executor
    if isinstance(executor, NativeExecutor):
        # The first matrix of the region: float32 blocks of 16 rows.
        hidden = executor.config.hidden_size
        blocks = executor.weights.region[: 4 * packed.padded(131) * hidden].view(np.float32).reshape(-1, hidden, 16)
        blocks[token // 16, :, token % 16] = np.nan
    else:
        executor.forward.weights.embedding["table"].weight[token] = float("nan")


def weights_bytes_of(driver: Any) -> int:
    executor = driver.model().executor
    if isinstance(executor, NativeExecutor):
        return len(executor.weights.region)
    return sum(tensor.nbytes for tensor in tensors_of(executor.forward.weights))


def tensors_of(weights: DecoderWeights) -> list[torch.Tensor]:
    """Return each tensor once: layers share their rotary frequencies."""
    loaded = [each for layer in (weights.embedding, *weights.layers, weights.head) for each in layer.values()]
    tensors = [tensor for each in loaded for tensor in (each if isinstance(each, tuple) else (each,))]
    return list({id(tensor): tensor for tensor in tensors if tensor is not None}.values())


def test_rows_are_one_message_a_step_and_count_the_queue(driver: Any) -> None:
    driver.sent.clear()
    for number in range(20):
        driver.generate(number, PROMPT[: 5 + number], 6)
    driver.run()
    messages = [message for message in driver.sent if isinstance(message, jobs.Tokens)]
    assert len(messages) == len(driver.sent)
    assert messages[0].running == 16
    assert messages[0].waiting == 4
    assert (messages[-1].running, messages[-1].waiting) == (0, 0)
    assert all(len(message.rows) <= 16 for message in messages)
    assert all(len(tokens) == 6 for tokens in driver.outputs().values())
    assert set(driver.ends().values()) == {SequenceEnd.LENGTH}
    first_of: dict[int, jobs.TokenRow] = {}
    for row in driver.rows:
        assert (row.prompt_cached is not None) == (row.sequence not in first_of)
        first_of.setdefault(row.sequence, row)
    # The last four waited for a slot, and by then the first page of them all was in the cache.
    assert [first_of[number].prompt_cached for number in range(20)] == [0] * 16 + [16] * 4


def test_an_eos_ends_a_sequence_and_is_not_among_its_ids(driver: Any) -> None:
    plain = driver.output_alone(PROMPT, 30)
    stop = plain[7]
    driver.generate(1, PROMPT, 30, eos=(stop, 130))
    driver.run()
    assert driver.outputs()[1] == plain[: plain.index(stop)]
    assert driver.ends() == {1: SequenceEnd.STOP}
    # The first token may be an end as well.
    driver.sent.clear()
    driver.generate(2, PROMPT, 30, eos=(plain[0],))
    driver.run()
    assert driver.rows == [jobs.TokenRow(2, b"", SequenceEnd.STOP, 32)]


def test_the_context_bounds_the_output(driver: Any) -> None:
    driver.generate(1, [5] * 500, 1000)
    driver.run()
    assert len(driver.outputs()[1]) == 12
    assert driver.ends() == {1: SequenceEnd.LENGTH}


@pytest.mark.parametrize(
    ("request_of", "code", "status", "named"),
    [
        (lambda d: d.generate(1, [5] * 512), "context_length_exceeded", 400, "512"),
        (lambda d: d.generate(1, []), "invalid_value", 400, "no tokens"),
        (lambda d: d.generate(1, [5, 131]), "invalid_value", 400, "131"),
        (lambda d: d.generate(1, [5, -1]), "invalid_value", 400, "131"),
        (lambda d: d.generate(1, PROMPT, 0), "invalid_value", 400, "max_tokens"),
        (lambda d: d.generate(1, PROMPT, temperature=float("nan")), "invalid_value", 400, "temperature"),
        (lambda d: d.generate(1, PROMPT, model="other"), "model_not_found", 404, "other"),
        (lambda d: d.post(HALF_A_TOKEN), "invalid_value", 400, "tokens"),
    ],
)  # fmt: skip
def test_a_request_that_can_never_be_served_fails_at_once(
    driver: Any, request_of: Callable[[Any], None], code: str, status: int, named: str
) -> None:
    request_of(driver)
    error = driver.failures()[1]
    assert (error.code, error.status) == (code, status)
    assert named in error.message
    assert not driver.engine.busy
    assert len(driver.output_alone(PROMPT, 3)) == 3


def test_neighbours_and_chunks_change_no_token(driver: Any) -> None:
    settings = [{"temperature": 0.0}, {"temperature": 0.9, "seed": 5}, {"temperature": 1.0, "seed": 5, "top_p": 0.9},
                {"temperature": 1.0, "seed": 6, "repetition_penalty": 1.2}]  # fmt: skip
    requests = [(PROMPT[: 1 + 3 * i], settings[i % 4]) for i in range(12)]
    alone = [driver.output_alone(prompt, 20, **sampler) for prompt, sampler in requests]
    for number, (prompt, sampler) in enumerate(requests):
        driver.generate(number, prompt, 20, **sampler)
        driver.engine.step()
    driver.run()
    assert [driver.outputs()[number] for number in range(12)] == alone
    assert driver.output_alone(PROMPT, 20, temperature=1.0, seed=1) != driver.output_alone(
        PROMPT, 20, temperature=1.0, seed=2
    )


# ------------------------------------------------------------------ cancel


def cancelled(driver: Any, number: int) -> None:
    """Cancel and check that it took effect at once."""
    before = len(driver.sent)
    driver.post(jobs.Cancel(number))
    rows = driver.sent[before].rows
    assert rows == (jobs.TokenRow(number, b"", SequenceEnd.CANCELLED),)
    driver.model().scheduler.check_integrity()
    assert number not in driver.model().scheduler.running
    assert number not in driver.model().scheduler.waiting


def test_cancel_while_waiting_prefilling_and_decoding(harness: Callable[..., Any], tiny_llama: pathlib.Path) -> None:
    driver = harness()
    driver.load(tiny_llama, prefix_cache=False)  # or the prompts would wait for the first
    plain = driver.output_alone(PROMPT, 10)
    scheduler = driver.model().scheduler
    for number in range(16):
        driver.generate(number, PROMPT, 10)
    driver.generate(16, PROMPT, 10)
    driver.engine.step()
    assert 16 in scheduler.waiting
    cancelled(driver, 16)
    # 16 prompts of 40 tokens do not fit one step of 512: some are still prefilling.
    prefilling = next(s.number for s in scheduler.running.values() if s.num_computed < s.num_prompt)
    cancelled(driver, prefilling)
    driver.engine.step()
    decoding = next(s.number for s in scheduler.running.values() if s.num_output > 1)
    cancelled(driver, decoding)
    driver.run()
    survivors = set(range(16)) - {prefilling, decoding}
    assert {number for number, end in driver.ends().items() if end is SequenceEnd.LENGTH} == survivors
    assert all(driver.outputs()[number] == plain for number in survivors)
    sent = len(driver.sent)
    for number in (0, 16, 4711):
        driver.post(jobs.Cancel(number))
    assert len(driver.sent) == sent, "finished and unknown sequences are ignored"
    assert scheduler.cache.pool.num_free == scheduler.limits.num_pages


def test_a_number_that_runs_already_is_refused_and_the_first_goes_on(driver: Any) -> None:
    driver.generate(1, PROMPT, 5)
    driver.generate(1, PROMPT, 5)
    assert driver.failures()[1].status == 500
    driver.run()
    assert len(driver.outputs()[1]) == 5


def test_a_full_queue_fails_at_once_and_so_does_a_misfit(harness: Callable[..., Any], tiny_llama: pathlib.Path) -> None:
    driver = harness(max_waiting=3)
    driver.load(tiny_llama, max_sequences=2)
    for number in range(7):
        driver.generate(number, PROMPT, 5)
    driver.generate(7, [5] * 600, 5)
    # Two will have a slot, three may wait.
    assert {number: error.code for number, error in driver.failures().items()} == {
        5: "rate_limit_exceeded", 6: "rate_limit_exceeded", 7: "context_length_exceeded"
    }  # fmt: skip
    assert driver.failures()[5].status == 429
    assert driver.failures()[5].retry_after_s
    driver.engine.step()
    driver.generate(8, PROMPT, 5)
    assert driver.failures()[8].status == 429, "no sequence has ended yet"
    driver.post(jobs.Cancel(4))
    driver.generate(9, PROMPT, 5)
    assert 9 not in driver.failures()
    driver.run()
    assert {number for number, end in driver.ends().items() if end is SequenceEnd.LENGTH} == {0, 1, 2, 3, 9}


# ------------------------------------------------------------------ errors within a step


def test_a_nan_is_its_own_sequences_error(driver: Any) -> None:
    """A token's embedding is NaN: sequences with it fail; others in the batch, or on the pages later, do not."""
    plain = {number: driver.output_alone(PROMPT[: 10 + number], 30) for number in range(4)}
    poison(driver, 100)
    for number in range(4):
        driver.generate(number, PROMPT[: 10 + number], 30)
    driver.generate(50, [*PROMPT, 100, *PROMPT], 30)
    driver.engine.step()
    for number in range(51, 58):
        driver.generate(number, [100] * 33, 30)
    driver.run()
    assert sorted(driver.failures()) == [50, *range(51, 58)]
    assert {error.code for error in driver.failures().values()} == {"non_finite_logits"}
    assert {number: driver.outputs()[number] for number in range(4)} == plain
    assert not any(cache.isnan().any() for cache in caches_of(driver))
    driver.sent.clear()
    for number in range(60, 76):
        driver.generate(number, PROMPT[:11], 30)
    driver.run()
    assert all(driver.outputs()[number] == plain[1] for number in range(60, 76))


def test_a_nan_in_a_chunk_fails_before_the_prompt_is_done(driver: Any) -> None:
    poison(driver, 100)
    driver.generate(1, PROMPT[:5], 400)
    driver.engine.step()
    driver.generate(2, [100] * 300, 5)
    driver.engine.step()
    assert driver.failures()[2].code == "non_finite_logits"


def test_an_exception_in_a_step_fails_its_sequences_alone(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = driver.model().executor
    run = executor.launch

    def fail_once(plan: Any) -> Any:
        monkeypatch.setattr(executor, "launch", run)
        raise ValueError("a broken kernel")

    driver.generate(1, PROMPT, 5)
    driver.engine.step()
    monkeypatch.setattr(executor, "launch", fail_once)
    driver.generate(2, PROMPT, 5)
    driver.run()
    assert set(driver.failures()) == {1, 2}
    assert "a broken kernel" in driver.failures()[1].message
    assert driver.model().scheduler.cache.pool.num_free == driver.model().scheduler.limits.num_pages
    assert len(driver.output_alone(PROMPT, 5)) == 5


def test_running_out_of_memory_is_temporary(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(plan: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA error: out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(driver.model().executor, "launch", fail)
    driver.generate(1, PROMPT, 5)
    driver.run()
    assert driver.failures()[1].status == 503
    assert driver.failures()[1].retry_after_s


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be reported later"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        DeviceFault("cuGraphLaunch", 700, "CUDA_ERROR_ILLEGAL_ADDRESS"),
    ],
    ids=str,
)
def test_a_device_fault_leaves_the_engine(driver: Any, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(plan: Any) -> Any:
        raise error

    monkeypatch.setattr(driver.model().executor, "launch", fail)
    driver.generate(1, PROMPT, 5)
    with pytest.raises(DeviceFault):
        driver.run()


def test_a_device_fault_is_recognised_at_every_call(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any later call of torch reports it, such as clearing a page or freeing memory."""

    def fail(*_: object) -> None:
        raise cuda_error(700, "an illegal memory access was encountered")

    with monkeypatch.context() as clearing:
        clearing.setattr(driver.model().executor, "clear", fail)
        poison(driver, 100)
        driver.generate(1, [*PROMPT, 100], 5)
        with pytest.raises(DeviceFault, match="illegal memory access") as caught:
            driver.run()
    assert caught.value.code == 700
    monkeypatch.setattr(engine, "return_freed_memory", fail)
    with pytest.raises(DeviceFault, match="illegal memory access"):
        driver.post(jobs.Unload(9, "m"))


# ------------------------------------------------------------------ jobs


def test_two_models_run_round_robin(driver: Any, make_checkpoint: Callable[..., pathlib.Path]) -> None:
    other = make_checkpoint("qwen3")
    assert isinstance(driver.load(other, "other"), jobs.Done)
    alone = {name: [] for name in ("m", "other")}
    for name in alone:
        driver.generate(1, PROMPT, 12, model=name)
        driver.run()
        alone[name] = driver.outputs()[1]
        driver.sent.clear()
    driver.generate(1, PROMPT, 12)
    driver.generate(2, PROMPT, 12, model="other")
    driver.run()
    assert driver.outputs() == {1: alone["m"], 2: alone["other"]}
    assert [row.sequence for row in driver.rows] == [1, 2] * 12


def test_unload_cancels_and_frees(driver: Any) -> None:
    for number in range(20):
        driver.generate(number, PROMPT, 50)
    driver.engine.step()
    driver.post(jobs.Unload(9, "m"))
    assert set(driver.ends()) == set(range(20))
    assert set(driver.ends().values()) == {SequenceEnd.CANCELLED}
    assert driver.sent[-1] == jobs.Done(9)
    assert not driver.engine.busy
    driver.generate(50, PROMPT)
    assert driver.failures()[50].code == "model_not_found"
    driver.post(jobs.Unload(10, "m"))
    assert driver.sent[-1].error.code == "model_not_found"


def test_shutdown_cancels_everything_and_stops(driver: Any) -> None:
    driver.generate(1, PROMPT, 50)
    driver.engine.step()
    driver.post(jobs.Shutdown())
    assert driver.ends() == {1: SequenceEnd.CANCELLED}
    assert driver.stopped
    assert not driver.engine.busy


def test_an_unreadable_message_fails_its_sender(driver: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The worker and its sequences go on; the sequence or job that the message names fails."""
    driver.generate(1, PROMPT, 5)
    driver.engine.step()
    spec = msgspec.to_builtins(ModelSpec("n", "x"))
    packed = msgspec.msgpack.encode
    for message in (
        *(b"\xc1", b"", b"\xff" * 100, b"\x91" * 5000, packed([]), packed({}), packed({"type": "dance"})),
        packed({"type": "generate", "sequence": 7, "prompt": "no"}),
        packed({"type": "generate", "sequence": 1}),
        packed({"type": "embed", "sequence": 8, "pooling": "best"}),
        packed({"type": "load", "job": 9, "spec": {**spec, "id": "a\nb"}, "path": "x"}),
        packed({"type": "load", "job": 10, "spec": {**spec, "max_sequences": 1 << 60}, "path": "x"}),
    ):
        driver.engine.handle(message)
    assert {number: error.status for number, error in driver.failures().items()} == {7: 400, 8: 400}
    failed = [sent for sent in driver.sent if isinstance(sent, jobs.JobFailed)]
    assert [(sent.job, sent.error.status) for sent in failed] == [(9, 400), (10, 400)]
    assert "cannot be read" in caplog.text
    driver.run()
    assert len(driver.outputs()[1]) == 5


def test_an_exception_in_one_sequences_outcome_is_its_own(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.generate(1, PROMPT, 5)
    driver.generate(2, PROMPT, 5)
    driver.engine.step()
    proceed = driver.model()._continue

    def fail(sequence: Any, *rest: Any) -> None:
        if sequence.number == 1:
            raise ValueError("a token of no kind")
        proceed(sequence, *rest)

    monkeypatch.setattr(driver.model(), "_continue", fail)
    driver.run()
    assert {number: error.code for number, error in driver.failures().items()} == {1: "engine_error"}
    assert len(driver.outputs()[2]) == 5
    assert driver.model().scheduler.cache.pool.num_free == driver.model().scheduler.limits.num_pages


def test_ids_are_int32_in_machine_order(driver: Any) -> None:
    driver.generate(1, PROMPT, 3)
    driver.run()
    joined = b"".join(row.ids for row in driver.rows)
    assert np.frombuffer(joined, np.int32).tolist() == array.array("i", joined).tolist() == driver.outputs()[1]


def test_every_job_of_the_channel_is_handled() -> None:
    """A message type that is added to the channel must reach the engine's match."""
    source = pathlib.Path(engine.__file__).read_text()
    for job in jobs.ToWorker.__args__:
        assert re.search(rf"case .*\b{job.__name__}\(\)", source)
    assert Engine.handle.__doc__
