"""Captures: the contents of a graph; error, stream and allocators after a capture that fails."""

from collections.abc import Callable, Iterator

import pytest
import torch
from capture_rig import UNSUPPORTED, VOID, Cuda

from neuron.device import _fake_driver as fake  # type: ignore[attr-defined]
from neuron.device.channel import Channel, socket_pair
from neuron.device.driver import DriverError
from neuron.device.loop import DeviceLoop
from neuron.engine.device_graphs import DeviceGraphs
from neuron.engine.errors import raise_device_fault


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    found = Cuda()
    found.install(monkeypatch)
    return found


@pytest.fixture
def loop(cuda: Cuda) -> Iterator[DeviceLoop]:
    fake.reset(faults_stick=False)
    theirs, ours = socket_pair()
    daemon = Channel(ours)
    with DeviceLoop(fake.capsule(), 0, theirs, name="cuda-dev-0") as found:
        cuda.default = cuda.current  # torch's default stream
        with cuda.stream(torch.cuda.Stream()):  # type: ignore[arg-type]
            yield found
    daemon.close()
    assert fake.misuse() == 0
    fake.reset()


def step_of(cuda: Cuda, act: Callable[[Cuda], None] | None = None) -> Callable[[], None]:
    """Return a step of two kernels that does ``act`` behind them while it is captured."""

    def step() -> None:
        cuda.launch("first")
        cuda.launch("last")
        if act is not None and cuda.current.capture is not None:
            act(cuda)

    return step


def test_a_step_runs_once_and_is_captured_on_a_stream_of_its_own(cuda: Cuda, loop: DeviceLoop) -> None:
    graphs, theirs = DeviceGraphs(loop), cuda.current
    graph = graphs.capture(step_of(cuda, Cuda.allocate))
    assert cuda.done == ["first", "last"]
    assert cuda.graphs == [["first", "last"]]
    assert cuda.current is theirs
    graphs.launch(graph)
    assert loop.launches == 1


def out_of_memory(cuda: Cuda) -> None:
    cuda.capacity = 0
    cuda.allocate()


def out_of_memory_beside_cached_blocks(cuda: Cuda) -> None:
    """Run out of memory as in pytorch#159594: freeing cached blocks is not allowed, and only that is reported."""
    cuda.frees_cached = True
    out_of_memory(cuda)


def hidden_capture_error(cuda: Cuda) -> None:
    """Make an error that is not reported before the end of the capture."""
    with pytest.raises(torch.AcceleratorError):
        cuda.synchronize()


def a_mistake_of_ours(cuda: Cuda) -> None:
    cuda.launch(str(1 // 0))


@pytest.mark.parametrize(
    ("act", "error", "code"),
    [
        (out_of_memory, torch.OutOfMemoryError, None),
        (out_of_memory_beside_cached_blocks, torch.AcceleratorError, UNSUPPORTED),
        (Cuda.synchronize, torch.AcceleratorError, UNSUPPORTED),
        (hidden_capture_error, torch.AcceleratorError, VOID),
        (a_mistake_of_ours, ZeroDivisionError, None),
    ],
)
def test_a_failed_capture_leaves_nothing_but_its_error(
    cuda: Cuda, loop: DeviceLoop, act: Callable[[Cuda], None], error: type[Exception], code: int | None
) -> None:
    graphs, theirs = DeviceGraphs(loop), cuda.current
    with pytest.raises(error) as caught:
        graphs.capture(step_of(cuda, act))
    assert getattr(caught.value, "error_code", None) == code
    raise_device_fault(caught.value)  # no fault
    assert loop.fault is None
    assert cuda.current is theirs
    assert cuda.capturing == []
    del caught
    assert cuda.records[0].uses == {1: 0}, "its memory may go"
    # The steps that follow, and another model's graphs.
    cuda.capacity = 99
    cuda.launch("eager")
    others = DeviceGraphs(loop)
    others.launch(others.capture(step_of(cuda)))
    assert loop.launches == 1


def test_no_memory_to_make_a_graph_ready(cuda: Cuda, loop: DeviceLoop) -> None:
    fake.fail("cuGraphInstantiateWithFlags", 1, 2)
    with pytest.raises(DriverError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        DeviceGraphs(loop).capture(step_of(cuda))
    assert loop.fault is None
    assert DeviceGraphs(loop).capture(step_of(cuda))


def test_a_model_is_captured_after_the_last_graph_of_another_is_gone(cuda: Cuda, loop: DeviceLoop) -> None:
    """A pool ends with its last graph, in the allocator of pinned memory even if nothing is cached any more."""
    for _ in range(3):
        graphs = DeviceGraphs(loop)
        for _ in range(2):
            graphs.launch(graphs.capture(step_of(cuda)))
        graphs.close()
        assert loop.driver.num_graph_execs == 0
    assert cuda.records[0].uses == {3: 0}
    assert cuda.records[1].uses == {1: 0, 2: 0, 3: 0}


def test_graphs_are_destroyed_when_the_device_is_done_with_them(
    cuda: Cuda, loop: DeviceLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = DeviceGraphs(loop)
    graphs.launch(graphs.capture(step_of(cuda)))
    alive: list[int] = []
    monkeypatch.setattr(cuda, "synchronize", lambda: alive.append(loop.driver.num_graph_execs))
    graphs.close()
    assert alive == [1]
    assert loop.driver.num_graph_execs == 0
