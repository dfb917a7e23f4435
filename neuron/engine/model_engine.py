"""The step loop of one loaded model: admit, schedule, plan, launch, settle.

It has one model's sequences and no access to the channel: it returns rows and failures, and the engine sends them.
"""

import array
import collections
import dataclasses
import logging
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Final

import numpy as np

from cortex.wire.errors import ErrorInfo, UnprocessableError
from neuron.device.jobs import (
    ConstraintSettings,
    Embedding,
    LoadedModel,
    Pooling,
    SequenceEnd,
    TokenLogprobs,
    TokenRow,
)
from neuron.engine.constraint import Constraint, ConstraintError
from neuron.engine.draft import DraftHead, DraftModel
from neuron.engine.errors import NonFiniteLogitsError, error_info, raise_device_fault
from neuron.engine.executor import MAX_STEPS, Executor, InFlightStep, StepOutcome
from neuron.engine.multi_step import MultiStep
from neuron.engine.plan import StepPlan, build_plan
from neuron.engine.scheduler import Limits, Scheduler, Step
from neuron.engine.sequence import Float32Array, Sequence, SequenceStatus
from neuron.engine.speculation import Drafter, PromptLookup, Speculation
from neuron.engine.step_timer import StepTimer
from neuron.layers.cache import MAX_DRAFTS
from neuron.models.model import ModelConfig
from neuron.models.sizing import PAGE_TOKENS, MemoryPlan
from neuron.text import tokenizer
from neuron.text.matcher import Vocabulary
from neuron.triton_kernels.sampling import NON_FINITE

logger = logging.getLogger(__name__)


MOST_HOST_S: Final = 0.02
"""Longest host time between two steps; beyond it was a pause."""


@dataclasses.dataclass(slots=True)
class StepOutput:
    """Output of a step: rows of new tokens, finished embeddings, and the errors of failed sequences."""

    rows: list[TokenRow] = dataclasses.field(default_factory=list)
    embeddings: list[Embedding] = dataclasses.field(default_factory=list)
    failures: list[tuple[int, ErrorInfo]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, slots=True)
class _Launched:
    """A launched step and its plan, until its outcome is settled."""

    step: Step
    plan: StepPlan
    in_flight: InFlightStep
    started_s: float


class ModelEngine:
    """A loaded model with its scheduler and its executor."""

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        plan: MemoryPlan,
        executor: Executor,
        path: pathlib.Path,
        *,
        draft: Executor | None = None,
        prefix_cache: bool = True,
        speculates: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """``draft`` runs the draft model. ``clock`` returns seconds, by which steps are measured."""
        self.name = name
        self.config = config
        self.plan = plan
        self.executor = executor
        self._path = path
        self._vocabulary: Vocabulary | None = None
        self._launched: collections.deque[_Launched] = collections.deque()
        """Steps in flight, in order."""
        self._clock = clock
        self._settled_s = 0.0
        self._step_timer = StepTimer(PAGE_TOKENS, plan.mixed_step_tokens)
        self.scheduler = Scheduler(
            Limits(
                num_pages=plan.num_pages,
                page_tokens=PAGE_TOKENS,
                context_tokens=plan.context_tokens,
                max_sequences=plan.max_sequences,
                step_tokens=plan.step_tokens,
                mixed_step_tokens=plan.mixed_step_tokens,
                prefix_cache=prefix_cache,
                sampled_rows=plan.sampled_rows,
                windows=plan.tables,
                states=plan.states,
            )
        )
        if plan.states is not None:
            size_bytes, count = plan.states.slot_bytes, plan.states.num_slots
            logger.info("%s keeps a state of %d bytes for each sequence, in %d slots", name, size_bytes, count)
        drafter: Drafter = PromptLookup()
        if speculates and draft is not None:
            drafter = DraftModel(draft, self.scheduler.cache.page_tables, PAGE_TOKENS, plan.step_tokens)
        elif speculates and plan.has_draft_head:
            tables = self.scheduler.cache.page_tables
            drafter = DraftHead(executor, tables, PAGE_TOKENS, plan.step_tokens, plan.max_sequences)
        self.speculation = Speculation(drafter, self._step_timer, MAX_DRAFTS if speculates else 0)
        # A draft model or head needs every token as it comes.
        is_model = isinstance(drafter, DraftModel)
        self._multi_step = MultiStep(executor, self._step_timer, 1 if is_model else MAX_STEPS)
        self._executors = (executor, *drafter.executors)
        """Executors of the model and of its draft model."""

    @property
    def loaded(self) -> LoadedModel:
        """The finished load, as the daemon gets it."""
        return describe(self.name, self.config, self.plan)

    def close(self) -> None:
        """Release what its executors hold beside memory."""
        for executor in self._executors:
            executor.close()

    def constrain(self, settings: ConstraintSettings) -> Constraint:
        """Return the constraint of a new sequence.

        Reads the tokenizer for the first one. Raises :class:`InvalidSchemaError`,
        :class:`UnsupportedTokenizerError`, :class:`UnprocessableError`.
        """
        if self._vocabulary is None:
            if not self.config.eos_ids:
                raise UnprocessableError(f"model {self.name!r} has no end-of-text token, so no grammar can end")
            files = tokenizer.load(self._path)
            self._vocabulary = Vocabulary(files.tokenizer, self.config.vocab_size, self.config.eos_ids)
        return Constraint(self._vocabulary.compile(settings.grammar), settings, self.config.vocab_size)

    @property
    def busy(self) -> bool:
        """Return whether there is a step to run or to wait for."""
        return self.scheduler.busy or bool(self._launched)

    def step(self, *, alone: bool = True) -> StepOutput:
        """Admit, launch a step, and return the settled output of a step.

        That is the step just launched, or, where steps overlap, the one before it. ``alone``: no other model wants the
        device, so this may be a multi-step decode. Raises DeviceFault; any other exception of a step fails the
        sequences that were in it.
        """
        output = StepOutput()
        is_multi_step = alone and self._multi_step.allows(self.scheduler.running.values())
        if is_multi_step or (self._launched and self.speculation.waits()):
            self._settle(output)  # the next step begins with tokens that the host knows
        self._admit(output)
        num_ahead = self._launch(self._schedule(is_multi_step), output)
        self._settle(output, num_ahead)
        return output

    def _admit(self, output: StepOutput) -> None:
        for sequence in self.scheduler.admit():
            try:
                if not sequence.num_output:
                    sequence.acceptance_rate = self.speculation.usual_rate
                prompt, generated = np.split(sequence.tokens[: sequence.num_tokens], [sequence.num_prompt])
                for executor in self._executors:
                    executor.sampler.admit(sequence.slot, sequence.sampler, prompt, generated)
                if sequence.constraint is not None:
                    self.executor.sampler.constrain(sequence.slot, sequence.constraint.mask())
            except Exception as error:  # noqa: BLE001 (any error is this request's)
                self._fail([sequence], error, output)

    def _schedule(self, is_multi_step: bool) -> Step | None:
        step = self.scheduler.schedule(self._step_timer.mixed_step_tokens, self._propose)
        if step is not None and is_multi_step:
            step = dataclasses.replace(step, num_steps=self._multi_step.num_steps(step, self.scheduler.reserve))
        return step

    def _propose(self, decoding: list[Sequence]) -> None:
        # A prompt may end in this step and then takes a row as well.
        num_rows = self.plan.sampled_rows - len(self.scheduler.running)
        can_verify = self.executor.sampler.can_verify_drafts
        self.speculation.propose(decoding, can_verify, num_rows, self.scheduler.reserve)

    def _launch(self, step: Step | None, output: StepOutput) -> int:
        """Plan a step and queue it on the device; return the number of steps that stay in flight for the next one."""
        if step is None:
            return 0
        started_s = self._clock()
        try:
            plan = self.speculation.drafter.prepare(step, build_plan(step, self.scheduler.cache))
            in_flight = self.executor.launch(plan)
            self.speculation.drafter.follow(step)
        except Exception as error:  # noqa: BLE001 (any error is these requests')
            self._fail(step.sequences, error, output)
            return 0
        self.scheduler.begin(step)
        self._launched.append(_Launched(step, plan, in_flight, started_s))
        return int(self.executor.overlaps and step.num_steps == 1)

    def _settle(self, output: StepOutput, num_ahead: int = 0) -> None:
        """Settle the steps in flight, but for the last ``num_ahead``."""
        while len(self._launched) > num_ahead:
            launched = self._launched.popleft()
            try:
                outcome = self._wait(launched)
            except Exception as error:  # noqa: BLE001 (as above)
                self._fail(launched.step.sequences, error, output)
            else:
                self._take(launched.step, launched.plan, outcome, output)

    def _wait(self, launched: _Launched) -> StepOutcome:
        """Wait for a step, and record the time that it took, and that of the host before it."""
        if self.executor.overlaps:
            # The time between two consecutive steps is the host's work: output, sending, planning. A pause is not.
            host_s = self._clock() - self._settled_s
            if host_s < MOST_HOST_S:
                self._step_timer.record_host(host_s)
        outcome = launched.in_flight.wait()
        now_s = self._clock()
        step, cu_seqlens = launched.step, launched.plan.cu_seqlens
        num_rows = int(cu_seqlens[step.num_decodes + step.num_drafting])
        # A step launched ahead began when the one before it ended.
        seconds = (now_s - max(launched.started_s, self._settled_s)) / (1 + len(outcome.later))
        self._step_timer.record(num_rows, int(cu_seqlens[-1]) - num_rows, seconds)
        self._settled_s = now_s
        return outcome

    def _take(self, step: Step, plan: StepPlan, outcome: StepOutcome, output: StepOutput) -> None:
        """Add the tokens, embeddings and failures of a step to ``output``."""
        num_generating = step.num_decodes + step.num_drafting
        finite, ids = outcome.finite.tolist(), outcome.ids.tolist()
        later = outcome.later.T.tolist() if len(outcome.later) else []
        decodes_only = step.num_decodes == len(step.sequences)
        firsts = range(len(ids) + 1) if decodes_only else np.searchsorted(plan.sampled, plan.cu_seqlens).tolist()
        for index, (sequence, num_tokens) in enumerate(zip(step.sequences, step.num_tokens, strict=True)):
            if sequence.status is not SequenceStatus.RUNNING:
                continue  # it ended while this step was in flight
            first, end = firsts[index], firsts[index + 1]
            sampled = ids[first:end]
            if later:
                sampled += later[index]
            if not finite[index] or NON_FINITE in sampled:
                # Pages before these are full, sound, and maybe shared.
                unsettled = self.scheduler.cache.unsettled(sequence)
                for executor in self._executors:
                    executor.clear(unsettled)
                self._fail([sequence], NonFiniteLogitsError(self.name), output)
                continue
            try:
                if sequence.pooling is not None:
                    rows = slice(*np.searchsorted(plan.hidden_rows, plan.cu_seqlens[index : index + 2]))
                    self._pool(sequence, num_tokens, outcome.hidden[rows], output)
                    continue
                scores: TokenLogprobs | None = None
                if sequence.scores_prompt and len(plan.targets):
                    num_scored = int(np.count_nonzero(plan.targets[first:end] >= 0))
                    scores = joined([outcome.logprobs[row] for row in range(first, first + num_scored)])
                    first += num_scored
                    sampled = sampled[num_scored:]
                if first == end:
                    self.scheduler.settle(sequence, num_tokens, 0)
                    if scores is not None:
                        output.rows.append(TokenRow(sequence.number, b"", None, sequence.num_cached, None, scores))
                else:
                    num_tokens = 1 if index < num_generating else num_tokens
                    certain = sampled if later else self.speculation.verify(sequence, sampled)
                    logprobs = outcome.logprobs.get(first)
                    self._continue(sequence, num_tokens, end - first, certain, logprobs, output, scores)
            except Exception as error:  # noqa: BLE001 (any error is this sequence's)
                self._fail([sequence], error, output)

    def _continue(
        self,
        sequence: Sequence,
        num_tokens: int,
        num_sampled: int,
        certain: list[int],
        logprobs: TokenLogprobs | None,
        output: StepOutput,
        scores: TokenLogprobs | None = None,
    ) -> None:
        """Append the ``certain`` tokens to a sequence, up to its end. ``scores`` are of its prompt, from this step.

        ``num_tokens`` more are settled in the cache besides these, and so are these but the last. ``num_sampled`` rows
        of the step were its.
        """
        cached = sequence.num_cached if sequence.num_output == 0 else None
        ids = array.array("i")
        end: SequenceEnd | None = None
        for token in certain:
            if token in sequence.eos:
                end = SequenceEnd.STOP
                break
            complete, mask = False, None
            if sequence.constraint is not None:
                try:
                    complete = sequence.constraint.accept(token)
                    mask = None if complete else sequence.constraint.mask()
                    self.executor.sampler.constrain(sequence.slot, mask)
                except ConstraintError as error:
                    self._fail([sequence], error, output)
                    return
            sequence.append(token)
            ids.append(token)
            if complete:
                end = SequenceEnd.STOP
            elif sequence.num_output == sequence.max_tokens:
                end = SequenceEnd.LENGTH
            if end is not None or mask is not None:
                break
        # Tokens behind an end, or sampled without the mask that they need, do not count; all before are in the cache.
        self.scheduler.settle(sequence, num_tokens + max(0, len(ids) - 1), num_sampled)
        output.rows.append(TokenRow(sequence.number, ids.tobytes(), end, cached, logprobs if ids else None, scores))
        if end is not None:
            self.scheduler.remove(sequence.number)

    def _pool(self, sequence: Sequence, num_tokens: int, hidden: Float32Array, output: StepOutput) -> None:
        """Pool the hidden states ``[E, hidden]`` of a chunk of a text; the last chunk completes its embedding."""
        self.scheduler.settle(sequence, num_tokens, 0)
        if sequence.pooling is Pooling.MEAN:
            total = hidden.sum(0)
            sequence.pooled = total if sequence.pooled is None else sequence.pooled + total
        elif len(hidden):
            sequence.pooled = hidden[0]
        if sequence.num_settled < sequence.num_prompt:
            return
        assert sequence.pooled is not None
        # Scaled to length 1, mean and sum are the same.
        vector = sequence.pooled / max(float(np.linalg.norm(sequence.pooled)), 1e-12)
        output.embeddings.append(Embedding(sequence.number, vector.astype(np.float32).tobytes()))
        self.scheduler.remove(sequence.number)

    def _fail(self, sequences: Iterable[Sequence], error: Exception, output: StepOutput) -> None:
        raise_device_fault(error)
        if not isinstance(error, (NonFiniteLogitsError, ConstraintError)):
            logger.error("model %s: a step failed", self.name, exc_info=error)
        for sequence in sequences:
            if self.scheduler.remove(sequence.number) is not None:
                output.failures.append((sequence.number, error_info(error)))


def joined(rows: list[TokenLogprobs]) -> TokenLogprobs | None:
    """Return the log probabilities of several rows as one; ``None`` without rows."""
    if not rows:
        return None
    chosen, top_ids, top = (b"".join(part) for part in zip(*((r.chosen, r.top_ids, r.top) for r in rows), strict=True))
    return TokenLogprobs(chosen, top_ids, top)


def describe(name: str, config: ModelConfig, plan: MemoryPlan) -> LoadedModel:
    """Return the finished load, as the daemon gets it."""
    return LoadedModel(
        model=name,
        architecture=config.family,
        dtype=plan.dtype,
        context_tokens=plan.context_tokens,
        max_sequences=plan.max_sequences,
        weights_bytes=sum(part.weights_bytes for part in plan.parts),
        kv_cache_bytes=sum(part.kv_cache_bytes for part in plan.parts),
        expanded_bytes=sum(part.expanded_bytes for part in plan.parts),
    )
