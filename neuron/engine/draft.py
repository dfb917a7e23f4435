"""A draft model: a smaller one of the same vocabulary, whose tokens the target model verifies.

It keeps a cache of its own under the page numbers of the target's table 0, so that the scheduler's decisions about a
page, prefix sharing included, hold for both; layers with a window too, as its cache may lag behind the target's. It
computes prompts beside the target and, when draft tokens are wanted, the tokens it has missed since; it samples with
the random numbers of the target's sequence.
"""

import time

import numpy as np

from neuron.engine.executor import Executor, StepOutcome
from neuron.engine.plan import StepPlan
from neuron.engine.scheduler import Step
from neuron.engine.sequence import NO_TOKENS, Int32Array, Sequence
from neuron.engine.step_timer import StepTimer

Rows = list[tuple[Sequence, int, int]]
"""Sequences, each with the range of tokens to compute: from, to."""


class DraftModel:
    """A :class:`~neuron.engine.speculation.Drafter`. ``page_tables`` ``[G, slots, P]`` are the target's."""

    def __init__(self, executor: Executor, page_tables: Int32Array, page_tokens: int, step_tokens: int) -> None:
        self.executors = (executor,)
        self._executor = executor
        self._page_tables = page_tables[:1]
        self._page_tokens = page_tokens
        self._step_tokens = step_tokens
        self._step_timer = StepTimer(page_tokens, step_tokens)

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
            rows = [(s, s.num_drafted, s.num_tokens + depth) for s in active]
            outcome = self._run(rows, sampled=True)
            self._step_timer.record(len(active), 0, time.perf_counter() - started_s)
            for (s, _, end), token in zip(self._order(rows), outcome.ids.tolist(), strict=True):
                if token < 0:  # NaN: no further draft tokens of this sequence
                    left[s.number] = depth
                else:
                    # The array has room behind the known tokens; verified tokens overwrite these.
                    s.tokens[end] = token
        return [s.tokens[s.num_tokens : s.num_tokens + left[s.number]].copy() for s in sequences]

    def _catch_up(self, sequences: list[Sequence]) -> None:
        """Compute all known tokens but the last few."""
        for s in sequences:
            while s.num_tokens - s.num_drafted > self._page_tokens:
                self._run([(s, s.num_drafted, min(s.num_tokens - 1, s.num_drafted + self._step_tokens))], sampled=False)

    def _run(self, rows: Rows, *, sampled: bool) -> StepOutcome:
        outcome = self._executor.launch(self._plan(self._order(rows), sampled)).wait()
        for s, _, end in rows:
            s.num_drafted = end
        return outcome

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
            token_ids=np.concatenate([s.tokens[start:end] for s, start, end in rows]),
            positions=positions,
            slot_mappings=pages[:, of_row, positions // self._page_tokens] * np.int32(self._page_tokens)
            + positions % self._page_tokens,
            cu_seqlens=cu_seqlens,
            page_tables=pages,
            context_lens=ends,
            sampled=cu_seqlens[1:] - 1 if sampled else NO_TOKENS,
            slots=slots if sampled else NO_TOKENS,
            num_output=ends - prompts if sampled else NO_TOKENS,
            hidden_rows=NO_TOKENS,
        )
