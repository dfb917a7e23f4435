"""torch's half of capturing a graph, without a GPU: its streams, and its allocators' records of pools.

It does what torch 2.11 to 2.13 do (ATen/cuda/CUDAGraph.cpp, c10/cuda/CUDACachingAllocator.cpp,
ATen/core/CachingHostAllocator.h): a call that a capture does not allow makes it void, a void capture does not end in
order, an allocator takes it to be in progress until it is released, and a pool whose last graph is gone takes no other.
"""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

UNSUPPORTED = 900
VOID = 901


def cuda_error(code: int, text: str) -> torch.AcceleratorError:
    """Return torch's exception for a call that returned ``code``."""
    error = torch.AcceleratorError(f"CUDA error: {text}")
    error.error_code = code  # type: ignore[attr-defined]
    return error


class Stream:
    """A stream, and the capture in progress on it."""

    device_index = 0

    def __init__(self, cuda: "Cuda") -> None:
        self._cuda = cuda
        self.capture: Graph | None = None

    def synchronize(self) -> None:
        self._cuda.synchronize()


class PoolRecords:
    """An allocator's records: the number of graphs of each pool, and the captures in progress."""

    def __init__(self) -> None:
        self.uses: dict[int, int] = {}
        self.capturing: list[int] = []

    def begin(self, pool: int) -> None:
        if self.uses.get(pool) == 0:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        if pool in self.capturing:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self.uses[pool] = self.uses.get(pool, 0) + 1
        self.capturing.append(pool)

    def end(self, pool: int) -> None:
        if pool not in self.capturing:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.capturing.remove(pool)

    def release(self, pool: int) -> None:
        if not self.uses.get(pool):
            raise RuntimeError("uc >= 0 INTERNAL ASSERT FAILED")
        self.uses[pool] -= 1


class Graph:
    """``torch.cuda.CUDAGraph``."""

    def __init__(self, cuda: "Cuda", keep_graph: bool) -> None:
        assert keep_graph
        self._cuda = cuda
        self._pool = 0
        self._stream = cuda.current
        self._ended = False
        self.void = False
        self.nodes: list[str] = []

    def capture_begin(self, pool: int, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        assert self._cuda.current is not self._cuda.default
        self._pool, self._stream = pool, self._cuda.current
        for records in self._cuda.records:
            records.begin(pool)
        self._stream.capture = self

    def capture_end(self) -> None:
        if self._cuda.current is not self._stream:
            raise RuntimeError("Capture must end on the same stream it began on.")
        self._stream.capture = None
        if self.void:
            raise cuda_error(VOID, "operation failed due to a previous error during capture")
        for records in self._cuda.records:
            records.end(self._pool)
        self._ended = True

    def raw_cuda_graph(self) -> int:
        assert self._ended
        return id(self)

    def __del__(self) -> None:
        if self._ended:
            for records in self._cuda.records:
                records.release(self._pool)


class Cuda:
    """The part of ``torch.cuda`` for captures. There is memory for ``capacity`` more allocations."""

    def __init__(self) -> None:
        self.default = Stream(self)
        self.current = self.default
        self.records = PoolRecords(), PoolRecords()
        """Records for the device's memory, and for pinned memory."""
        self.done: list[str] = []
        """Kernels that ran, and waits of the host."""
        self.graphs: list[list[str]] = []
        """Nodes of each graph that was begun."""
        self.capacity = 99
        self.frees_cached = False
        """Whether cached memory is freed for an allocation, in a capture too, as with ``max_split_size_mb``."""
        self._pools = itertools.count(1)

    @property
    def capturing(self) -> list[int]:
        """Captures in progress, to the device's allocator."""
        return self.records[0].capturing

    def launch(self, what: str) -> None:
        capture = self.current.capture
        if capture is None:
            self.done.append(what)
        elif capture.void:
            raise cuda_error(VOID, "operation failed due to a previous error during capture")
        else:
            capture.nodes.append(what)

    def synchronize(self) -> None:
        """Wait for the device, as reading a number from it does too."""
        if self.current.capture is not None:
            self.current.capture.void = True
            raise cuda_error(UNSUPPORTED, "operation not permitted when stream is capturing")
        self.done.append("wait")

    def allocate(self) -> None:
        self.capacity -= 1
        if self.capacity >= 0:
            return
        if self.frees_cached:
            self.synchronize()
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    def empty_cache(self) -> None:
        records = self.records[0]
        assert not records.capturing
        records.uses = {pool: uses for pool, uses in records.uses.items() if uses}

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def _graph(self, keep_graph: bool) -> Graph:
        graph = Graph(self, keep_graph)
        self.graphs.append(graph.nodes)
        return graph

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        parts: dict[str, Any] = {
            "Stream": lambda: Stream(self),
            "stream": self.stream,
            "current_stream": lambda: self.current,
            "graph_pool_handle": lambda: next(self._pools),
            "CUDAGraph": self._graph,
            "empty_cache": self.empty_cache,
        }
        for name, part in parts.items():
            monkeypatch.setattr(torch.cuda, name, part)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda device, pool: self.records[0].end(pool))
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: self.records[0].release(pool))
