"""Captured steps on this machine's GPU: torch, the driver and pinned memory as they are."""

import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from neuron.device.channel import Channel, socket_pair
from neuron.device.driver import cuda_driver
from neuron.device.loop import DeviceLoop
from neuron.engine import multi_step
from neuron.engine.device_graphs import DeviceGraphs
from neuron.engine.engine import Engine
from neuron.engine.errors import raise_device_fault
from neuron.engine.plan import StepPlan
from neuron.engine.sampler import Draws
from neuron.engine.sequence import Int32Array
from neuron.engine.step_inputs import PENDING, Published, StepInputs
from neuron.engine_settings import EngineSettings
from neuron.models.sizing import PAGE_TOKENS
from neuron.triton_kernels.operations import KERNELS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]

NUM_ROWS = 40
"""More than one warp has threads."""
SAMPLED = list(range(100, 100 + NUM_ROWS))


@pytest.fixture
def loop() -> Iterator[DeviceLoop]:
    theirs, ours = socket_pair()
    daemon = Channel(ours)
    before = torch.cuda.current_stream()
    with DeviceLoop(cuda_driver(), 0, theirs, name="cuda-dev-0") as found:
        torch.cuda.set_stream(torch.cuda.ExternalStream(found.stream))  # type: ignore[no-untyped-call]
        try:
            yield found
        finally:
            torch.cuda.synchronize()
            torch.cuda.set_stream(before)
    daemon.close()


class DecodeSteps:
    """A captured step that samples the same tokens each time, and then takes ``cycles`` of the device's clock."""

    def __init__(self, loop: DeviceLoop, cycles: int = 0) -> None:
        device = torch.device("cuda")
        self.published = Published(NUM_ROWS, device)
        self.inputs = StepInputs(NUM_ROWS, 9, device, self.published, np.zeros(1, np.int32))
        self.graphs = DeviceGraphs(loop)
        ids = torch.tensor(SAMPLED, dtype=torch.int32, device=device)

        def step() -> None:
            KERNELS.begin_step(self.inputs.state)
            KERNELS.end_step(self.inputs.state, ids, PAGE_TOKENS)
            if cycles:
                torch.cuda._sleep(cycles)

        self.graph = self.graphs.capture(step)

    def begin(self, num_steps: int, stops: Int32Array) -> int:
        """Copy the inputs; return the place of the first step."""
        rows = np.arange(NUM_ROWS, dtype=np.int32)
        plan = StepPlan(
            num_decodes=NUM_ROWS,
            token_ids=rows,
            positions=rows,
            slot_mappings=rows[None],
            cu_seqlens=np.arange(NUM_ROWS + 1, dtype=np.int32),
            page_tables=np.zeros((1, NUM_ROWS, 1), np.int32),
            context_lens=rows + 1,
            sampled=rows,
            slots=rows,
            num_output=rows,
            hidden_rows=rows[:0],
            num_steps=num_steps,
            stops=stops,
        )
        nothing, none = np.zeros(NUM_ROWS), np.zeros(NUM_ROWS, np.int32)
        place = self.published.take(num_steps)
        self.inputs.fill(plan, Draws(nothing, nothing, nothing, none, np.zeros(NUM_ROWS, np.uint64), none), place)
        return place


NO_STOPS = np.empty((NUM_ROWS, 0), np.int32)


def test_the_host_sees_tokens_while_the_step_goes_on(loop: DeviceLoop) -> None:
    steps = DecodeSteps(loop, 400_000_000)  # some 0.2 s
    for _ in range(3):
        place = steps.begin(1, NO_STOPS)
        steps.graphs.launch(steps.graph)
        words = steps.published.tokens[place]
        steps.graphs.wait(words[:NUM_ROWS], PENDING)
        assert not torch.cuda.current_stream().query(), "seen only when all was done"
        assert words[:NUM_ROWS].tolist() == SAMPLED
    steps.graphs.close()


def test_steps_advance_every_row_and_publish_each_in_its_place(loop: DeviceLoop) -> None:
    steps = DecodeSteps(loop)
    for _ in range(100):
        place = steps.begin(60, NO_STOPS)
        assert steps.graphs.replay(steps.graph, 60, steps.published.all_ended) == 60
        assert (steps.published.seen[place : place + 60, :NUM_ROWS] == SAMPLED).all()
        assert steps.inputs.state.positions.tolist() == list(range(60, 60 + NUM_ROWS))
    steps.graphs.close()


def test_steps_end_when_no_row_is_left(loop: DeviceLoop) -> None:
    steps = DecodeSteps(loop)
    stops = np.array(SAMPLED, np.int32)[:, None]
    steps.begin(60, stops)
    assert steps.graphs.replay(steps.graph, 60, steps.published.all_ended) < 10
    stops[7] = -1
    steps.begin(60, stops)
    assert steps.graphs.replay(steps.graph, 60, steps.published.all_ended) == 60
    assert steps.inputs.state.positions.tolist() == [67 if row == 7 else row for row in range(NUM_ROWS)]
    steps.graphs.close()


@pytest.mark.parametrize("mistake", ["memory", "a number is read"])
def test_a_capture_that_fails_leaves_the_device_as_it_was(loop: DeviceLoop, mistake: str) -> None:
    x = torch.zeros(4, device="cuda")

    def step() -> None:
        x.add_(1)
        if torch.cuda.is_current_stream_capturing():
            if mistake == "memory":
                torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
            x.sum().item()

    theirs = torch.cuda.current_stream()
    with pytest.raises(torch.OutOfMemoryError if mistake == "memory" else RuntimeError) as caught:
        DeviceGraphs(loop).capture(step)
    raise_device_fault(caught.value)  # no fault
    del caught
    assert torch.cuda.current_stream() == theirs
    assert x.tolist() == [1.0] * 4, "it was run once, and captured once"
    # Memory and graphs work afterwards, and errors are reported as before.
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        graphs = DeviceGraphs(loop)
        graph = graphs.capture(lambda: x.add_(1))
        x.zero_()
        graphs.launch(graph)
        assert x.tolist() == [1.0] * 4
        graphs.close()
        torch.cuda.empty_cache()


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 5}], ids=["greedy", "drawn"])
def test_a_model_generates_the_same_with_graphs_and_without(
    loop: DeviceLoop,
    harness: Callable[..., Any],
    make_checkpoint: Callable[..., pathlib.Path],
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, object],
) -> None:
    """Single, overlapped and multi-step decodes give the same tokens. Contexts are short: none is split."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 304}
    folder = make_checkpoint("llama", num_attention_heads=4, **sizes)
    driver = harness()
    driver.engine = Engine(
        "cuda:0",
        lambda message: driver.sent.append(driver._decoder.decode(message)),
        loop.memory,
        lambda: None,
        channel_fd=loop.channel.fileno(),
        graphs=functools.partial(DeviceGraphs, loop),
        settings=EngineSettings(speculation=False, cuda_graphs=False),
    )

    def generate(name: str) -> dict[int, list[int]]:
        answer = driver.load(folder, name, dtype="bfloat16", max_sequences=4, context_tokens=128)
        assert type(answer).__name__ == "Done", answer
        driver.sent.clear()
        for number in range(4):
            driver.generate(number, list(range(3 + number, 13 + number)), 60, model=name, **settings)
        driver.run()
        assert not driver.failures()
        found: dict[int, list[int]] = driver.outputs()
        return found

    wanted = generate("without")
    driver.set(cuda_graphs=True)
    assert len({tuple(tokens) for tokens in wanted.values()}) == 4
    monkeypatch.setattr(multi_step, "is_worth_it", lambda *_: False)
    launches = loop.launches
    assert generate("one by one") == wanted
    assert loop.launches > launches + 50
    monkeypatch.setattr(multi_step, "is_worth_it", lambda *_: True)
    assert generate("multi-step") == wanted
