"""Graphs of torch's work on a device: captured here, launched by the device loop.

A capture records launches, with their addresses, and runs nothing. So a step is run once before, in which everything is
loaded and initialised, and its memory comes from a pool that lives as long as the graphs. This module handles streams
and pools, whatever a step computes.
"""

import contextlib
from collections.abc import Callable
from typing import Final, Protocol

import torch

from neuron.device.loop import DeviceLoop

_NEVER_ENDED: Final[list[torch.cuda.CUDAGraph]] = []
"""Captures that could not be ended. torch's allocators go on asking them whether a stream is theirs."""


class Graphs(Protocol):
    """Captures and launches the graphs of one model."""

    def capture(self, step: Callable[[], None]) -> int:
        """Return a graph of the launches of ``step``, which reads and writes the same addresses every time.

        After any exception but :class:`DeviceFault` the device is as it was.
        """

    def launch(self, graph: int) -> None:
        """Queue a graph behind what was queued before. Raises :class:`DeviceFault`."""

    def replay(self, graph: int, count: int, all_ended: torch.Tensor) -> int:
        """Launch a graph ``count`` times and wait for it; return how often it ran. Raises :class:`DeviceFault`.

        It ends early when a message of the daemon arrives, or once ``all_ended`` is not 0.
        """

    def wait(self, words: torch.Tensor, pending: int) -> None:
        """Wait until the device has overwritten ``pending`` in each int32 of ``words``.

        Raises :class:`DeviceFault`.
        """

    def close(self) -> None:
        """Destroy the graphs, once the device is done with them and with the memory they write."""


class DeviceGraphs:
    """Graphs on the stream of a device loop, launched by the loop through its driver table.

    Make one for each model: torch keeps the memory of a pool until the last graph of it is gone, and takes no other
    graph into it afterwards.
    """

    def __init__(self, loop: DeviceLoop) -> None:
        self._loop = loop
        # Not the loop's, which frees during a capture still use.
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._captured: dict[int, torch.cuda.CUDAGraph] = {}
        """Graphs by handle; torch's objects own the memory of their captures."""

    def capture(self, step: Callable[[], None]) -> int:
        """Run ``step`` once, capture it and make it ready."""
        step()
        # A capture cannot free memory that is cached for others.
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        # Not torch.cuda.graph: where a capture cannot be ended, that hides the first error and leaves its stream the
        # current one.
        with torch.cuda.stream(self._stream):
            try:
                graph.capture_begin(self._pool, capture_error_mode="thread_local")
                step()
            except BaseException:
                with contextlib.suppress(RuntimeError):
                    self._end(graph)
                raise
            self._end(graph)
        ready = self._loop.instantiate(graph.raw_cuda_graph())
        self._captured[ready] = graph
        return ready

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        try:
            graph.capture_end()
        except RuntimeError:
            # The capture is void. torch (2.11 to 2.13) still takes it to be in progress and its pool to be in use, and
            # would never free cached memory again.
            _NEVER_ENDED.append(graph)
            device = self._stream.device_index
            for release in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
                with contextlib.suppress(RuntimeError):  # already released, if the capture failed elsewhere
                    release(device, self._pool)
            raise

    def launch(self, graph: int) -> None:
        """Queue a graph."""
        self._loop.launch(graph)

    def replay(self, graph: int, count: int, all_ended: torch.Tensor) -> int:
        """Launch a graph ``count`` times, or fewer, and wait for it."""
        return self._loop.replay(graph, count, stop_on_message=True, stop_word=all_ended.data_ptr())

    def wait(self, words: torch.Tensor, pending: int) -> None:
        """Wait until the device has written to each of ``words``."""
        self._loop.wait_for_words(words.data_ptr(), words.numel(), pending)

    def close(self) -> None:
        """Wait for the device, destroy the graphs and give their memory back."""
        torch.cuda.current_stream().synchronize()
        for graph in self._captured:
            self._loop.driver.destroy_graph_exec(graph)
        self._captured.clear()
