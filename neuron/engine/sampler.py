"""From logits to token ids for all rows of a step at once, each row by its own sequence's settings.

A sequence's settings are written into tables when it is admitted, one row a slot, and gathered by slot in each step.
Tokens are drawn as :mod:`neuron.triton_kernels.sampling` defines it, by its kernel or in eager torch; logits stay on
the device.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from cortex.wire.errors import InvalidRequestError
from neuron.device.jobs import SamplerSettings, TokenLogprobs
from neuron.engine.sequence import Float32Array, Int32Array
from neuron.engine.staging import Array, to_device, to_host, together
from neuron.triton_kernels.operations import EAGER
from neuron.triton_kernels.sampling import NON_FINITE, SamplingRows

MAX_TOP_LOGPROBS: Final = 20
GREEDY_BELOW: Final = 1e-5
"""Temperature under which sampling is greedy: dividing by it overflows float32."""
MOST_TEMPERATURE: Final = 1e30
"""Temperature that stands for higher ones, which overflow float32: all tokens that are kept are equally likely."""

BoolArray = np.ndarray[Any, np.dtype[np.bool_]]
Float64Array = np.ndarray[Any, np.dtype[np.float64]]
UInt64Array = np.ndarray[Any, np.dtype[np.uint64]]

Draw = Callable[[torch.Tensor, SamplingRows], torch.Tensor]

NO_TOKENS: Final[Int32Array] = np.empty(0, np.int32)


@dataclasses.dataclass(frozen=True, slots=True)
class LogprobReport:
    """Log probabilities of the rows of one step that want them, on the host once the step is done."""

    place: dict[int, tuple[int, int]]
    """For each such row of the step, its index here and its number of alternatives."""
    own: torch.Tensor
    """``[N, 1]`` float32"""
    likeliest: torch.Tensor
    """``[N, K]`` float32"""
    likeliest_ids: torch.Tensor
    """``[N, K]`` int32"""

    def rows(self) -> dict[int, TokenLogprobs]:
        """Return the log probabilities by row, once the device has computed them."""
        own, values, ids = (part.numpy() for part in (self.own, self.likeliest, self.likeliest_ids))
        return {
            row: TokenLogprobs(own[at].tobytes(), ids[at, :width].tobytes(), values[at, :width].tobytes())
            for row, (at, width) in self.place.items()
        }


class Draws(NamedTuple):
    """Settings of R rows that draw plainly. Kernels leave the logits of rows with a temperature below 0."""

    temperature: Float64Array
    top_p: Float64Array
    min_p: Float64Array
    top_k: Int32Array
    seeds: UInt64Array
    num_output: Int32Array


class Sampler:
    """The sampling state of one model's running sequences, on ``device``; ``draw`` is the kernel, or its reference."""

    def __init__(self, max_sequences: int, vocab_size: int, device: torch.device, draw: Draw = EAGER.sample) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._draw = draw
        self._temperature: Float64Array = np.zeros(max_sequences)
        self._top_p: Float64Array = np.ones(max_sequences)
        self._min_p: Float64Array = np.zeros(max_sequences)
        self._top_k: Int32Array = np.zeros(max_sequences, np.int32)
        self._seed: UInt64Array = np.zeros(max_sequences, np.uint64)
        self._penalties: Float64Array = np.zeros((max_sequences, 3))
        """Repetition, presence, frequency."""
        self._penalised = np.zeros(max_sequences, np.bool_)
        self._top_logprobs: Int32Array = np.full(max_sequences, -1, np.int32)
        self.report: LogprobReport | None = None
        """Log probabilities of the last :meth:`sample`."""
        self._masks: dict[int, Int32Array] = {}
        self._bias: dict[int, tuple[Int32Array, Float32Array]] = {}
        # [slots, V], made for the first row that changes its logits: the count of each generated token, and whether
        # the prompt has it.
        self._counts: torch.Tensor | None = None
        self._in_prompt: torch.Tensor | None = None

    def admit(self, slot: int, settings: SamplerSettings, prompt: Int32Array, output: Int32Array = NO_TOKENS) -> None:
        """Write a sequence's settings, which :func:`check_settings` has passed.

        ``output`` holds the tokens generated so far, if it was preempted.
        """
        is_greedy = settings.temperature < GREEDY_BELOW
        self._temperature[slot] = 0 if is_greedy else min(settings.temperature, MOST_TEMPERATURE)
        self._top_k[slot] = min(settings.top_k, self._vocab_size)
        self._top_p[slot] = settings.top_p
        self._min_p[slot] = settings.min_p
        self._seed[slot] = settings.seed & 0xFFFF_FFFF_FFFF_FFFF
        self._top_logprobs[slot] = min(settings.top_logprobs, self._vocab_size)
        self._masks.pop(slot, None)
        penalties = (settings.repetition_penalty, settings.presence_penalty, settings.frequency_penalty)
        self._penalties[slot] = penalties
        self._penalised[slot] = penalties != (1.0, 0.0, 0.0)
        self._bias.pop(slot, None)
        if settings.logit_bias:
            tokens, which = np.unique(
                np.array([token for token, _ in settings.logit_bias], np.int32), return_inverse=True
            )
            added = np.bincount(which, [value for _, value in settings.logit_bias]).astype(np.float32)
            self._bias[slot] = tokens, added
        if self._penalised[slot]:
            counts, in_prompt = self._tables()
            counts[slot] = to_device(np.bincount(output, minlength=self._vocab_size), self._device)
            in_prompt[slot] = False
            in_prompt[slot, to_device(prompt, self._device).to(torch.int64)] = True

    def _tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return counts and prompts ``[slots, V]``."""
        if self._counts is None or self._in_prompt is None:
            shape = (len(self._seed), self._vocab_size)
            self._counts = torch.zeros(shape, dtype=torch.int32, device=self._device)
            self._in_prompt = torch.zeros(shape, dtype=torch.bool, device=self._device)
        return self._counts, self._in_prompt

    def can_verify_drafts(self, slot: int) -> bool:
        """Return whether several rows of ``slot`` may be sampled at once."""
        return not (self._penalised[slot] or self._top_logprobs[slot] >= 0 or slot in self._masks)

    def draws_plainly(self, slots: Int32Array) -> BoolArray:
        """Return whether each of ``slots`` samples from its raw logits, without penalties, bias, grammar or log
        probabilities: ``[R]``."""
        found: BoolArray = ~self._penalised[slots] & (self._top_logprobs[slots] < 0)
        if self._bias or self._masks:
            found &= np.array([slot not in self._bias and slot not in self._masks for slot in slots.tolist()], np.bool_)
        return found

    def draws(self, slots: Int32Array, num_output: Int32Array) -> Draws:
        """Return the settings of rows of ``slots``, which have generated ``num_output`` tokens."""
        return Draws(
            self._temperature[slots],
            self._top_p[slots],
            self._min_p[slots],
            self._top_k[slots],
            self._seed[slots],
            num_output,
        )

    def constrain(self, slot: int, mask: Int32Array | None) -> None:
        """Restrict the next token of ``slot`` to the bits set in ``mask`` ``[ceil(V / 32)]``; ``None`` allows all."""
        if mask is None:
            self._masks.pop(slot, None)
            return
        self._masks[slot] = mask

    def sample(self, logits: torch.Tensor, slots: Int32Array, num_output: Int32Array) -> torch.Tensor:
        """Return the next token id int32 ``[R]`` of each row of ``logits`` ``[R, V]`` float32.

        ``slots`` and ``num_output`` ``[R]`` are each row's slot and its generated tokens. Several rows may be of one
        sequence if it has neither penalties nor a grammar. Sets ``report``.
        """
        ids = self._draw(logits, self._rows(slots, num_output))
        self.report = self._report(logits, ids, slots)
        return ids

    def _rows(self, slots: Int32Array, num_output: Int32Array) -> SamplingRows:
        draws = self.draws(slots, num_output)
        arrays: list[Array] = [
            draws.temperature.astype(np.float32),
            draws.top_k,
            draws.top_p.astype(np.float32),
            draws.min_p.astype(np.float32),
            draws.seeds.view(np.int64),
            draws.num_output,
        ]
        chosen = slots.tolist()
        if not (self._penalised[slots].any() or any(slot in self._bias or slot in self._masks for slot in chosen)):
            return SamplingRows(*together(arrays, self._device))
        # All three for all rows, so that there are two kernels and not eight: other rows get neutral values.
        arrays += [slots, self._penalties[slots].astype(np.float32), *self._biases(chosen), self._allowed(chosen)]
        there = together(arrays, self._device)
        return SamplingRows(*[*there[:8], *self._tables(), *there[8:]])

    def _biases(self, slots: list[int]) -> tuple[Int32Array, Float32Array]:
        width = max([1, *(len(self._bias[slot][0]) for slot in slots if slot in self._bias)])
        tokens: Int32Array = np.full((len(slots), width), -1, np.int32)
        values: Float32Array = np.zeros((len(slots), width), np.float32)
        for row, slot in enumerate(slots):
            if slot in self._bias:
                own_tokens, own_values = self._bias[slot]
                tokens[row, : len(own_tokens)] = own_tokens
                values[row, : len(own_values)] = own_values
        return tokens, values

    def _allowed(self, slots: list[int]) -> Int32Array:
        allowed: Int32Array = np.full((len(slots), -(-self._vocab_size // 32)), -1, np.int32)
        for row, slot in enumerate(slots):
            if slot in self._masks:
                allowed[row] = self._masks[slot]
        return allowed

    def score(
        self, logits: torch.Tensor, slots: Int32Array, num_output: Int32Array, targets: Int32Array
    ) -> torch.Tensor:
        """Return ids as :meth:`sample` does; a row with a target in ``targets`` ``[R]`` gets that and no draw.

        Such a row is of a prompt: it is not penalised, and counts for no penalty. Sets ``report``.
        """
        scored, drawn = (to_device(which, self._device) for which in map(np.flatnonzero, (targets >= 0, targets < 0)))
        finite = logits.index_select(0, scored).sum(-1).isfinite()
        ids = to_device(targets, self._device).clone()
        ids[scored] = ids[scored].masked_fill(~finite, NON_FINITE)
        if len(drawn):
            rows = np.flatnonzero(targets < 0)
            ids[drawn] = self.sample(logits.index_select(0, drawn), slots[rows], num_output[rows])
        self.report = self._report(logits, ids, slots)
        return ids

    def _report(self, logits: torch.Tensor, ids: torch.Tensor, slots: Int32Array) -> LogprobReport | None:
        """Return the log probabilities of the rows that want them."""
        which = np.flatnonzero(self._top_logprobs[slots] >= 0)
        if not len(which):
            return None
        widths = self._top_logprobs[slots[which]].tolist()
        rows = to_device(which, self._device)
        logprobs = logits.index_select(0, rows).log_softmax(-1)
        # A row that is not finite has no id, and its report is never read.
        chosen = ids[rows].clamp(min=0).to(torch.int64).unsqueeze(-1)
        likeliest = logprobs.topk(max(widths))
        place = {row: (at, width) for at, (row, width) in enumerate(zip(which.tolist(), widths, strict=True))}
        found = logprobs.gather(-1, chosen), likeliest.values, likeliest.indices.to(torch.int32)
        return LogprobReport(place, *map(to_host, found))


def check_settings(settings: SamplerSettings, vocab_size: int) -> None:
    """Raise :class:`InvalidRequestError` naming the first setting that is out of its range."""
    ranges = {
        "temperature": (0.0, math.inf),
        "top_k": (0, math.inf),
        "top_logprobs": (-1, MAX_TOP_LOGPROBS),
        "top_p": (0.0, 1.0),
        "min_p": (0.0, 1.0),
        "repetition_penalty": (1e-3, 1e3),
        "presence_penalty": (-1e3, 1e3),
        "frequency_penalty": (-1e3, 1e3),
    }
    for name, (low, high) in ranges.items():
        value = getattr(settings, name)
        if not low <= value <= high or value == math.inf:
            raise InvalidRequestError(f"{name} is {value}; it must be from {low:g} to {high:g}", param=name)
    for token, value in settings.logit_bias:
        if not 0 <= token < vocab_size or not math.isfinite(value):
            raise InvalidRequestError(
                f"logit_bias adds {value} to token {token}; the model has {vocab_size} tokens", param="logit_bias"
            )
