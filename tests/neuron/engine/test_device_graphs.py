"""Capturing: what is in a graph, and what is left of a capture that fails: the error, the stream, the allocators."""

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
        cuda.default = cuda.current  # the one that torch begins with
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
    cuda.room = 0
    cuda.allocate()


def out_of_memory_but_for_what_is_cached(cuda: Cuda) -> None:
    """As of pytorch#159594: freeing it is against the rules, and that is all that torch says of it."""
    cuda.frees_for_room = True
    out_of_memory(cuda)


def a_mistake_that_is_hidden(cuda: Cuda) -> None:
    """Nobody hears of it before the end of the capture."""
    with pytest.raises(torch.AcceleratorError):
        cuda.synchronize()


def a_mistake_of_ours(cuda: Cuda) -> None:
    cuda.launch(str(1 // 0))


@pytest.mark.parametrize(
    ("act", "error", "code"),
    [
        (out_of_memory, torch.OutOfMemoryError, None),
        (out_of_memory_but_for_what_is_cached, torch.AcceleratorError, UNSUPPORTED),
        (Cuda.synchronize, torch.AcceleratorError, UNSUPPORTED),
        (a_mistake_that_is_hidden, torch.AcceleratorError, VOID),
        (a_mistake_of_ours, ZeroDivisionError, None),
    ],
)
def test_of_a_capture_that_fails_nothing_is_left_but_its_error(
    cuda: Cuda, loop: DeviceLoop, act: Callable[[Cuda], None], error: type[Exception], code: int | None
) -> None:
    graphs, theirs = DeviceGraphs(loop), cuda.current
    with pytest.raises(error) as caught:
        graphs.capture(step_of(cuda, act))
    assert getattr(caught.value, "error_code", None) == code
    raise_device_fault(caught.value)  # it is none
    assert loop.fault is None
    assert cuda.current is theirs
    assert cuda.under_way == []
    del caught
    assert cuda.books[0].uses == {1: 0}, "its memory may go"
    # The steps that follow, and another model's graphs.
    cuda.room = 99
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
    """A pool is dead with its last graph, in the allocator of pinned memory even if nothing is cached any more."""
    for _ in range(3):
        graphs = DeviceGraphs(loop)
        for _ in range(2):
            graphs.launch(graphs.capture(step_of(cuda)))
        graphs.close()
        assert loop.driver.num_graph_execs == 0
    assert cuda.books[0].uses == {3: 0}
    assert cuda.books[1].uses == {1: 0, 2: 0, 3: 0}


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
