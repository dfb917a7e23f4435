"""Devices that a bench runs on: a GPU, a GPU that is not timed, or this host for a rehearsal."""

import contextlib
import functools
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, Final
from unittest import mock

import torch

from neuron.triton_kernels import dispatch

NODES: Final = 20
"""Calls in a graph that is timed, so that a launch costs what it costs in a decode step."""


class Gpu:
    """CUDA device, with timers of its work."""

    device = torch.device("cuda")
    rehearses = False

    def graph_us(self, call: Callable[[int], object]) -> float:
        """Return the time of one ``call(i)`` in microseconds: the median of replays of a graph of NODES calls."""
        graph = self._graph(call, NODES)
        samples = []
        for _ in range(12):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            samples.append(start.elapsed_time(stop) * 1e3 / NODES)
        return statistics.median(samples[2:])

    def captured(self, call: Callable[[], object]) -> Callable[[], object]:
        """Return ``call`` as a graph."""
        replay: Callable[[], object] = self._graph(lambda _: call(), 1).replay
        return replay

    def _graph(self, call: Callable[[int], object], nodes: int) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for i in range(min(nodes, 3)):
                call(i)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(nodes):
                call(i)
        return graph

    def seconds(self, call: Callable[[], object], repeats: int) -> float:
        """Return the seconds of one call, in the best of three runs of ``repeats``."""
        call()
        best = float("inf")
        for _ in range(3):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            torch.cuda.synchronize()
            best = min(best, (time.perf_counter() - start) / repeats)
        return best

    def host_us(self, call: Callable[[], object]) -> float:
        """Return the microseconds of the host for a call while the device is busy."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(4):
            call()
        spent = (time.perf_counter() - start) / 4
        torch.cuda.synchronize()
        return spent * 1e6

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """Return pinned host memory."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def forget(self) -> None:
        """Release unused memory of the device."""
        torch.cuda.empty_cache()

    def free_bytes(self) -> int:
        """Return the bytes that are free."""
        return torch.cuda.mem_get_info()[0]

    @contextlib.contextmanager
    def graphs(self) -> Iterator[Any]:
        """Own the device as a worker does; yield a factory of a model's graphs."""
        from neuron.device.driver import cuda_driver
        from neuron.device.loop import DeviceLoop
        from neuron.engine.device_graphs import DeviceGraphs

        ours, theirs = socket.socketpair()
        with ours, DeviceLoop(cuda_driver(), 0, theirs.detach(), name="cuda-dev-0") as loop:
            before = torch.cuda.current_stream()
            torch.cuda.set_stream(torch.cuda.ExternalStream(loop.stream))  # type: ignore[no-untyped-call]
            try:
                yield functools.partial(DeviceGraphs, loop)
            finally:
                torch.cuda.set_stream(before)


class UntimedGpu(Gpu):
    """GPU on which each call runs once, without real times."""

    def graph_us(self, call: Callable[[int], object]) -> float:
        """Call twice: once for each of two sets of inputs, where there are several."""
        call(0)
        call(1)
        return 1.0

    def captured(self, call: Callable[[], object]) -> Callable[[], object]:
        """Return ``call`` itself."""
        return call

    def seconds(self, call: Callable[[], object], repeats: int) -> float:
        """Run ``call`` once."""
        call()
        return 1.0

    def host_us(self, call: Callable[[], object]) -> float:
        """Run ``call`` once."""
        call()
        return 1.0


class Rehearsal(UntimedGpu):
    """This host, in Triton's interpreter; graphs are made and launched through the tests' fake driver."""

    device = torch.device("cpu")
    rehearses = True

    @contextlib.contextmanager
    def with_kernels(self) -> Iterator["Rehearsal"]:
        """Have models run the kernels in the interpreter, with the choices for a Hopper GPU."""
        from triton_interpreter import mend

        from neuron.triton_kernels.launch import Target, targeting
        from neuron.triton_kernels.operations import KERNELS

        mend()
        with (
            targeting(Target(90, 3)),
            mock.patch.object(dispatch, "operations_for", return_value=KERNELS),
        ):
            yield self

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """Return plain memory."""
        return torch.empty(num_bytes, dtype=torch.uint8)

    def forget(self) -> None:
        """Do nothing."""

    def free_bytes(self) -> int:
        """Return a constant."""
        return 1 << 30

    @contextlib.contextmanager
    def graphs(self) -> Iterator[Any]:
        """Yield a factory of graphs on the fake driver."""
        from graph_rig import OnTheLoop

        from neuron.device import _fake_driver as fake  # type: ignore[attr-defined]
        from neuron.device.loop import DeviceLoop

        fake.reset()
        ours, theirs = socket.socketpair()
        with ours, DeviceLoop(fake.capsule(), 0, theirs.detach(), name="cuda-dev-0") as loop:
            yield functools.partial(OnTheLoop, loop)
