"""One model in the engine: loading it piece by piece, and running its steps.

Knows one model's sequences and nothing of the channel: it returns rows and failures, and the engine sends them.
"""

import dataclasses
import logging
import pathlib
from collections.abc import Callable, Generator

import numpy as np
import torch

from cortex.wire.errors import ErrorInfo, UnprocessableError
from cortex.wire.node import ModelSpec
from neuron.device.jobs import ConstraintSettings, LoadedModel, SequenceEnd, TokenRow
from neuron.engine.constraint import Constraint, ConstraintError, Vocabulary
from neuron.engine.errors import NonFiniteLogitsError, error_info, raise_device_fault
from neuron.engine.native_runner import NativeRunner, shared_pool
from neuron.engine.plan import build_plan
from neuron.engine.runner import NOT_SAMPLED, Runner
from neuron.engine.sampler import NON_FINITE
from neuron.engine.scheduler import Limits, Scheduler
from neuron.engine.sequence import Sequence
from neuron.models import packed
from neuron.models.config import ModelConfig
from neuron.models.decoder import load_decoder
from neuron.models.packed_weights import load_packed
from neuron.models.prebuild import prepare
from neuron.models.sizing import PAGE_TOKENS, MemoryPlan, plan_memory
from neuron.models.weights import open_weights
from neuron.text import tokenizer

logger = logging.getLogger(__name__)


@dataclasses.dataclass(slots=True)
class Outcome:
    """What a step made: rows for those that got on, and the error of each sequence that did not."""

    rows: list[TokenRow]
    failures: list[tuple[int, ErrorInfo]]


class Model:
    """A loaded model with its scheduler and its runner."""

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        plan: MemoryPlan,
        runner: Runner | NativeRunner,
        path: pathlib.Path,
        *,
        prefix_cache: bool = True,
    ) -> None:
        self.name = name
        self.config = config
        self.plan = plan
        self.runner = runner
        self._path = path
        self._vocabulary: Vocabulary | None = None
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

    def describe(self) -> LoadedModel:
        """Return what the daemon is told of a finished load."""
        return LoadedModel(
            model=self.name,
            architecture=self.config.architecture.name,
            dtype=self.plan.dtype,
            context_tokens=self.plan.context_tokens,
            max_sequences=self.plan.max_sequences,
            weights_bytes=self.plan.weights_bytes,
            kv_cache_bytes=self.plan.kv_cache_bytes,
        )

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

    def step(self) -> Outcome:
        """Admit, schedule, run, and hand out what was sampled. Raises DeviceFault; any other exception of the step
        fails the sequences that were in it."""
        outcome = Outcome([], [])
        for sequence in self.scheduler.admit():
            try:
                prompt, output = np.split(sequence.tokens[: sequence.num_tokens], [sequence.num_prompt])
                self.runner.sampler.admit(sequence.seat, sequence.sampler, prompt, output)
                if sequence.constraint is not None:
                    self.runner.sampler.constrain(sequence.seat, sequence.constraint.mask())
            except Exception as error:  # noqa: BLE001 (whatever it is, it is this request's)
                self._fail([sequence], error, outcome)
        step = self.scheduler.schedule()
        if step is None:
            return outcome
        try:
            plan = build_plan(step, self.scheduler.page_table, PAGE_TOKENS)
            ids = self.runner.run(plan)
        except Exception as error:  # noqa: BLE001 (whatever it is, it is these requests')
            self._fail(list(step.sequences), error, outcome)
            return outcome
        id_bytes = ids.tobytes()
        for index, (sequence, token, num_tokens) in enumerate(
            zip(step.sequences, ids.tolist(), step.num_tokens, strict=True)
        ):
            if token == NON_FINITE:
                # Pages before these are full, sound, and maybe another's too.
                self.runner.clear_pages(sequence.pages[sequence.num_computed // PAGE_TOKENS :])
                self._fail([sequence], NonFiniteLogitsError(self.name), outcome)
                continue
            self.scheduler.advance(sequence, num_tokens)
            if token == NOT_SAMPLED:
                continue
            cached = sequence.num_cached if sequence.num_output == 0 else None
            complete = False
            if sequence.constraint is not None and token not in sequence.eos:
                try:
                    complete = sequence.constraint.accept(token)
                    self.runner.sampler.constrain(sequence.seat, None if complete else sequence.constraint.mask())
                except ConstraintError as error:
                    self._fail([sequence], error, outcome)
                    continue
            if token in sequence.eos:
                outcome.rows.append(TokenRow(sequence.number, b"", SequenceEnd.STOP, cached))
                self.scheduler.remove(sequence.number)
                continue
            sequence.append(token)
            end = SequenceEnd.LENGTH if sequence.num_output == sequence.max_tokens else None
            end = SequenceEnd.STOP if complete else end
            logprobs = self.runner.sampler.take_logprobs(sequence.seat)
            outcome.rows.append(TokenRow(sequence.number, id_bytes[4 * index : 4 * index + 4], end, cached, logprobs))
            if end is not None:
                self.scheduler.remove(sequence.number)
        return outcome

    def _fail(self, sequences: list[Sequence], error: Exception, outcome: Outcome) -> None:
        raise_device_fault(error)
        if not isinstance(error, NonFiniteLogitsError):
            logger.error("model %s: a step failed", self.name, exc_info=error)
        for sequence in sequences:
            self.scheduler.remove(sequence.number)
            outcome.failures.append((sequence.number, error_info(error)))


def load_model(
    spec: ModelSpec, path: pathlib.Path, device: torch.device, free_bytes: Callable[[], int]
) -> Generator[float, None, Model]:
    """Load a model in pieces of one layer; yield the share done, return the model.

    Nothing is allocated before it is known to fit. Raises the errors of :mod:`neuron.models`.
    """
    if spec.tensor_parallel != 1:
        raise UnprocessableError(
            f"tensor_parallel is {spec.tensor_parallel}; this engine runs a model on one device",
            param="tensor_parallel",
        )
    source = open_weights(path)
    try:
        plan = plan_memory(source.config, spec, str(device), free_bytes())
        yield 0.0
        runner: Runner | NativeRunner
        if plan.native:
            runner = NativeRunner(source.config, (yield from load_packed(source, plan.dtype, shared_pool())), plan)
        else:
            if device.type == "cpu":
                logger.warning("%s runs in eager torch: %s", spec.id, packed.obstacle(source.config))
            weights = yield from load_decoder(source, getattr(torch, plan.dtype), device, quant=plan.quant)
            runner = Runner(source.config, weights, plan, device)
    finally:
        source.close()
    prepare(source.config, plan, device)
    return Model(spec.id, source.config, plan, runner, path, prefix_cache=spec.prefix_cache)
