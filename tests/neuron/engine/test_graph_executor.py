"""Steps as graphs: the same tokens, the right graph, multi-step decode, and single launches without memory for one.

There is no GPU here, so a graph is the captured function, called again.
"""

import dataclasses
import gc
import pathlib
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from capture_rig import cuda_error
from graph_rig import ByDefinition, Recorded, captured

from neuron.device import jobs
from neuron.device.driver import DeviceFault, DriverError
from neuron.engine import multi_step
from neuron.engine.graph_executor import GraphExecutor, buckets
from neuron.engine.multi_step import MultiStep
from neuron.engine.speculation import Speculation
from neuron.engine.step_timer import StepTimer
from neuron.models import prebuild
from neuron.models.decoder import Decoder
from neuron.triton_kernels import dispatch
from neuron.triton_kernels.launch import recording, target_for
from neuron.triton_kernels.operations import KERNELS


@pytest.fixture(autouse=True)
def kernels(set_engine: Callable[..., None]) -> None:
    set_engine(cpu_kernels=False, speculation=False)


@pytest.fixture
def with_graphs(
    harness: Callable[..., Any], tiny_llama: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    def make(graphs: Recorded, **spec: object) -> Any:
        driver = harness()
        driver.engine._graphs = lambda: graphs
        driver.set(overlap_steps=graphs.late)
        operations = ByDefinition()
        monkeypatch.setattr(dispatch, "operations_for", lambda *_, **__: operations)
        driver.load(tiny_llama, dtype="float32", max_sequences=6, **spec)
        assert isinstance(driver.engine._models["m"].executor, GraphExecutor)
        return driver

    return make


def ask(driver: Any, num_tokens: int = 20, count: int = 5, **settings: object) -> dict[int, list[int]]:
    driver.sent.clear()
    for number in range(count):
        driver.generate(number, list(range(3 + number, 9 + 7 * number)), num_tokens - 3 * number, **settings)
    driver.run()
    assert not driver.failures()
    found: dict[int, list[int]] = driver.outputs()
    return found


def expected(harness: Callable[..., Any], tiny_llama: pathlib.Path, **settings: object) -> dict[int, list[int]]:
    plain = harness()
    plain.load(tiny_llama, dtype="float32", max_sequences=6)
    return ask(plain, **settings)


SETTINGS: list[dict[str, object]] = [
    {},
    {"temperature": 1.0, "seed": 7, "top_k": 20},
    {"temperature": 0.8, "seed": -3, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 0.9, "seed": 5, "repetition_penalty": 1.3, "logit_bias": ((5, 3.0), (9, -100.0))},
    {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    {"temperature": 1.0, "seed": 11, "top_logprobs": 3},
]


@pytest.fixture
def single_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_step, "MULTI_STEP_S", 0.0)


@pytest.fixture
def ten_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have multi-step decodes of ten steps, however fast the machine is."""
    monkeypatch.setattr(StepTimer, "step_s", lambda *_: multi_step.MULTI_STEP_S / 10.5)
    monkeypatch.setattr(multi_step, "is_worth_it", lambda *_: True)


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_graphs_give_the_tokens_of_single_launches(
    harness: Callable[..., Any],
    tiny_llama: pathlib.Path,
    with_graphs: Callable[..., Any],
    set_engine: Callable[..., None],
    single_steps: None,
    settings: dict[str, object],
    overlaps: bool,
) -> None:
    """Sample in the graph or behind it, read at once or a step later; with seeds too."""
    set_engine(cuda_graphs=False)
    nothing = Recorded()
    wanted = ask(with_graphs(nothing), **settings)
    assert not nothing.launched
    set_engine(cuda_graphs=True)
    assert wanted == expected(harness, tiny_llama, **settings)
    graphs = Recorded(late=overlaps)
    driver = with_graphs(graphs)
    assert driver.model().executor.overlaps == overlaps
    assert ask(driver, **settings) == wanted
    # One capture a step, the largest first; a step took the smallest graph that held its rows.
    assert list(graphs.sizes.values()) == [6, 4, 2, 1] == buckets(6)
    assert graphs.launched[0] == 6
    assert set(graphs.launched) >= {6, 4, 2}
    driver.post(jobs.Unload(9, "m"))
    assert not graphs.steps


def test_rows_of_all_kinds_share_a_step(with_graphs: Callable[..., Any], set_engine: Callable[..., None]) -> None:
    """A row with a penalty changes nothing for its neighbours, in this step or the next."""

    def run(driver: Any) -> dict[int, list[int]]:
        for number, settings in enumerate(SETTINGS):
            driver.generate(number, list(range(3 + number, 30)), 12 + 3 * number, **settings)
        driver.run()
        found: dict[int, list[int]] = driver.outputs()
        return found

    set_engine(cuda_graphs=False)
    wanted = run(with_graphs(Recorded()))
    set_engine(cuda_graphs=True)
    for late in (False, True):
        driver = with_graphs(Recorded(late=late))
        assert run(driver) == wanted
        driver.post(jobs.Unload(9, "m"))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_sampling_in_torch_can_be_selected(
    harness: Callable[..., Any],
    tiny_llama: pathlib.Path,
    with_graphs: Callable[..., Any],
    set_engine: Callable[..., None],
    settings: dict[str, object],
) -> None:
    set_engine(device_sampling=False)
    wanted = expected(harness, tiny_llama, **settings)
    graphs = Recorded()
    driver = with_graphs(graphs)
    assert ask(driver, **settings) == wanted
    assert graphs.launched
    assert not graphs.replays


def test_eager_operations_have_no_graphs(harness: Callable[..., Any], tiny_llama: pathlib.Path) -> None:
    """Eager attention takes host data, as for float32 on a GPU and without Triton."""
    wanted = expected(harness, tiny_llama)
    driver, graphs = harness(), Recorded()
    driver.engine._graphs = lambda: graphs
    driver.load(tiny_llama, dtype="float32", max_sequences=6)
    assert isinstance(driver.engine._models["m"].executor, GraphExecutor)
    assert ask(driver) == wanted
    assert not graphs.steps


# ------------------------------------------------------------------ multi-step decode


EOS = {0: 9, 2: 4}
"""The sequences that end at the token which, left alone, they have at this place."""


def ask_some_to_stop(driver: Any, plain: dict[int, list[int]]) -> tuple[dict[int, list[int]], Any]:
    driver.sent.clear()
    for number in range(4):
        eos = (plain[number][EOS[number]], 127) if number in EOS else ()
        driver.generate(number, list(range(3 + number, 9 + 7 * number)), 40 - 3 * number, eos=eos, temperature=1.0)
    driver.run()
    return driver.outputs(), driver.ends()


@pytest.mark.parametrize("overlaps", [False, True])
def test_multi_step_samples_the_tokens_of_single_steps(
    with_graphs: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, ten_steps: None, overlaps: bool
) -> None:
    graphs = Recorded(late=overlaps)
    driver = with_graphs(graphs)
    plain = ask(driver, 40, 4, temperature=1.0)
    assert (10, 10) in graphs.replays
    stopped = ask_some_to_stop(driver, plain)
    with monkeypatch.context() as without:
        without.setattr(MultiStep, "num_steps", lambda *_: 1)
        seen = len(graphs.replays)
        assert ask(driver, 40, 4, temperature=1.0) == plain
        assert ask_some_to_stop(driver, plain) == stopped
        assert len(graphs.replays) == seen
    ends = {number: jobs.SequenceEnd.STOP if number in EOS else jobs.SequenceEnd.LENGTH for number in range(4)}
    assert stopped[1] == ends
    assert not driver.engine.busy


def test_a_row_that_ends_is_frozen_and_the_others_go_on(with_graphs: Callable[..., Any], ten_steps: None) -> None:
    graphs = Recorded()
    driver = with_graphs(graphs)
    plain = ask(driver, 40, 2)
    driver.sent.clear()
    driver.generate(0, list(range(3, 9)), 40, eos=(plain[0][3],))
    driver.generate(1, list(range(4, 16)), 37)
    driver.run()
    first = plain[0].index(plain[0][3])
    assert driver.outputs() == {0: plain[0][:first], 1: plain[1]}
    # The first multi-step decode went on for the row that was left.
    assert [done for _, done in graphs.replays if done != 10] == [done for asked, done in graphs.replays if asked < 10]


def test_multi_step_ends_when_no_row_is_left(with_graphs: Callable[..., Any], ten_steps: None) -> None:
    graphs = Recorded()
    driver = with_graphs(graphs)
    plain = ask(driver, 40, 1)[0]
    assert len(set(plain[:3])) == 3
    driver.sent.clear()
    graphs.replays.clear()
    driver.generate(0, list(range(3, 9)), 40, eos=(plain[2],))
    driver.run()
    assert driver.outputs() == {0: plain[:2]}
    assert graphs.replays == [(10, 2)]
    assert driver.ends() == {0: jobs.SequenceEnd.STOP}


def test_a_message_of_the_daemon_cuts_multi_step(with_graphs: Callable[..., Any], ten_steps: None) -> None:
    graphs = Recorded()
    driver = with_graphs(graphs)
    plain = ask(driver, 40, 2)
    graphs.replays.clear()
    graphs.message_after = 3
    assert ask(driver, 40, 2) == plain
    assert {done for asked, done in graphs.replays if asked > 3} == {3}


def test_a_fault_in_the_middle_of_multi_step_is_the_devices(with_graphs: Callable[..., Any], ten_steps: None) -> None:
    graphs = Recorded()
    driver = with_graphs(graphs)
    driver.generate(1, [3, 4, 5], 60)
    driver.engine.step()
    graphs.fail_at = 5
    with pytest.raises(DeviceFault, match="cuGraphLaunch returned 719"):
        driver.run()
    assert len(graphs.launched) == 4


def test_a_nan_in_the_middle_of_multi_step(
    with_graphs: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, ten_steps: None
) -> None:
    driver = with_graphs(Recorded())
    plain = ask(driver, 30, 2)
    executor = driver.engine._models["m"].executor
    logits = Decoder.logits

    def broken(forward: Decoder, hidden: torch.Tensor) -> torch.Tensor:
        found = logits(forward, hidden)
        # The row of the longer context, in the middle of the second multi-step decode.
        counters = [bucket.inputs.state.counters for bucket in executor._buckets.values()]
        if any(len(at) == len(found) and int(at[0]) == 14 for at in counters):
            found[0, 3] = torch.nan
        return found

    monkeypatch.setattr(Decoder, "logits", broken)
    driver.sent.clear()
    driver.generate(0, list(range(3, 9)), 30)
    driver.generate(1, list(range(4, 16)), 30)
    driver.run()
    assert set(driver.failures()) == {1}
    assert driver.outputs()[0] == plain[0]
    assert plain[1][: len(driver.outputs().get(1, []))] == driver.outputs().get(1, [])


@pytest.mark.parametrize("capacity", [0, 1])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "no memory for a graph of"),
        (DriverError("cuGraphInstantiateWithFlags", 2, "CUDA_ERROR_OUT_OF_MEMORY"), "no memory for a graph of"),
        (cuda_error(901, "operation failed due to a previous error during capture"), "no graph of"),
        (RuntimeError("a mistake of ours"), "no graph of"),
    ],
    ids=["memory", "memory of the driver", "capture", "mistake"],
)
def test_a_step_that_cannot_be_captured_is_launched_singly(
    harness: Callable[..., Any],
    tiny_llama: pathlib.Path,
    with_graphs: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
    capacity: int,
    error: Exception,
    message: str,
) -> None:
    wanted = expected(harness, tiny_llama)
    graphs = Recorded(capacity, error)
    driver = with_graphs(graphs)
    assert ask(driver) == wanted
    assert list(graphs.sizes.values()) == [6][:capacity]
    assert set(graphs.launched) == {6} if capacity else not graphs.launched
    assert caplog.text.count(message) == 1
    assert caplog.text.count(str(error)) == 1


@pytest.mark.parametrize("capacity", [0, 99])
def test_page_0_pads_page_tables_and_stays_zero(with_graphs: Callable[..., Any], capacity: int) -> None:
    """The run before a capture writes to it, even if the capture fails."""
    graphs = Recorded(capacity)
    driver = with_graphs(graphs)
    eager = driver.engine._models["m"].executor._eager
    # The token of the capture's run, which transformers initialises to zero.
    eager.forward.weights.embedding["table"].weight[0] = 1.0
    ask(driver, 8, 2)
    assert bool(graphs.steps) == bool(capacity)
    keys = [cache.keys for cache in eager.caches.layers if cache is not None]
    assert all(each[1:].any() for each in keys)
    assert not any(each[0].any() for each in keys)


@pytest.mark.parametrize(
    "error",
    [DeviceFault("cuGraphInstantiateWithFlags", 700, "x"), cuda_error(700, "an illegal memory access")],
    ids=str,
)
def test_a_fault_in_a_capture_is_the_devices(with_graphs: Callable[..., Any], error: Exception) -> None:
    driver = with_graphs(Recorded(0, error))
    driver.generate(1, [3, 4, 5], 20)
    with pytest.raises(DeviceFault):
        driver.run()


def test_the_inputs_of_a_graph_outlive_its_capture(with_graphs: Callable[..., Any]) -> None:
    """On a device a graph holds addresses only and keeps no tensor alive."""
    graphs = Recorded()
    driver = with_graphs(graphs)
    ask(driver)
    read = [
        weakref.ref(part)
        for step in graphs.steps.values()
        for cell in captured(step).values()
        if dataclasses.is_dataclass(cell)
        for part in (getattr(cell, field.name) for field in dataclasses.fields(cell))
        if isinstance(part, torch.Tensor)
    ]
    assert len(read) > 4 * 10
    graphs.steps.clear()
    gc.collect()
    assert all(tensor() is not None for tensor in read)
    assert driver.engine._models


def test_a_fault_of_a_launch_is_the_devices(with_graphs: Callable[..., Any]) -> None:
    graphs = Recorded()
    graphs.fail_at = 3
    driver = with_graphs(graphs)
    driver.generate(1, [3, 4, 5], 20)
    with pytest.raises(DeviceFault, match="cuGraphLaunch returned 719"):
        driver.run()


def test_graphs_can_be_turned_off(with_graphs: Callable[..., Any], set_engine: Callable[..., None]) -> None:
    set_engine(cuda_graphs=False)
    graphs = Recorded()
    assert len(ask(with_graphs(graphs))) == 5
    assert not graphs.launched


def test_a_cancelled_sequence_leaves_the_others_graphs(
    harness: Callable[..., Any], tiny_llama: pathlib.Path, with_graphs: Callable[..., Any]
) -> None:
    wanted = expected(harness, tiny_llama)
    driver = with_graphs(Recorded())
    for number in range(5):
        driver.generate(number, list(range(3 + number, 9 + 7 * number)), 20 - 3 * number)
    for _ in range(6):
        driver.engine.step()
    driver.post(jobs.Cancel(2))
    driver.run()
    found = driver.outputs()
    assert {n: found[n] for n in (0, 1, 3, 4)} == {n: wanted[n] for n in (0, 1, 3, 4)}


def test_a_captured_step_launches_the_kernels_compiled_for_it(
    harness: Callable[..., Any], tiny_llama: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variants are listed from tensors without memory: those of a step's inputs must be aligned like them."""
    monkeypatch.setattr(dispatch, "operations_for", lambda *_, **__: KERNELS)
    driver = harness()
    driver.engine._graphs = Recorded
    driver.load(tiny_llama, dtype="bfloat16", max_sequences=6)
    model = driver.engine._models["m"]
    listed = prebuild.variants(model.executor.config, model.plan, 80)
    for size in (1, 2, 3, 5, 6):
        with recording(target_for(80)) as recorded:  # a CPU has no dependent launch
            model.executor._capture(size)
        assert {v.kernel.partition(":")[2] for v in recorded} > {"sample_kernel", "_end_kernel"}
        assert set(recorded) <= set(listed)


def test_a_step_may_follow_one_with_more_rows_than_sequences(
    with_graphs: Callable[..., Any],
    set_engine: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    single_steps: None,
) -> None:
    """Draft tokens are rows of their own, and the last row of a prompt stands behind them."""
    set_engine(speculation=True)
    num_drafts: list[int] = []

    def propose(self: Any, decoding: list[Any], can_verify: Any, num_rows: int, reserve: Callable[..., int]) -> None:
        able = [sequence for sequence in decoding if not sequence.num_awaited and can_verify(sequence.slot)]
        for sequence in able[:1]:
            sequence.drafts = np.full(min(9, num_rows, reserve(sequence, 9)), 5, np.int32)
            num_drafts.append(len(sequence.drafts))

    monkeypatch.setattr(Speculation, "propose", propose)
    monkeypatch.setattr(Speculation, "learn", lambda *_: None)

    def run(driver: Any) -> dict[int, list[int]]:
        driver.generate(0, list(range(3, 9)), 30)
        for _ in range(5):
            driver.engine.step()
        # Steps in flight are settled first, where steps are short; then they are not.
        with monkeypatch.context() as short:
            short.setattr(multi_step, "is_worth_it", lambda *_: True)
            driver.generate(1, list(range(4, 16)), 30)
            driver.engine.step()
        driver.run()
        assert not driver.failures()
        found: dict[int, list[int]] = driver.outputs()
        return found

    monkeypatch.setattr(multi_step, "is_worth_it", lambda *_: False)
    plain = run(with_graphs(Recorded()))
    num_drafts.clear()
    graphs = Recorded(late=True)
    driver = with_graphs(graphs)
    assert run(driver) == plain
    assert num_drafts[0] == 9
