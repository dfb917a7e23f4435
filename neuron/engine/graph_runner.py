"""The executor on a GPU: steps of decodes as captured graphs, everything else as :class:`~neuron.engine.runner.Runner`.

A step of a few hundred kernels takes the host longer to launch than a GPU to run; a graph of it is launched as one.
There is a graph for each of a few numbers of rows (*buckets*), with inputs and outputs at fixed places; a step takes
the smallest that holds its rows. They are captured while steps go by, one a step and the largest first, so that all fit
into the memory that the first one took, and so that any step of decodes has a graph after the first capture.

Rows without a sequence repeat the first sequence's: they write the same key and value to the same slot as it does, so
that no page has to be set apart for them.
"""

import dataclasses
import logging
import os
from collections.abc import Callable
from typing import Final, Protocol

import numpy as np
import torch

from neuron.device.driver import DeviceFault, DriverError
from neuron.device.loop import DeviceLoop
from neuron.engine.launched import DeviceStep
from neuron.engine.plan import StepPlan
from neuron.engine.runner import Runner
from neuron.engine.sequence import Int32Array
from neuron.models import decoder
from neuron.models.config import ModelConfig
from neuron.models.sizing import PAGE_TOKENS, MemoryPlan
from neuron.triton_kernels.batch import Batch

logger = logging.getLogger(__name__)

SWITCH: Final = "NEURON_GRAPHS"
"""``off`` in the environment launches every kernel of every step."""
COLUMNS: Final = 4
"""Of a row's inputs before its pages: token, position, slot, context."""


class Graphs(Protocol):
    """What makes and launches graphs."""

    def capture(self, step: Callable[[], None]) -> int:
        """Return a graph of what ``step`` launches, which reads and writes what is at the same places ever after.

        Raises ``torch.OutOfMemoryError`` or :class:`DriverError` if there is no memory for it, and leaves the device as
        it was then.
        """

    def launch(self, graph: int) -> None:
        """Queue a graph behind what was queued before. Raises :class:`DeviceFault`."""

    def drop(self, graph: int) -> None:
        """Destroy a graph that no step under way uses."""


class DeviceGraphs:
    """Graphs of torch's work on the stream of a device loop, launched by the loop through its driver table."""

    def __init__(self, loop: DeviceLoop) -> None:
        self._loop = loop
        self._pool = torch.cuda.graph_pool_handle()
        self._captured: dict[int, torch.cuda.CUDAGraph] = {}
        """Own the memory of what they were captured with."""

    def capture(self, step: Callable[[], None]) -> int:
        """Run once, so that nothing is initialised while it is captured, then capture and make ready."""
        step()
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            step()
        ready = self._loop.instantiate(graph.raw_cuda_graph())
        self._captured[ready] = graph
        return ready

    def launch(self, graph: int) -> None:
        """Queue a graph."""
        self._loop.launch(graph)

    def drop(self, graph: int) -> None:
        """Destroy a graph and give its memory back to the pool."""
        self._loop.driver.destroy_graph_exec(graph)
        del self._captured[graph]


@dataclasses.dataclass(frozen=True, slots=True)
class _Bucket:
    """A graph, and where its inputs and outputs are."""

    graph: int
    inputs: torch.Tensor
    """``[B, COLUMNS + P]`` int32"""
    finite: torch.Tensor
    """``[B]`` bool"""
    logits: torch.Tensor
    """``[B, V]`` float32"""


class GraphRunner(Runner):
    """One loaded model on one GPU."""

    def __init__(
        self,
        config: ModelConfig,
        weights: decoder.DecoderWeights,
        plan: MemoryPlan,
        device: torch.device,
        graphs: Graphs,
    ) -> None:
        super().__init__(config, weights, plan, device)
        self._graphs = graphs
        self._columns = COLUMNS + -(-plan.context_tokens // PAGE_TOKENS)
        self._buckets: dict[int, _Bucket] = {}
        self._uncaptured = [] if os.environ.get(SWITCH) == "off" else buckets(plan.max_sequences)
        # Two in turn: the device may still read the one of the step before. What read the one before that is waited
        # for by then, since no more than one step is launched ahead.
        pins = device.type == "cuda"
        shape = (plan.max_sequences, self._columns)
        self._staged = [torch.zeros(shape, dtype=torch.int32, pin_memory=pins) for _ in range(2)]

    def launch(self, plan: StepPlan) -> DeviceStep:
        """Queue a step on the device, by a graph if it is one of decodes."""
        if not _is_decode(plan):
            return super().launch(plan)
        if self._uncaptured:
            self._capture(self._uncaptured.pop(0))
        size = min((size for size in self._buckets if size >= plan.num_decodes), default=0)
        return self._replay(self._buckets[size], size, plan) if size else super().launch(plan)

    def close(self) -> None:
        """Destroy the graphs."""
        while self._buckets:
            self._graphs.drop(self._buckets.popitem()[1].graph)

    @torch.inference_mode()
    def _capture(self, size: int) -> None:
        """Capture the graph of a bucket; without memory for it, do without it and the smaller ones."""
        try:
            inputs = torch.zeros((size, self._columns), dtype=torch.int32, device=self.device)
            inputs[:, 3] = 1  # a context of one token, in page 0
            finite = torch.empty(size, dtype=torch.bool, device=self.device)
            logits = torch.empty((size, self.config.vocab_size), dtype=torch.float32, device=self.device)
            starts = torch.arange(size + 1, dtype=torch.int32, device=self.device)

            @torch.inference_mode()
            def step() -> None:
                batch = Batch(
                    positions=inputs[:, 1].contiguous(),
                    slots=inputs[:, 2].to(torch.int64),
                    cu_seqlens=starts,
                    page_table=inputs[:, COLUMNS:],
                    context_lens=inputs[:, 3].contiguous(),
                    num_decodes=size,
                )
                hidden = self._forward(inputs[:, 0].contiguous(), batch)
                finite.copy_(hidden.sum(-1, dtype=torch.float32).isfinite())
                logits.copy_(self._logits(hidden))

            graph = self._graphs.capture(step)
        except (torch.OutOfMemoryError, DriverError) as error:
            if isinstance(error, DeviceFault):
                raise
            self._uncaptured.clear()
            logger.warning("no memory for a graph of %d rows; steps without one are launched singly: %s", size, error)
            return
        self._buckets[size] = _Bucket(graph, inputs, finite, logits)
        # Capturing ran the step, which wrote to the first slot of page 0: it is zero for all who pad with it.
        self.clear_pages(np.zeros(1, np.int32))

    @torch.inference_mode()
    def _replay(self, bucket: _Bucket, size: int, plan: StepPlan) -> DeviceStep:
        count = plan.num_decodes
        staged = self._staged.pop(0)
        self._staged.append(staged)
        rows = staged.numpy()
        rows[:count, :COLUMNS] = np.stack((plan.token_ids, plan.positions, plan.slots, plan.context_lens), axis=1)
        width = COLUMNS + plan.page_table.shape[1]
        rows[:count, COLUMNS:width] = plan.page_table
        rows[:count, width:] = 0
        rows[count:size] = rows[0]
        bucket.inputs.copy_(staged[:size], non_blocking=True)
        if plan.token_ids.min() < 0:
            ids = bucket.inputs[:, 0]
            ids.copy_(self._known(ids))
        self._graphs.launch(bucket.graph)
        ids = self.sampler.sample(bucket.logits[:count], plan.seats, plan.num_output)
        self._last_ids = ids
        # A copy: the next step may be launched before this one's outcome is read.
        return DeviceStep(ids, bucket.finite[:count].clone(), self._none, self.sampler.report)


def buckets(most: int) -> list[int]:
    """Return the numbers of rows that have a graph, largest first: powers of two, and ``most``."""
    return sorted({1 << i for i in range(most.bit_length()) if 1 << i <= most} | {most}, reverse=True)


def _is_decode(plan: StepPlan) -> bool:
    rows: Int32Array = plan.token_ids
    return len(rows) == plan.num_decodes == len(plan.sampled) and not len(plan.hidden_rows)
