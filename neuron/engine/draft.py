"""Drafters that are models: a smaller one of the same vocabulary, or a head of the model whose tokens they draft.

A draft model keeps a cache of its own under the page numbers of the target's table 0, so that the scheduler's decisions
about a page, prefix sharing included, hold for both; layers with a window too, as its cache may lag behind the
target's. It computes prompts beside the target and, when draft tokens are wanted, the tokens it has missed since; it
samples with the random numbers of the target's sequence.

A draft head is part of the target and of its executor. It reads hidden states of the target, which steps keep for it:
those of a prompt's chunk until it has computed the same tokens, and those of each sequence's last :data:`KEPT_TOKENS`.
"""

import dataclasses
import time
from typing import Final

import numpy as np

from neuron.engine.executor import Executor, InFlightStep
from neuron.engine.plan import NO_COPIES, StepPlan
from neuron.engine.scheduler import Step
from neuron.engine.sequence import NO_TOKENS, Int32Array, Sequence
from neuron.engine.speculation import PromptLookup
from neuron.engine.step_timer import StepTimer
from neuron.layers.cache import MAX_DRAFTS
from neuron.layers.draft_head import KEPT_TOKENS

MOST_LAG: Final = KEPT_TOKENS - 2 * MAX_DRAFTS
"""Tokens of a sequence that a head may be without: more are computed together, at little cost for each. The next steps
overwrite no hidden states of these."""
Rows = list[tuple[Sequence, int, int]]
"""Sequences, each with the range of tokens to compute: from, to."""


class DraftModel:
    """A :class:`~neuron.engine.speculation.Drafter`. ``page_tables`` ``[G, slots, P]`` are the target's."""

    shift = 0
    """Number of tokens behind that of a row which the row reads."""

    def __init__(self, executor: Executor, page_tables: Int32Array, page_tokens: int, step_tokens: int) -> None:
        self.executors: tuple[Executor, ...] = (executor,)
        self._executor = executor
        self._page_tables = page_tables[:1]
        self._page_tokens = page_tokens
        self._step_tokens = step_tokens
        self._step_timer = StepTimer(page_tokens, step_tokens)

    def prepare(self, step: Step, plan: StepPlan) -> StepPlan:
        """Return the plan."""
        return plan

    def follow(self, step: Step) -> None:
        """Compute the prompts of ``step``, which has been launched, in the draft model's cache as well."""
        prompts = step.sequences[step.num_decodes + step.num_drafting :]
        counts = step.num_tokens[step.num_decodes + step.num_drafting :]
        rows = [(s, s.num_drafted, s.num_computed + count) for s, count in zip(prompts, counts, strict=True)]
        if rows:
            self._run(rows, sampled=False)

    def available(self, sequences: list[Sequence], most: int) -> list[int]:
        """See :class:`~neuron.engine.speculation.Drafter`."""
        return [most] * len(sequences)

    def cost_s(self, num_sequences: int, depth: int) -> float:
        """See :class:`~neuron.engine.speculation.Drafter`. 0 before any is measured, so that one is."""
        return depth * (self._step_timer.step_s(num_sequences) or 0.0)

    def propose(self, sequences: list[Sequence], counts: list[int]) -> list[Int32Array]:
        """See :class:`~neuron.engine.speculation.Drafter`."""
        left = {s.number: count for s, count in zip(sequences, counts, strict=True)}
        self._catch_up([s for s in sequences if left[s.number]])
        for depth in range(max(counts, default=0)):
            active = [s for s in sequences if left[s.number] > depth]
            if not active:
                break
            started_s = time.perf_counter()
            rows = [(s, s.num_drafted, s.num_tokens - self.shift + depth) for s in active]
            outcome = self._run(rows, sampled=True).wait()
            self._step_timer.record(len(active), 0, time.perf_counter() - started_s)
            for (s, _, end), token in zip(self._order(rows), outcome.ids.tolist(), strict=True):
                if token < 0:  # NaN: no further draft tokens of this sequence
                    left[s.number] = depth
                else:
                    # The array has room behind the known tokens; verified tokens overwrite these.
                    s.tokens[end + self.shift] = token
        return [s.tokens[s.num_tokens : s.num_tokens + left[s.number]].copy() for s in sequences]

    def _catch_up(self, sequences: list[Sequence]) -> None:
        """Compute all known tokens but the last few."""
        for s in sequences:
            while s.num_tokens - s.num_drafted > self._page_tokens:
                self._run([(s, s.num_drafted, min(s.num_tokens - 1, s.num_drafted + self._step_tokens))], sampled=False)

    def _run(self, rows: Rows, *, sampled: bool) -> InFlightStep:
        step = self._executor.launch(self._plan(self._order(rows), sampled))
        for s, _, end in rows:
            s.num_drafted = end
        return step

    def _order(self, rows: Rows) -> Rows:
        """Return the rows in a plan's order: of single tokens, the longest context first."""
        if any(end - start > 1 for _, start, end in rows):
            return rows
        return sorted(rows, key=lambda row: row[2], reverse=True)

    def _plan(self, rows: Rows, sampled: bool) -> StepPlan:
        starts, ends = (np.array([row[at] for row in rows], np.int32) for at in (1, 2))
        slots = np.array([s.slot for s, _, _ in rows], np.int32)
        counts = ends - starts
        cu_seqlens = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(counts, out=cu_seqlens[1:])
        of_row = np.repeat(np.arange(len(rows), dtype=np.int32), counts)
        positions = np.arange(cu_seqlens[-1], dtype=np.int32) - cu_seqlens[of_row] + starts[of_row]
        pages = self._page_tables[:, slots, : -(-int(ends.max()) // self._page_tokens)]
        prompts = np.array([s.num_prompt for s, _, _ in rows], np.int32)
        return StepPlan(
            num_decodes=len(rows) if counts.max() == 1 else 0,
            token_ids=np.concatenate([s.tokens[start + self.shift : end + self.shift] for s, start, end in rows]),
            positions=positions,
            slot_mappings=pages[:, of_row, positions // self._page_tokens] * np.int32(self._page_tokens)
            + positions % self._page_tokens,
            cu_seqlens=cu_seqlens,
            page_tables=pages,
            context_lens=ends,
            sampled=cu_seqlens[1:] - 1 if sampled else NO_TOKENS,
            slots=slots if sampled else NO_TOKENS,
            num_output=ends + self.shift - prompts if sampled else NO_TOKENS,
            hidden_rows=NO_TOKENS,
            stops=np.empty((len(rows), 0), np.int32),
        )


class DraftHead(DraftModel):
    """Draft head of the model that ``executor`` runs, with ``num_slots`` of the batch.

    Its row of token t reads token t + 1 and the hidden state at t. A page that is shared holds rows of its last token
    as of the sequence that filled it, whatever token follows: drafts are verified. Hidden states are kept in places:
    those of each slot by position modulo :data:`KEPT_TOKENS`, and behind these the last step's prompts by row.
    """

    shift = 1

    def __init__(
        self, executor: Executor, page_tables: Int32Array, page_tokens: int, step_tokens: int, num_slots: int
    ) -> None:
        super().__init__(executor, page_tables, page_tokens, step_tokens)
        self.executors = ()
        self._page_tables = page_tables
        self._lookup = PromptLookup()
        self._num_looked_up = 0
        self._first_row = num_slots * KEPT_TOKENS
        self._prompts: dict[int, tuple[int, int]] = {}
        """First token of each prompt's chunk in the last step, and the place of its hidden state, by slot."""

    def prepare(self, step: Step, plan: StepPlan) -> StepPlan:
        """Return the plan with copies of the hidden states that the head will read."""
        slots = np.array([s.slot for s in step.sequences], np.int32)
        of_row = np.repeat(slots, np.diff(plan.cu_seqlens))
        rows = np.arange(len(plan.token_ids), dtype=np.int32)
        places = _kept(of_row, plan.positions)
        first = step.num_decodes + step.num_drafting
        begin, starts, ends = int(plan.cu_seqlens[first]), plan.cu_seqlens[first:-1], plan.cu_seqlens[first + 1 :]
        if begin < len(rows):
            places = np.concatenate((places[:begin], self._first_row + rows[begin:], places[ends - 1]))
            rows = np.concatenate((rows, ends - 1))
        self._prompts = {
            int(slot): (int(plan.positions[start]), self._first_row + int(start))
            for slot, start in zip(slots[first:], starts, strict=True)
        }
        return dataclasses.replace(plan, hidden_saves=np.stack((rows, places)))

    def follow(self, step: Step) -> None:
        """Compute the prompts of ``step``, which has been launched, and what the head lags behind too far."""
        rows: Rows = []
        for index, (s, count) in enumerate(zip(step.sequences, step.num_tokens, strict=True)):
            is_prompt = index >= step.num_decodes + step.num_drafting
            end = min(s.num_computed + count, s.num_tokens - 1) if is_prompt else s.num_tokens - 1
            if s.pooling is None and end - s.num_drafted > (0 if is_prompt else MOST_LAG):
                rows.append((s, s.num_drafted, end))
        if rows:
            self._run(rows, sampled=False)
        self._prompts = {}

    def available(self, sequences: list[Sequence], most: int) -> list[int]:
        """See :class:`~neuron.engine.speculation.Drafter`. Repeated text is looked up, which costs nothing."""
        found = self._lookup.available(sequences, most)
        self._num_looked_up = sum(count > 0 for count in found)
        return [count or most for count in found]

    def cost_s(self, num_sequences: int, depth: int) -> float:
        """See :class:`~neuron.engine.speculation.Drafter`."""
        num_sequences -= self._num_looked_up
        return super().cost_s(num_sequences, depth) if num_sequences else 0.0

    def propose(self, sequences: list[Sequence], counts: list[int]) -> list[Int32Array]:
        """See :class:`~neuron.engine.speculation.Drafter`."""
        looked_up = self._lookup.propose(sequences, counts)
        asked = [s for s, drafts in zip(sequences, looked_up, strict=True) if not len(drafts)]
        wanted = [count for count, drafts in zip(counts, looked_up, strict=True) if not len(drafts)]
        made = iter(super().propose(asked, wanted))
        for s in asked:
            # Rows of drafts were made with the head's own hidden states.
            s.num_drafted = min(s.num_drafted, s.num_tokens - 1)
        return [drafts if len(drafts) else next(made) for drafts in looked_up]

    def _catch_up(self, sequences: list[Sequence]) -> None:
        """Do nothing: the first step of drafts computes the few tokens that are left."""

    def _plan(self, rows: Rows, sampled: bool) -> StepPlan:
        plan = super()._plan(rows, sampled)
        slots = np.array([s.slot for s, _, _ in rows], np.int32)
        loads = _kept(np.repeat(slots, np.diff(plan.cu_seqlens)), plan.positions)
        for index, slot in enumerate(slots.tolist()):
            if slot in self._prompts:
                first, place = self._prompts[slot]
                own = slice(plan.cu_seqlens[index], plan.cu_seqlens[index + 1])
                in_chunk = plan.positions[own] >= first
                loads[own][in_chunk] = plan.positions[own][in_chunk] - first + place
        # The next row of a draft reads the hidden state of this one.
        ends = plan.cu_seqlens[1:] - 1
        saves = np.stack((ends, _kept(slots, plan.positions[ends] + 1))) if sampled else NO_COPIES
        return dataclasses.replace(plan, hidden_loads=loads, hidden_saves=saves)


def _kept(slots: Int32Array, positions: Int32Array) -> Int32Array:
    """Return the places of hidden states of tokens at ``positions`` of sequences in ``slots``."""
    found: Int32Array = slots * np.int32(KEPT_TOKENS) + positions % np.int32(KEPT_TOKENS)
    return found
