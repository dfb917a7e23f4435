"""Execute a plan on the CPU kernels: a step or a multi-step decode in one native call.

Rows that draw plainly end as token ids, others as logits, which the sampler changes before the same kernel draws. A
row's draw never depends on the others.
"""

import functools
from typing import Any, Final

import numpy as np
import torch

from neuron.cpu_kernels import native
from neuron.device.jobs import TokenLogprobs
from neuron.device.probe import usable_cores
from neuron.engine.cache_memory import NativeCaches
from neuron.engine.executor import MAX_STEPS, StepOutcome
from neuron.engine.plan import StepPlan
from neuron.engine.sampler import Draw, Draws, Sampler
from neuron.engine.sequence import Float32Array, Int32Array
from neuron.models import packed
from neuron.models.model import ModelConfig
from neuron.models.packed import PackedWeights
from neuron.models.packed_weights import embedding_scale, huge_pages
from neuron.models.sizing import PAGE_TOKENS, MemoryPlan
from neuron.triton_kernels.sampling import NON_FINITE, SamplingRows, changed_logits

FORBIDDEN: Final = -3e38
"""Logit of a token that may not be drawn."""
SEED_BITS: Final = (1 << 64) - 1


@functools.cache
def shared_pool() -> native.Pool:
    """Return this process's threads: one for each usable core, shared by all models."""
    return native.Pool(usable_cores())


class NativeExecutor:
    """Executor of a loaded model on the CPU."""

    overlaps = False
    max_steps = MAX_STEPS

    def __init__(
        self, config: ModelConfig, weights: PackedWeights, plan: MemoryPlan, channel_fd: int = -1, level: str = ""
    ) -> None:
        """``channel_fd`` is readable when the daemon waits: a multi-step decode is cut short then."""
        self.config = config
        self.weights = weights
        level = packed.checked_level(level)
        self.sampler = Sampler(plan.max_sequences, config.vocab_size, torch.device("cpu"), draw_natively(level))
        self._channel_fd = channel_fd
        self._sampled_rows = plan.sampled_rows
        self._model = packed.make_model(
            config,
            weights,
            shared_pool(),
            level,
            kv_dtype=plan.kv_dtype,
            rows=max(plan.step_tokens, plan.sampled_rows + PAGE_TOKENS),
            sequences=plan.max_sequences,
            sampled=plan.sampled_rows,
            embedding_scale=embedding_scale(config, plan.dtype),
            windows=tuple(table.window_tokens for table in plan.tables),
        )
        self.caches = NativeCaches(plan, self._model.page_bytes)
        arena = huge_pages(self._model.arena_bytes)
        if len(arena) > plan.workspace_bytes:
            raise RuntimeError(f"the plan counted {plan.workspace_bytes} bytes of work space, {len(arena)} are needed")
        states = None if self.caches.states is None else self.caches.states.reshape(-1)
        self._model.attach(tuple(pages.reshape(-1) for pages in self.caches.tables), states, arena)
        self._logits: torch.Tensor | None = None

    def launch(self, plan: StepPlan) -> StepOutcome:
        """Compute a step, on all cores, before returning."""
        num_sampled = len(plan.sampled)
        ids = np.empty(num_sampled, np.int32)
        finite = np.empty(len(plan.context_lens), np.int32)
        hidden: Float32Array = np.empty((len(plan.hidden_rows), self.config.hidden_size), np.float32)
        later = np.empty((plan.num_steps - 1, num_sampled), np.int32)
        is_plain = self.sampler.draws_plainly(plan.slots)
        draws: Draws | None = None
        logits: torch.Tensor | None = None
        if is_plain.any():
            draws = self.sampler.draws(plan.slots, plan.num_output)
            draws.temperature[~is_plain] = -1.0
        if num_sampled and (draws is None or draws.temperature.any()):
            logits = self._rows()[:num_sampled]
        self.caches.copy_states(plan.state_loads)
        num_steps = self._model.run(
            plan.token_ids,
            np.ascontiguousarray(plan.positions),
            np.ascontiguousarray(plan.slot_mappings),
            plan.cu_seqlens,
            np.ascontiguousarray(plan.page_tables),
            plan.context_lens,
            plan.sampled,
            plan.hidden_rows,
            None if logits is None else logits.numpy(),
            ids,
            finite,
            hidden if len(hidden) else None,
            draws=None if draws is None or logits is None else (*draws, self._rows()[self._sampled_rows :].numpy()),
            later=later,
            # Any row's stop ends the call: a step costs as much for a row that has ended as for one that has not.
            stops=np.unique(plan.stops[plan.stops >= 0]) if plan.num_steps > 1 else None,
            channel_fd=self._channel_fd,
            state_slots=plan.state_slots if len(plan.state_slots) else None,
            replays=np.ascontiguousarray(plan.replays) if len(plan.replays) else None,
            num_decodes=plan.num_decodes,
            num_drafting=plan.num_drafting,
        )
        self.caches.copy_states(plan.state_saves)
        logprobs: dict[int, TokenLogprobs] = {}
        if logits is not None and not is_plain.all():
            logprobs = self._sample(plan, logits, np.flatnonzero(~is_plain), ids)
        return StepOutcome(ids, finite != 0, hidden, logprobs, later[: num_steps - 1])

    @torch.inference_mode()
    def _sample(
        self, plan: StepPlan, logits: torch.Tensor, which: np.ndarray[Any, Any], ids: Int32Array
    ) -> dict[int, TokenLogprobs]:
        """Sample the rows ``which`` of ``logits`` into ``ids``; return the log probabilities of the rows by number."""
        rows = logits if len(which) == len(logits) else logits[torch.from_numpy(which)]
        rows = rows[:, : self.config.vocab_size]
        if cap := self.config.head.logit_cap:
            rows = rows.div_(cap).tanh_().mul_(cap)
        slots, num_output = plan.slots[which], plan.num_output[which]
        if len(plan.targets):
            ids[which] = self.sampler.score(rows, slots, num_output, plan.targets[which]).numpy()
        else:
            ids[which] = self.sampler.sample(rows, slots, num_output).numpy()
        report = self.sampler.report
        return {} if report is None else {int(which[row]): found for row, found in report.rows().items()}

    def _rows(self) -> torch.Tensor:
        """Return the rows of logits ``[sampled rows, V padded]``, and behind them a scratch row for each thread."""
        if self._logits is None:
            num_rows = self._sampled_rows + shared_pool().num_threads
            self._logits = torch.empty((num_rows, packed.padded(self.config.vocab_size)), dtype=torch.float32)
        return self._logits

    def clear(self, tables: tuple[Int32Array, ...]) -> None:
        """See :class:`~neuron.engine.executor.Executor`."""
        self.caches.clear(tables)

    def close(self) -> None:
        """Do nothing: it holds memory alone."""


def draw_natively(level: str) -> Draw:
    """Return :func:`~neuron.triton_kernels.sampling.sample` by the kernel of a dispatch level."""

    def draw(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
        num_rows, vocab_size = logits.shape
        x = torch.empty((num_rows, packed.padded(vocab_size)))
        changed = x[:, :vocab_size]
        # The kernel takes an infinity for a fault.
        torch.clamp(changed_logits(logits, rows), min=FORBIDDEN, out=changed)
        is_sound = logits.sum(-1).isfinite() & (changed.amax(-1) > FORBIDDEN)
        ids = torch.full((num_rows,), NON_FINITE, dtype=torch.int32)
        scratch = np.empty(x.shape[1], np.float32)
        fields = (rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.seeds, rows.counters)
        settings = [field.tolist() for field in fields]
        for row in is_sound.nonzero()[:, 0].tolist():
            temperature, top_k, top_p, min_p, seed, counter = (each[row] for each in settings)
            ids[row] = native.draw(
                level,
                x[row].numpy(),
                vocab_size,
                scratch,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                uniform=native.uniform(seed & SEED_BITS, counter),
            )
        rows.count(ids)
        return ids

    return draw
