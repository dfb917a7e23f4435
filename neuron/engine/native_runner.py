"""Execute a plan on the CPU kernels: a whole step, or a burst of them, in one native call.

Steps in which all are greedy end with token ids, others with logits, which the sampler turns into ids as on any device.
"""

import functools

import numpy as np
import torch

from neuron.cpu_kernels import native
from neuron.device.jobs import TokenLogprobs
from neuron.device.probe import usable_cores
from neuron.engine.launched import HostStep, StepOutcome
from neuron.engine.plan import StepPlan
from neuron.engine.sampler import Sampler
from neuron.engine.sequence import Float32Array, Int32Array
from neuron.models import packed
from neuron.models.config import ModelConfig
from neuron.models.packed_weights import PackedWeights, huge_pages, make_model
from neuron.models.sizing import PAGE_TOKENS, MemoryPlan


@functools.cache
def shared_pool() -> native.Pool:
    """Return this process's threads: one for each core it may use, for all models, which take turns."""
    return native.Pool(usable_cores())


class NativeRunner:
    """One loaded model on the CPU."""

    overlaps = False
    repeats = True

    def __init__(self, config: ModelConfig, weights: PackedWeights, plan: MemoryPlan, channel_fd: int = -1) -> None:
        """``channel_fd`` has something to read when the daemon waits: a burst is cut short then."""
        self.config = config
        self._channel_fd = channel_fd
        self._weights = weights
        self._sampled_rows = plan.sampled_rows
        rows = max(plan.step_tokens, plan.sampled_rows + PAGE_TOKENS)
        self._model = make_model(
            config,
            weights,
            shared_pool(),
            packed.level(),
            dtype=plan.dtype,
            rows=rows,
            sequences=plan.max_sequences,
            sampled=plan.sampled_rows,
        )
        # One more page than the pool hands out: page 0 pads page tables. A page holds all layers, so that a short
        # sequence touches few huge pages however many layers there are.
        cache = huge_pages((plan.num_pages + 1) * self._model.page_bytes)
        arena = huge_pages(self._model.arena_bytes)
        if len(arena) > plan.workspace_bytes:
            raise RuntimeError(f"the plan counted {plan.workspace_bytes} bytes of work space, {len(arena)} are needed")
        self._model.attach(cache, arena)
        dtype = torch.float32 if plan.dtype == "float32" else torch.bfloat16
        shape = (plan.num_pages + 1, config.num_layers, 2, config.num_kv_heads, -1)
        self._cache = torch.from_numpy(cache).view(dtype).view(shape)
        """``[pages, layers, keys and values, K, 16 D]``; keys lie as ``attention.c`` says."""
        self._logits: torch.Tensor | None = None
        self.sampler = Sampler(plan.max_sequences, config.vocab_size, torch.device("cpu"))

    def launch(self, plan: StepPlan) -> HostStep:
        """Compute a step, on all cores, before returning."""
        num_sampled = len(plan.sampled)
        ids = np.empty(num_sampled, np.int32)
        finite = np.empty(len(plan.context_lens), np.int32)
        hidden: Float32Array = np.empty((len(plan.hidden_rows), self.config.hidden_size), np.float32)
        logprobs: dict[int, TokenLogprobs] = {}
        logits: torch.Tensor | None = None
        if num_sampled and not self.sampler.takes_likeliest(plan.seats):
            if self._logits is None:
                width = packed.padded(self.config.vocab_size)
                self._logits = torch.empty((self._sampled_rows, width), dtype=torch.float32)
            logits = self._logits[:num_sampled]
        later = np.empty((plan.num_rounds - 1, num_sampled), np.int32)
        num_rounds = self._model.run(
            plan.token_ids,
            np.ascontiguousarray(plan.positions),
            plan.slots,
            plan.cu_seqlens,
            np.ascontiguousarray(plan.page_table),
            plan.context_lens,
            plan.sampled,
            plan.hidden_rows,
            None if logits is None else logits.numpy(),
            ids,
            finite,
            hidden if len(hidden) else None,
            later=later,
            stops=plan.stops,
            channel_fd=self._channel_fd,
        )
        if logits is not None:
            with torch.inference_mode():
                rows = logits[:, : self.config.vocab_size]
                if cap := self.config.logit_cap:  # which keeps the order, so the likeliest need none
                    rows = rows.div_(cap).tanh_().mul_(cap)
                ids = self.sampler.sample(rows, plan.seats, plan.num_output).numpy()
                if self.sampler.report is not None:
                    logprobs = self.sampler.report.rows()
        return HostStep(StepOutcome(ids, finite != 0, hidden, logprobs, later[: num_rounds - 1]))

    def clear_pages(self, pages: Int32Array) -> None:
        """Zero ``pages``, so that a NaN in them cannot reach the next sequence they are given to."""
        self._cache[torch.from_numpy(pages).to(torch.int64)] = 0
