"""The executor on a GPU: steps of decodes as captured graphs, all others by the eager executor, whose parts it shares.

The host launches a few hundred kernels more slowly than a GPU runs them; a graph of them is one launch. There is a
graph for each of a few numbers of rows (*buckets*), with inputs and outputs at fixed addresses; a step takes the
smallest that holds its rows. One is captured a step, the largest first: the others fit into its memory, and after it
every step of decodes has a graph.

A graph ends in the sampling kernel and moves its own rows on, so that launching it again is the next step: a multi-step
decode is the same graph, launched by the loop without Python. The sampled tokens go to the host's memory. A
step with a row that does not draw plainly (penalties, a grammar, log probabilities) is sampled behind its graph.

Rows without a sequence have a page of their own in each table, and a state slot: they share nothing with a sequence.
"""

import dataclasses
import logging

import numpy as np
import torch

from neuron.engine.device_graphs import Graphs
from neuron.engine.eager_executor import EagerExecutor
from neuron.engine.errors import raise_device_fault, ran_out
from neuron.engine.executor import MAX_STEPS, DeviceStep, InFlightStep, StepOutcome
from neuron.engine.plan import StepPlan
from neuron.engine.sequence import Float32Array, Int32Array
from neuron.engine.step_inputs import PENDING, Published, StepInputs
from neuron.engine_settings import DEFAULTS, EngineSettings
from neuron.models.sizing import PAGE_TOKENS, MemoryPlan
from neuron.triton_kernels.batch import Batch

logger = logging.getLogger(__name__)


@dataclasses.dataclass(slots=True)
class _Bucket:
    """The graph of one number of rows, with its inputs and outputs."""

    inputs: StepInputs
    batches: list[Batch]
    """The tensors of the graph, which holds addresses only, for each layer."""
    graph: int = 0
    hidden: torch.Tensor | None = None
    """``[B, hidden]``"""
    logits: torch.Tensor | None = None
    """``[B, V]`` float32"""


@dataclasses.dataclass(frozen=True, slots=True)
class _GraphStep:
    """Decode steps, 1 or N, whose tokens ``[N, R]`` the device itself publishes."""

    graphs: Graphs
    graph: int
    first: torch.Tensor
    """``[R]``: the tokens of the first step, in the memory that the device writes."""
    tokens: Int32Array
    all_ended: torch.Tensor
    hidden: Float32Array

    def wait(self) -> StepOutcome:
        """Return the outcome; launch a multi-step decode first."""
        num_steps = len(self.tokens)
        if num_steps > 1:
            num_steps = self.graphs.replay(self.graph, num_steps, self.all_ended)
        else:
            self.graphs.wait(self.first, PENDING)
        tokens = self.tokens[:num_steps].copy()
        # A row whose logits are not finite has no token, so its hidden states need no check.
        finite = np.ones(tokens.shape[1], np.bool_)
        return StepOutcome(tokens[0], finite, self.hidden, {}, tokens[1:])


class GraphExecutor:
    """Executor by graphs, and by the ``eager`` executor of the same model where there is none for a step."""

    max_steps = 1

    def __init__(
        self, eager: EagerExecutor, plan: MemoryPlan, graphs: Graphs, settings: EngineSettings = DEFAULTS
    ) -> None:
        self.config, self.sampler = eager.config, eager.sampler
        self.overlaps = settings.overlap_steps
        self._eager = eager
        self._graphs = graphs
        self._device = eager.caches.device
        self._num_columns = -(-plan.context_tokens // PAGE_TOKENS)
        self._buckets: dict[int, _Bucket] = {}
        # Eager attention takes host data of every step, which no graph can.
        captures = settings.cuda_graphs and eager.forward.operations.by_kernels
        self._uncaptured = buckets(plan.max_sequences) if captures else []
        self._samples = settings.device_sampling
        """Whether graphs sample."""
        # A step may refer to any row that was sampled in the one before it.
        self._published = Published(plan.sampled_rows, self._device)
        self._no_hidden: Float32Array = np.empty((0, self.config.hidden_size), np.float32)

    def launch(self, plan: StepPlan) -> InFlightStep:
        """Queue a step on the device, by a graph if it is one of decodes; a multi-step decode begins in ``wait``."""
        if not _is_decode(plan):
            return self._eager.launch(plan)
        if self._uncaptured:
            self._capture(self._uncaptured.pop(0))
        size = min((size for size in self._buckets if size >= plan.num_decodes), default=0)
        return self._replay(self._buckets[size], plan) if size else self._eager.launch(plan)

    def clear(self, tables: tuple[Int32Array, ...]) -> None:
        """See :class:`~neuron.engine.executor.Executor`."""
        self._eager.clear(tables)

    def close(self) -> None:
        """Destroy the graphs, once the device is done with the memory they write."""
        self._graphs.close()
        self._buckets.clear()

    @torch.inference_mode()
    def _capture(self, size: int) -> None:
        """Capture the graph of a bucket; on failure, run without it and the smaller ones."""
        try:
            self._buckets[size] = self._captured(size)
        except Exception as error:  # every step can be launched without a graph
            raise_device_fault(error)
            self._uncaptured.clear()
            if ran_out(error):
                logger.warning(
                    "no memory for a graph of %d rows; steps without one are launched singly: %s", size, error
                )
            else:
                logger.exception("no graph of %d rows; steps without one are launched singly", size)
        else:
            if self._samples:
                self.max_steps = MAX_STEPS

    def _captured(self, size: int) -> _Bucket:
        forward, caches = self._eager.forward, self._eager.caches
        inputs = StepInputs(size, self._num_columns, self._device, self._published, caches.padding_pages)
        state = inputs.state
        cu_seqlens = torch.arange(size + 1, dtype=torch.int32, device=self._device)
        batches = caches.of_layers(
            [
                Batch(
                    positions=state.positions,
                    slot_mapping=slot_mapping,
                    cu_seqlens=cu_seqlens,
                    page_table=page_table,
                    context_lens=state.context_lens,
                    num_decodes=size,
                    state_slots=inputs.state_slots,
                )
                for slot_mapping, page_table in zip(state.slot_mappings, state.page_tables, strict=True)
            ]
        )
        bucket = _Bucket(inputs, batches)

        @torch.inference_mode()
        def step() -> None:
            forward.operations.begin_step(state)
            bucket.hidden = forward.hidden(state.token_ids, batches, caches.layers)
            bucket.logits = forward.logits(bucket.hidden)
            if self._samples:
                ids = forward.operations.sample(bucket.logits, inputs.rows)
                forward.operations.end_step(state, ids, PAGE_TOKENS)

        bucket.graph = self._graphs.capture(step)
        return bucket

    @torch.inference_mode()
    def _replay(self, bucket: _Bucket, plan: StepPlan) -> InFlightStep:
        count = plan.num_decodes
        place = self._published.take(plan.num_steps)
        bucket.inputs.fill(plan, self.sampler.draws(plan.slots, plan.num_output), place)
        last, last_ids = self._published.last, self._eager.last_ids
        if last_ids is not last and plan.token_ids.min() < 0:
            last[: len(last_ids)].copy_(last_ids)
        if self._samples and self.sampler.draws_plainly(plan.slots).all():
            self._eager.last_ids = last
            if plan.num_steps == 1:
                self._launch(bucket, plan)
            published = self._published
            tokens = published.seen[place : place + plan.num_steps, :count]
            first = published.tokens[place, :count]
            return _GraphStep(self._graphs, bucket.graph, first, tokens, published.all_ended, self._no_hidden)
        self._launch(bucket, plan)
        assert bucket.logits is not None
        ids = self.sampler.sample(bucket.logits[:count], plan.slots, plan.num_output)
        self._eager.last_ids = ids
        finite, hidden = torch.ones(count, dtype=torch.bool), torch.from_numpy(self._no_hidden)
        return DeviceStep.behind(ids, finite, hidden, self.sampler.report)

    def _launch(self, bucket: _Bucket, plan: StepPlan) -> None:
        self._graphs.launch(bucket.graph)
        self._eager.caches.copy_states(plan.state_saves)
        assert bucket.hidden is not None
        self._eager.save_hidden(bucket.hidden, plan)


def buckets(most: int) -> list[int]:
    """Return the numbers of rows that have a graph, largest first: powers of two, and ``most``."""
    return sorted({1 << i for i in range(most.bit_length()) if 1 << i <= most} | {most}, reverse=True)


def _is_decode(plan: StepPlan) -> bool:
    rows: Int32Array = plan.token_ids
    has_more = plan.state_loads.size or len(plan.hidden_rows) or len(plan.replays) or len(plan.hidden_loads)
    return len(rows) == plan.num_decodes == len(plan.sampled) and not has_more
