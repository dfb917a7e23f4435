"""The executor of eager torch, which launches each operation of a step singly: the reference for all others."""

import torch

from neuron.engine.cache_memory import LayerCaches
from neuron.engine.executor import DeviceStep
from neuron.engine.plan import StepPlan
from neuron.engine.sampler import LogprobReport, Sampler
from neuron.engine.sequence import Int32Array
from neuron.engine.staging import to_device
from neuron.models.decoder import Decoder
from neuron.models.sizing import PAGE_TOKENS
from neuron.triton_kernels.attention import attention_parts
from neuron.triton_kernels.batch import AttentionPart, Batch


class EagerExecutor:
    """Executor by a forward pass, its caches and a sampler, which share one device."""

    # A CPU computes while it launches; on a GPU this is a part of the other executors.
    overlaps = False
    max_steps = 1

    def __init__(self, forward: Decoder, caches: LayerCaches, sampler: Sampler, num_hidden: int = 0) -> None:
        """``num_hidden`` places keep hidden states for a draft head."""
        self.config = forward.config
        self.forward, self.caches, self.sampler = forward, caches, sampler
        self.last_ids = torch.empty(0, dtype=torch.int32, device=caches.device)
        """Token ids that the last step sampled."""
        shape = num_hidden, self.config.hidden_size
        self._hidden = torch.zeros(shape, dtype=caches.dtype, device=caches.device)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> DeviceStep:
        """Queue a step on the device."""
        positions, context_lens = self._to_device(plan.positions), self._to_device(plan.context_lens)
        cu_seqlens = self._to_device(plan.cu_seqlens)
        state_slots = self._to_device(plan.state_slots) if len(plan.state_slots) else None
        replays = self._to_device(plan.replays) if len(plan.replays) else None
        batches = [
            Batch(
                positions=positions,
                slot_mapping=self._to_device(slot_mapping).to(torch.int64),
                cu_seqlens=cu_seqlens,
                page_table=self._to_device(page_table),
                context_lens=context_lens,
                num_decodes=plan.num_decodes,
                parts=self._parts(plan, page_table, window),
                num_drafting=plan.num_drafting,
                state_slots=state_slots,
                replays=replays,
            )
            for slot_mapping, page_table, window in zip(
                plan.slot_mappings, plan.page_tables, self.caches.windows, strict=True
            )
        ]
        token_ids = self._to_device(plan.token_ids)
        if plan.token_ids.min() < 0:
            token_ids = self._known(token_ids)
        of_layers, is_draft = self.caches.of_layers(batches), len(plan.hidden_loads) > 0
        if is_draft:
            before = self._hidden.index_select(0, self._to_device(plan.hidden_loads))
            hidden = self.forward.drafted(token_ids, before, of_layers, self.caches.layers)
        else:
            self.caches.copy_states(plan.state_loads)
            hidden = self.forward.hidden(token_ids, of_layers, self.caches.layers)
            self.caches.copy_states(plan.state_saves)
        self.save_hidden(hidden, plan)
        last = hidden.index_select(0, cu_seqlens[1:] - 1)
        finite = last.sum(-1, dtype=torch.float32).isfinite()
        ids = torch.empty(0, dtype=torch.int32, device=self.caches.device)
        report: LogprobReport | None = None
        if len(plan.sampled):
            logits = self.forward.logits(self._rows(hidden, plan.sampled))
            if len(plan.targets):
                ids = self.sampler.score(logits, plan.slots, plan.num_output, plan.targets)
            else:
                ids = self.sampler.sample(logits, plan.slots, plan.num_output)
            report = self.sampler.report
        if not is_draft:
            self.last_ids = ids
        return DeviceStep.behind(ids, finite, self._rows(hidden, plan.hidden_rows).float(), report)

    def save_hidden(self, hidden: torch.Tensor, plan: StepPlan) -> None:
        """Keep what a draft head reads of the hidden states ``[T, hidden]`` of a step."""
        rows, places = plan.hidden_saves
        if len(rows):
            self._hidden.index_copy_(0, self._to_device(places).to(torch.int64), self._rows(hidden, rows))

    def clear(self, tables: tuple[Int32Array, ...]) -> None:
        """See :class:`~neuron.engine.executor.Executor`."""
        self.caches.clear(tables)

    def close(self) -> None:
        """Do nothing: it holds memory alone."""

    def _parts(self, plan: StepPlan, page_table: Int32Array, window_tokens: int) -> tuple[AttentionPart, ...]:
        """Return the parts for eager attention; kernels read the page table."""
        if self.forward.operations.by_kernels:
            return ()
        return attention_parts(
            plan.cu_seqlens, page_table, plan.context_lens, PAGE_TOKENS, self.caches.device, window_tokens
        )

    def _known(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Return ``token_ids`` with the tokens of the step before in place of the negative ones."""
        # A row that was not finite has no token; its sequence fails when it is settled.
        before = self.last_ids.clamp(min=0)
        return torch.where(token_ids < 0, before[(-1 - token_ids).clamp(min=0)], token_ids)

    def _rows(self, hidden: torch.Tensor, rows: Int32Array) -> torch.Tensor:
        return hidden if len(rows) == len(hidden) else hidden.index_select(0, self._to_device(rows))

    def _to_device(self, array: Int32Array) -> torch.Tensor:
        return to_device(array, self.caches.device)
