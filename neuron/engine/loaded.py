"""One model in the engine: loading it piece by piece, and running its steps.

Knows one model's sequences and nothing of the channel: it returns rows and failures, and the engine sends them.
"""

import array
import dataclasses
import logging
import os
import pathlib
import time
from collections.abc import Callable, Generator, Iterable
from typing import Final

import numpy as np
import torch

from cortex.wire.errors import ErrorInfo, UnprocessableError
from cortex.wire.node import ModelSpec
from neuron.device.driver import DriverHandle, cuda_driver
from neuron.device.jobs import (
    ConstraintSettings,
    Embedding,
    GroupSettings,
    LoadedModel,
    Pooling,
    SequenceEnd,
    TokenLogprobs,
    TokenRow,
)
from neuron.engine.burst import num_rounds
from neuron.engine.constraint import Constraint, ConstraintError, Vocabulary
from neuron.engine.draft import DraftModel
from neuron.engine.errors import NonFiniteLogitsError, error_info, raise_device_fault
from neuron.engine.graph_runner import GraphRunner, Graphs
from neuron.engine.group import Group
from neuron.engine.group_runner import Follower, GroupRunner
from neuron.engine.launched import Executor, Launched
from neuron.engine.native_runner import NativeRunner, shared_pool
from neuron.engine.pace import Pace
from neuron.engine.plan import StepPlan, build_plan
from neuron.engine.runner import Runner
from neuron.engine.sampler import NON_FINITE
from neuron.engine.scheduler import Limits, Scheduler, Step
from neuron.engine.sequence import NO_TOKENS, Float32Array, Sequence, SequenceState
from neuron.engine.speculation import PromptLookup, Speculation
from neuron.models import packed
from neuron.models.config import ModelConfig, read_config
from neuron.models.decoder import load_decoder
from neuron.models.packed_weights import load_packed
from neuron.models.prebuild import prepare
from neuron.models.shard import Shard, local_config
from neuron.models.sizing import PAGE_TOKENS, MemoryPlan, plan_memory, with_pages
from neuron.models.weights import WeightSource, open_weights
from neuron.text import tokenizer

logger = logging.getLogger(__name__)


SPECULATION_SWITCH: Final = "NEURON_SPECULATION"
"""``off`` in the environment generates one token of a sequence a step."""


@dataclasses.dataclass(slots=True)
class Output:
    """What came of a step: rows for those that got on, finished embeddings, and the error of each that did not."""

    rows: list[TokenRow] = dataclasses.field(default_factory=list)
    embeddings: list[Embedding] = dataclasses.field(default_factory=list)
    failures: list[tuple[int, ErrorInfo]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, slots=True)
class _UnderWay:
    """A launched step."""

    step: Step
    plan: StepPlan
    launched: Launched
    started_s: float


class Model:
    """A loaded model with its scheduler and its runner."""

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        plan: MemoryPlan,
        runner: Executor,
        path: pathlib.Path,
        *,
        draft: Executor | None = None,
        prefix_cache: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """``draft`` runs the model that guesses. ``clock`` says the time in seconds, by which steps are measured."""
        self.name = name
        self.config = config
        self.plan = plan
        self.runner = runner
        self._path = path
        self._vocabulary: Vocabulary | None = None
        self._under_way: _UnderWay | None = None
        self._clock = clock
        self._settled_s = 0.0
        self._pace = Pace(PAGE_TOKENS, plan.mixed_step_tokens)
        self.scheduler = Scheduler(
            Limits(
                num_pages=plan.num_pages,
                page_tokens=PAGE_TOKENS,
                context_tokens=plan.context_tokens,
                max_sequences=plan.max_sequences,
                step_tokens=plan.step_tokens,
                mixed_step_tokens=plan.mixed_step_tokens,
                prefix_cache=prefix_cache,
            )
        )

        self.speculation: Speculation | None = None
        self._draft: DraftModel | None = None
        if os.environ.get(SPECULATION_SWITCH, "on") != "off":
            if draft is not None:
                self._draft = DraftModel(draft, self.scheduler.page_table, PAGE_TOKENS, plan.step_tokens)
            self.speculation = Speculation(self._draft or PromptLookup(), self._pace)
        self._executors = (runner,) if self._draft is None else (runner, self._draft.executor)
        """Of the model itself and of the one that guesses for it."""

    @property
    def loaded(self) -> LoadedModel:
        """What the daemon is told of a finished load."""
        return _described(self.name, self.config, self.plan)

    def close(self) -> None:
        """Leave the other ranks, and destroy the graphs, where there are some."""
        if isinstance(self.runner, GroupRunner):
            self.runner.group.close()
        for executor in self._executors:
            if isinstance(executor, GraphRunner):
                executor.close()

    def constrain(self, settings: ConstraintSettings) -> Constraint:
        """Return the state of a sequence that follows a grammar.

        Reads the tokenizer when the first one comes. Raises :class:`InvalidSchemaError`,
        :class:`UnsupportedTokenizerError`, :class:`UnprocessableError`.
        """
        if self._vocabulary is None:
            if not self.config.eos_ids:
                raise UnprocessableError(f"model {self.name!r} has no end-of-text token, so no grammar can end")
            files = tokenizer.load(self._path)
            self._vocabulary = Vocabulary(files.tokenizer, self.config.vocab_size, self.config.eos_ids)
        return self._vocabulary.start(settings)

    @property
    def busy(self) -> bool:
        """Return whether there is a step to run or to wait for."""
        return self.scheduler.busy or self._under_way is not None

    def step(self, *, alone: bool = True) -> Output:
        """Admit, launch a step, and hand out what a step made certain.

        That is the step just launched, or, where steps overlap, the one before it. ``alone``: nobody else wants the
        device, so the step may be a burst. Raises DeviceFault; any other exception of a step fails the sequences that
        were in it.
        """
        output = Output()
        self._admit(output)
        launched = self._launch(output, alone)
        before, self._under_way = self._under_way, launched
        if not self.runner.overlaps:
            before, self._under_way = launched, None
        if before is not None:
            self._settle(before, output)
        return output

    def _admit(self, output: Output) -> None:
        for sequence in self.scheduler.admit():
            try:
                prompt, generated = np.split(sequence.tokens[: sequence.num_tokens], [sequence.num_prompt])
                for executor in self._executors:
                    executor.sampler.admit(sequence.seat, sequence.sampler, prompt, generated)
                if sequence.constraint is not None:
                    self.runner.sampler.constrain(sequence.seat, sequence.constraint.mask())
            except Exception as error:  # noqa: BLE001 (whatever it is, it is this request's)
                self._fail([sequence], error, output)

    def _launch(self, output: Output, alone: bool) -> _UnderWay | None:
        step = self.scheduler.schedule(self._pace.mixed_step_tokens, self._propose)
        if step is None:
            return None
        # A model that guesses has to see every token as it comes.
        if alone and self.runner.repeats and self._draft is None:
            plainly, make_room = self.runner.sampler.draws_plainly, self.scheduler.make_room
            rounds = num_rounds(step, self._pace.step_s(step.num_decodes), plainly, make_room)
            step = dataclasses.replace(step, num_rounds=rounds)
        started_s = self._clock()
        try:
            plan = build_plan(step, self.scheduler.page_table, PAGE_TOKENS)
            launched = self.runner.launch(plan)
            if self._draft is not None:
                self._draft.follow(step)
        except Exception as error:  # noqa: BLE001 (whatever it is, it is these requests')
            self._fail(step.sequences, error, output)
            return None
        self.scheduler.begin(step)
        return _UnderWay(step, plan, launched, started_s)

    def _propose(self, decoding: list[Sequence]) -> None:
        if self.speculation is None:
            return
        able = [
            sequence
            for sequence in decoding
            if not sequence.num_awaited and self.runner.sampler.checks_guesses(sequence.seat)
        ]
        # Whoever does not decode yet may come to the end of its prompt in this step.
        num_rows = self.plan.sampled_rows - len(self.scheduler.running)
        self.speculation.propose(len(decoding), able, num_rows, self.scheduler.make_room)

    def _settle(self, under_way: _UnderWay, output: Output) -> None:
        """Wait for a step and hand out what it brought."""
        step, plan = under_way.step, under_way.plan
        try:
            outcome = under_way.launched.wait()
        except Exception as error:  # noqa: BLE001 (as above)
            self._fail(step.sequences, error, output)
            return
        now_s = self._clock()
        num_generating = step.num_decodes + step.num_drafting
        num_rows = int(plan.cu_seqlens[num_generating])
        # A step behind another began when that one ended.
        seconds = (now_s - max(under_way.started_s, self._settled_s)) / (1 + len(outcome.later))
        self._pace.note(num_rows, int(plan.cu_seqlens[-1]) - num_rows, seconds)
        self._settled_s = now_s
        finite, ids = outcome.finite.tolist(), outcome.ids.tolist()
        later = outcome.later.T.tolist() if len(outcome.later) else []
        decodes_only = step.num_decodes == len(step.sequences)
        firsts = range(len(ids) + 1) if decodes_only else np.searchsorted(plan.sampled, plan.cu_seqlens).tolist()
        for index, (sequence, num_tokens) in enumerate(zip(step.sequences, step.num_tokens, strict=True)):
            if sequence.state is not SequenceState.RUNNING:
                continue  # it ended while this step was under way
            first, end = firsts[index], firsts[index + 1]
            sampled = ids[first:end]
            if later:
                sampled += later[index]
            if not finite[index] or NON_FINITE in sampled:
                # Pages before these are full, sound, and maybe another's too.
                for executor in self._executors:
                    executor.clear_pages(sequence.pages[sequence.num_settled // PAGE_TOKENS :])
                self._fail([sequence], NonFiniteLogitsError(self.name), output)
            elif sequence.pooling is not None:
                rows = slice(*np.searchsorted(plan.hidden_rows, plan.cu_seqlens[index : index + 2]))
                self._pool(sequence, num_tokens, outcome.hidden[rows], output)
            elif first == end:
                self.scheduler.settle(sequence, num_tokens, 0)
            else:
                num_tokens = 1 if index < num_generating else num_tokens
                certain = sampled if later else self._certain(sequence, sampled)
                self._continue(sequence, num_tokens, end - first, certain, outcome.logprobs.get(first), output)

    def _certain(self, sequence: Sequence, sampled: list[int]) -> list[int]:
        """Return of the tokens ``sampled`` in rows of one step the first and those after right guesses."""
        num_right = 0
        if len(sampled) > 1:
            drafts = sequence.drafts.tolist()
            while num_right < len(drafts) and sampled[num_right] == drafts[num_right]:
                num_right += 1
            if self.speculation is not None:
                self.speculation.learn(sequence, num_right)
            sequence.drafts = NO_TOKENS
        return sampled[: num_right + 1]

    def _continue(
        self,
        sequence: Sequence,
        num_tokens: int,
        num_sampled: int,
        certain: list[int],
        logprobs: TokenLogprobs | None,
        output: Output,
    ) -> None:
        """Give a sequence the ``certain`` tokens, up to its end.

        ``num_tokens`` are in the cache for good without these, and so are these but the last. ``num_sampled`` rows of
        the step were its.
        """
        cached = sequence.num_cached if sequence.num_output == 0 else None
        ids = array.array("i")
        end: SequenceEnd | None = None
        for token in certain:
            if token in sequence.eos:
                end = SequenceEnd.STOP
                break
            complete = False
            if sequence.constraint is not None:
                try:
                    complete = sequence.constraint.accept(token)
                    self.runner.sampler.constrain(sequence.seat, None if complete else sequence.constraint.mask())
                except ConstraintError as error:
                    self._fail([sequence], error, output)
                    return
            sequence.append(token)
            ids.append(token)
            if complete:
                end = SequenceEnd.STOP
            elif sequence.num_output == sequence.max_tokens:
                end = SequenceEnd.LENGTH
            if end is not None:
                break
        # Behind an end nothing counts, and what is certain by then is in the cache.
        self.scheduler.settle(sequence, num_tokens + max(0, len(ids) - 1), num_sampled)
        output.rows.append(TokenRow(sequence.number, ids.tobytes(), end, cached, logprobs if ids else None))
        if end is not None:
            self.scheduler.remove(sequence.number)

    def _pool(self, sequence: Sequence, num_tokens: int, hidden: Float32Array, output: Output) -> None:
        """Take the hidden states ``[E, hidden]`` of a piece of a text; with the last, its embedding is done."""
        self.scheduler.settle(sequence, num_tokens, 0)
        if sequence.pooling is Pooling.MEAN:
            total = hidden.sum(0)
            sequence.pooled = total if sequence.pooled is None else sequence.pooled + total
        elif len(hidden):
            sequence.pooled = hidden[0]
        if sequence.num_settled < sequence.num_prompt:
            return
        assert sequence.pooled is not None
        # The mean of what is scaled to length 1 is the scaled sum.
        vector = sequence.pooled / max(float(np.linalg.norm(sequence.pooled)), 1e-12)
        output.embeddings.append(Embedding(sequence.number, vector.astype(np.float32).tobytes()))
        self.scheduler.remove(sequence.number)

    def _fail(self, sequences: Iterable[Sequence], error: Exception, output: Output) -> None:
        raise_device_fault(error)
        if not isinstance(error, NonFiniteLogitsError):
            logger.error("model %s: a step failed", self.name, exc_info=error)
        for sequence in sequences:
            if self.scheduler.remove(sequence.number) is not None:
                output.failures.append((sequence.number, error_info(error)))


def _described(name: str, config: ModelConfig, plan: MemoryPlan) -> LoadedModel:
    return LoadedModel(
        model=name,
        architecture=config.architecture.name,
        dtype=plan.dtype,
        context_tokens=plan.context_tokens,
        max_sequences=plan.max_sequences,
        weights_bytes=sum(part.weights_bytes for part in plan.parts),
        kv_cache_bytes=sum(part.kv_cache_bytes for part in plan.parts),
    )


def _driver_version(device: torch.device) -> tuple[int, int]:
    return DriverHandle(cuda_driver()).version() if device.type == "cuda" else (0, 0)


def load_model(
    spec: ModelSpec,
    path: pathlib.Path,
    device: torch.device,
    free_bytes: Callable[[], int],
    group: GroupSettings | None = None,
    graphs: Graphs | None = None,
    channel_fd: int = -1,
) -> Generator[float, None, Model | Follower]:
    """Load a model, or with ``group`` one rank's part, in pieces of one layer; yield the share done, return it.

    ``graphs`` are what the device captures steps with, if it can; ``channel_fd`` is where the daemon is heard.

    Nothing is allocated before it is known to fit. Raises the errors of :mod:`neuron.models`, :class:`GroupLostError`.
    """
    if group is not None:
        return (yield from _load_part(spec, path, device, free_bytes, group))
    if spec.tensor_parallel != 1:
        raise UnprocessableError(
            f"tensor_parallel is {spec.tensor_parallel}; this worker was told of no group to be in",
            param="tensor_parallel",
        )
    draft_path = pathlib.Path(spec.draft) if spec.draft else None
    draft_config = read_config(draft_path) if draft_path else None
    source = open_weights(path)
    try:
        plan = plan_memory(source.config, spec, str(device), free_bytes(), draft=draft_config)
        yield 0.0
        runner = yield from _load_runner(spec, source, plan, device, graphs, channel_fd)
    finally:
        source.close()
    draft: Executor | None = None
    if draft_path is not None and plan.draft is not None:
        source_of_draft = open_weights(draft_path)
        try:
            draft = yield from _load_runner(spec, source_of_draft, plan.draft, device, graphs, channel_fd)
        finally:
            source_of_draft.close()
    return Model(spec.id, source.config, plan, runner, path, draft=draft, prefix_cache=spec.prefix_cache)


def _load_runner(
    spec: ModelSpec,
    source: WeightSource,
    plan: MemoryPlan,
    device: torch.device,
    graphs: Graphs | None,
    channel_fd: int,
) -> Generator[float, None, Executor]:
    runner: Executor
    if plan.native:
        packed_weights = yield from load_packed(source, plan.dtype, shared_pool())
        runner = NativeRunner(source.config, packed_weights, plan, channel_fd)
    else:
        if device.type == "cpu":
            logger.warning("%s runs in eager torch: %s", spec.id, packed.obstacle(source.config))
        weights = yield from load_decoder(source, getattr(torch, plan.dtype), device, quant=plan.quant)
        runner = (
            Runner(source.config, weights, plan, device)
            if graphs is None
            else GraphRunner(source.config, weights, plan, device, graphs)
        )
    prepare(source.config, plan, device, _driver_version(device))
    return runner


def _load_part(
    spec: ModelSpec, path: pathlib.Path, device: torch.device, free_bytes: Callable[[], int], settings: GroupSettings
) -> Generator[float, None, Model | Follower]:
    shard = Shard(settings.rank, settings.size)
    source = open_weights(path)
    group: Group | None = None
    try:
        config = source.config
        plan = plan_memory(config, spec, str(device), free_bytes(), shard)
        yield 0.0
        group = Group(settings, device)
        plan = with_pages(plan, group.least(plan.num_pages))
        dtype = getattr(torch, plan.dtype)
        weights = yield from load_decoder(source, dtype, device, quant=plan.quant, shard=shard)
        runner = GroupRunner(config, weights, plan, device, group)
        prepare(local_config(config, shard), plan, device, _driver_version(device), in_group=True)
    except BaseException:
        if group is not None:
            group.close()
        raise
    finally:
        source.close()
    if settings.rank:
        return Follower(runner, plan, _described(spec.id, config, plan))
    return Model(spec.id, config, plan, runner, path, prefix_cache=spec.prefix_cache)
