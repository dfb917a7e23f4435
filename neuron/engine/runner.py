"""Execute a plan on a model in eager torch: the reference for all other executors.

It owns the memory of the caches and the sampler's tables; sequences appear as rows, slots and pages only.
"""

import mmap

import numpy as np
import torch

from neuron.engine.executor import DeviceStep, InFlightStep
from neuron.engine.plan import StepPlan
from neuron.engine.sampler import LogprobReport, Sampler
from neuron.engine.sequence import Int32Array
from neuron.engine.staging import to_device
from neuron.engine_settings import DEFAULTS, EngineSettings
from neuron.layers.cache import table_of
from neuron.layers.shard import WHOLE, Shard
from neuron.models import decoder
from neuron.models.model import ModelConfig
from neuron.models.sizing import PAGE_TOKENS, MemoryPlan
from neuron.triton_kernels import dispatch
from neuron.triton_kernels.attention import attention_parts
from neuron.triton_kernels.batch import AttentionPart, Batch
from neuron.triton_kernels.operations import EAGER


class Runner:
    """Executor of a loaded model on one device."""

    max_steps = 1

    def __init__(
        self,
        config: ModelConfig,
        weights: decoder.DecoderWeights,
        plan: MemoryPlan,
        device: torch.device,
        settings: EngineSettings = DEFAULTS,
        shard: Shard = WHOLE,
    ) -> None:
        self.config = config
        self.device = device
        # A CPU computes while it launches, so there is nothing to overlap with.
        self.overlaps = device.type == "cuda" and settings.overlap_steps
        self._weights = weights
        windows = [cache.window_tokens if cache is not None else 0 for cache in config.caches()]
        self._tables = [table_of(window, plan.tables) for window in windows]
        """Page table of each layer."""
        self._windows = [
            max(window for window, of_layer in zip(windows, self._tables, strict=True) if of_layer == table)
            for table in range(1 + len(plan.tables))
        ]
        """Longest window of the layers with each table; 0: none has one."""
        # One more page than the pool has: page 0 pads page tables.
        table_pages = [plan.num_pages + 1, *(table.num_pages + 1 for table in plan.tables)]
        self._caches = decoder.new_caches(
            config,
            [table_pages[table] for table in self._tables],
            lambda shape: zeros(shape, weights.dtype, device),
            shard,
        )
        self._last_ids = torch.empty(0, dtype=torch.int32, device=device)
        """Token ids that the last step sampled."""
        self._none = torch.empty((0, config.hidden_size), dtype=torch.float32, device=device)
        self._kernels = dispatch.operations_for(device, weights.dtype, triton=settings.triton_kernels)
        draw = self._kernels.sample if settings.device_sampling else EAGER.sample
        self.sampler = Sampler(plan.max_sequences, config.vocab_size, device, draw)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> InFlightStep:
        """Queue a step on the device."""
        positions, context_lens = self._to_device(plan.positions), self._to_device(plan.context_lens)
        cu_seqlens = self._to_device(plan.cu_seqlens)
        batches = tuple(
            Batch(
                positions=positions,
                slot_mapping=self._to_device(slot_mapping).to(torch.int64),
                cu_seqlens=cu_seqlens,
                page_table=self._to_device(page_table),
                context_lens=context_lens,
                num_decodes=plan.num_decodes,
                parts=self._parts(plan, table),
            )
            for table, (slot_mapping, page_table) in enumerate(zip(plan.slot_mappings, plan.page_tables, strict=True))
        )
        token_ids = self._to_device(plan.token_ids)
        if plan.token_ids.min() < 0:
            token_ids = self._known(token_ids)
        hidden = self._forward(token_ids, batches)
        last = hidden.index_select(0, cu_seqlens[1:] - 1)
        finite = last.sum(-1, dtype=torch.float32).isfinite()
        ids = torch.empty(0, dtype=torch.int32, device=self.device)
        report: LogprobReport | None = None
        if len(plan.sampled):
            logits = self._logits(self._rows(hidden, plan.sampled))
            if len(plan.targets):
                ids = self.sampler.score(logits, plan.slots, plan.num_output, plan.targets)
            else:
                ids = self.sampler.sample(logits, plan.slots, plan.num_output)
            report = self.sampler.report
        self._last_ids = ids
        return DeviceStep.behind(ids, finite, self._rows(hidden, plan.hidden_rows).float(), report)

    def clear_pages(self, tables: tuple[Int32Array, ...]) -> None:
        """Zero pages of each table, so that a NaN in them cannot reach the next sequence that gets them.

        Tokens beyond a sequence's end in its last page are masked, and zero times NaN is NaN.
        """
        chosen = [self._to_device(pages).to(torch.int64) for pages in tables[: len(self._windows)]]
        # An assignment would copy the 0 to the device and wait for all queued work.
        for cache, table in zip(self._caches, self._tables, strict=True):
            for tensor in cache or ():
                tensor.index_fill_(0, chosen[table], 0)

    def close(self) -> None:
        """Do nothing: it holds memory alone."""

    def _parts(self, plan: StepPlan, table: int) -> tuple[AttentionPart, ...]:
        """Return the parts for eager attention; kernels read the page table."""
        if self._kernels.by_kernels:
            return ()
        return attention_parts(
            plan.cu_seqlens,
            plan.page_tables[table],
            plan.context_lens,
            PAGE_TOKENS,
            self.device,
            self._windows[table],
        )

    def _known(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Return ``token_ids`` with the tokens of the step before in place of the negative ones."""
        # A row that was not finite has no token; its sequence fails when it is settled.
        before = self._last_ids.clamp(min=0)
        return torch.where(token_ids < 0, before[(-1 - token_ids).clamp(min=0)], token_ids)

    def _forward(self, token_ids: torch.Tensor, batches: tuple[Batch, ...]) -> torch.Tensor:
        """Return the hidden states ``[T, hidden]``."""
        return decoder.forward(
            self.config, self._weights, token_ids, self._of_layers(batches), self._caches, self._kernels
        )

    def _of_layers(self, batches: tuple[Batch, ...]) -> list[Batch]:
        """Return the one of ``batches``, which are of all page tables, for each layer."""
        return [batches[table] for table in self._tables]

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits ``[R, V]`` of the rows ``hidden``."""
        return decoder.logits(self.config, self._weights, hidden, self._kernels)

    def _rows(self, hidden: torch.Tensor, rows: Int32Array) -> torch.Tensor:
        return hidden if len(rows) == len(hidden) else hidden.index_select(0, self._to_device(rows))

    def _to_device(self, array: Int32Array) -> torch.Tensor:
        return to_device(array, self.device)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return zeros; on a CPU in memory that is committed on first use and unmapped with the tensor.

    ``torch.zeros`` writes them, 2 GiB in 0.4 s, to a heap that may keep them.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=dtype).view(shape)
