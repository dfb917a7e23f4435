"""From logits to token ids for all rows of a step at once, each row by its own sequence's settings.

What a sequence asked for is written into tables when it is admitted, one row a seat, and gathered by seat in each step.
A row's draw depends on its seed and on how many tokens it has, never on its neighbours. Logits stay on the device.
"""

import dataclasses
import math
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from cortex.wire.errors import InvalidRequestError
from neuron.device.jobs import SamplerSettings, TokenLogprobs
from neuron.engine.sequence import Float32Array, Int32Array
from neuron.engine.staging import to_device, to_host
from neuron.triton_kernels import sampling_reference as kernels

NON_FINITE: Final = -1
"""The id given to a row whose logits hold a NaN or an infinity."""
MAX_TOP_LOGPROBS: Final = 20
GREEDY_BELOW: Final = 1e-5
"""Temperatures under this are greedy: dividing by them overflows float32."""

BoolArray = np.ndarray[Any, np.dtype[np.bool_]]
Float64Array = np.ndarray[Any, np.dtype[np.float64]]
UInt64Array = np.ndarray[Any, np.dtype[np.uint64]]

NO_TOKENS: Final[Int32Array] = np.empty(0, np.int32)


@dataclasses.dataclass(frozen=True, slots=True)
class LogprobReport:
    """The log probabilities of the rows of one step that asked for them, on the host once the step is done."""

    place: dict[int, tuple[int, int]]
    """For each such row of the step, which of these it is and how many alternatives it asked for."""
    own: torch.Tensor
    """``[N, 1]`` float32"""
    likeliest: torch.Tensor
    """``[N, K]`` float32"""
    likeliest_ids: torch.Tensor
    """``[N, K]`` int32"""

    def rows(self) -> dict[int, TokenLogprobs]:
        """Return each row's, once the device has computed them."""
        own, values, ids = (part.numpy() for part in (self.own, self.likeliest, self.likeliest_ids))
        return {
            row: TokenLogprobs(own[at].tobytes(), ids[at, :width].tobytes(), values[at, :width].tobytes())
            for row, (at, width) in self.place.items()
        }


class Draws(NamedTuple):
    """How each of R rows is drawn, if plainly. The logits of those with a temperature below 0 are left by kernels."""

    temperature: Float64Array
    top_p: Float64Array
    min_p: Float64Array
    top_k: Int32Array
    seeds: UInt64Array
    num_output: Int32Array


class Sampler:
    """The sampling state of one model's running sequences, on ``device``."""

    def __init__(self, max_sequences: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
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
        """Of the last :meth:`sample`."""
        self._masks: dict[int, Int32Array] = {}
        self._bias: dict[int, tuple[Int32Array, Float32Array]] = {}
        # [seats, V], made when the first sequence with penalties comes: how often each token was generated, and
        # whether the prompt has it.
        self._counts: torch.Tensor | None = None
        self._in_prompt: torch.Tensor | None = None

    def admit(self, seat: int, settings: SamplerSettings, prompt: Int32Array, output: Int32Array = NO_TOKENS) -> None:
        """Take over a sequence's settings, which :func:`check_settings` has passed.

        ``output`` is what it has generated so far: nothing, unless it was preempted.
        """
        self._temperature[seat] = 0 if settings.temperature < GREEDY_BELOW else settings.temperature
        self._top_k[seat] = min(settings.top_k, self._vocab_size)
        self._top_p[seat] = settings.top_p
        self._min_p[seat] = settings.min_p
        self._seed[seat] = settings.seed & 0xFFFF_FFFF_FFFF_FFFF
        self._top_logprobs[seat] = min(settings.top_logprobs, self._vocab_size)
        self._masks.pop(seat, None)
        penalties = (settings.repetition_penalty, settings.presence_penalty, settings.frequency_penalty)
        self._penalties[seat] = penalties
        self._penalised[seat] = penalties != (1.0, 0.0, 0.0)
        self._bias.pop(seat, None)
        if settings.logit_bias:
            tokens, which = np.unique(
                np.array([token for token, _ in settings.logit_bias], np.int32), return_inverse=True
            )
            added = np.bincount(which, [value for _, value in settings.logit_bias]).astype(np.float32)
            self._bias[seat] = tokens, added
        if self._penalised[seat]:
            counts, in_prompt = self._tables()
            counts[seat] = to_device(np.bincount(output, minlength=self._vocab_size), self._device)
            in_prompt[seat] = False
            in_prompt[seat, to_device(prompt, self._device).to(torch.int64)] = True

    def _tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return counts and prompts ``[seats, V]``."""
        if self._counts is None or self._in_prompt is None:
            shape = (len(self._seed), self._vocab_size)
            self._counts = torch.zeros(shape, dtype=torch.int32, device=self._device)
            self._in_prompt = torch.zeros(shape, dtype=torch.bool, device=self._device)
        return self._counts, self._in_prompt

    def checks_guesses(self, seat: int) -> bool:
        """Return whether several rows of ``seat`` may be sampled at once."""
        return not (self._penalised[seat] or self._top_logprobs[seat] >= 0 or seat in self._masks)

    def draws_plainly(self, seats: Int32Array) -> BoolArray:
        """Return which of ``seats`` take the likeliest token of their logits as they are, or draw from them as they
        are, so that nobody has to see these: ``[R]``."""
        found: BoolArray = ~self._penalised[seats] & (self._top_logprobs[seats] < 0)
        if self._bias or self._masks:
            found &= np.array([seat not in self._bias and seat not in self._masks for seat in seats.tolist()], np.bool_)
        return found

    def draws(self, seats: Int32Array, num_output: Int32Array) -> Draws:
        """Return how rows of ``seats`` are drawn of which so many tokens were."""
        return Draws(
            self._temperature[seats],
            self._top_p[seats],
            self._min_p[seats],
            self._top_k[seats],
            self._seed[seats],
            num_output,
        )

    def constrain(self, seat: int, mask: Int32Array | None) -> None:
        """Let the next token of ``seat`` be only one whose bit is set in ``mask`` ``[ceil(V / 32)]``; ``None``: any."""
        if mask is None:
            self._masks.pop(seat, None)
            return
        self._masks[seat] = mask

    def sample(self, logits: torch.Tensor, seats: Int32Array, num_output: Int32Array) -> torch.Tensor:
        """Return the next token id int32 ``[R]`` of each row of ``logits`` ``[R, V]`` float32, which are overwritten.

        ``seats`` and ``num_output`` ``[R]`` are the rows' sequences and how many tokens each has generated. Several
        rows may be of one sequence if it has neither penalties nor a grammar. Leaves ``report``.
        """
        # A sum is finite only if every term is, and reads the logits once: 7 us a row against 46 for isfinite().all().
        finite = logits.sum(-1).isfinite()
        reported = np.flatnonzero(self._top_logprobs[seats] >= 0)
        raw = logits[to_device(reported, self._device)] if len(reported) else None
        penalised = np.flatnonzero(self._penalised[seats])
        if len(penalised):
            self._penalise(logits, penalised, seats)
        for row, seat in enumerate(seats.tolist()) if self._bias else ():
            if seat in self._bias:
                tokens, values = (to_device(array, self._device) for array in self._bias[seat])
                logits[row].index_add_(0, tokens, values)
        for row, seat in enumerate(seats.tolist()) if self._masks else ():
            if seat in self._masks:
                mask = ~self._masks[seat].view(np.uint8)
                forbidden = np.unpackbits(mask, count=self._vocab_size, bitorder="little").view(np.bool_)
                logits[row].masked_fill_(to_device(forbidden, self._device), -torch.inf)
        ids = kernels.sample(
            logits,
            self._temperature[seats],
            self._top_k[seats],
            self._top_p[seats],
            self._min_p[seats],
            uniform(self._seed[seats], num_output),
        )
        if len(penalised) and self._counts is not None:
            rows = to_device(penalised, self._device)
            chosen = to_device(seats[penalised], self._device).to(torch.int64)
            ones = torch.ones(len(penalised), dtype=torch.int32, device=self._device)
            self._counts.index_put_((chosen, ids.index_select(0, rows)), ones, accumulate=True)
        self.report = None if raw is None else self._report(raw, ids, reported, seats)
        return ids.to(torch.int32).masked_fill_(~finite, NON_FINITE)

    def score(
        self, logits: torch.Tensor, seats: Int32Array, num_output: Int32Array, targets: Int32Array
    ) -> torch.Tensor:
        """Return ids as :meth:`sample` does, but of a row with a target in ``targets`` ``[R]`` that, and not a draw.

        Such a row is one of a prompt: it is not penalised, and counts for no penalty. Leaves ``report``.
        """
        scored, drawn = (to_device(which, self._device) for which in map(np.flatnonzero, (targets >= 0, targets < 0)))
        finite = logits.index_select(0, scored).sum(-1).isfinite()
        ids = to_device(targets, self._device).clone()
        ids[scored] = ids[scored].masked_fill(~finite, NON_FINITE)
        if len(drawn):
            rows = np.flatnonzero(targets < 0)
            ids[drawn] = self.sample(logits.index_select(0, drawn), seats[rows], num_output[rows])
        reported = np.flatnonzero(self._top_logprobs[seats] >= 0)
        self.report = None
        if len(reported):
            raw = logits.index_select(0, to_device(reported, self._device))
            self.report = self._report(raw, ids.clamp(min=0).to(torch.int64), reported, seats)
        return ids

    def _report(
        self, raw: torch.Tensor, ids: torch.Tensor, which: np.ndarray[Any, Any], seats: Int32Array
    ) -> LogprobReport:
        """Return those of the rows ``which``, whose logits were ``raw`` ``[N, V]`` before any filter."""
        widths = self._top_logprobs[seats[which]].tolist()
        logprobs = raw.log_softmax(-1)
        chosen = ids[to_device(which, self._device)].unsqueeze(-1)
        likeliest = logprobs.topk(max(widths))
        place = {row: (at, width) for at, (row, width) in enumerate(zip(which.tolist(), widths, strict=True))}
        found = logprobs.gather(-1, chosen), likeliest.values, likeliest.indices.to(torch.int32)
        return LogprobReport(place, *map(to_host, found))

    def _penalise(self, logits: torch.Tensor, which: np.ndarray[Any, Any], seats: Int32Array) -> None:
        """Apply the penalties to the rows ``which``: repetition to prompt and output, the other two to output only.

        Repetition: arXiv:1909.05858, dividing what is positive and multiplying what is negative.
        """
        if self._counts is None or self._in_prompt is None:
            raise RuntimeError("a penalised sequence was never admitted")
        rows = to_device(which, self._device)
        chosen = to_device(seats[which], self._device).to(torch.int64)
        counts = self._counts.index_select(0, chosen)
        seen = (counts > 0) | self._in_prompt.index_select(0, chosen)
        penalties = to_device(self._penalties[seats[which]].astype(np.float32), self._device)
        repetition, presence, frequency = penalties.unsqueeze(-1).unbind(1)
        x = logits.index_select(0, rows)
        x = torch.where(seen, torch.where(x > 0, x / repetition, x * repetition), x)
        x -= frequency * counts + presence * (counts > 0)
        logits.index_copy_(0, rows, x)


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


def uniform(seeds: UInt64Array, counters: Int32Array) -> Float64Array:
    """Return one number in [0, 1) for each seed and counter: the splitmix64 finaliser over both, in turn.

    43 bits, so that times a float64 total it stays below the total. (Steele et al., OOPSLA 2014.)
    """
    bits = _mix(_mix(seeds + _GAMMA) + (counters.astype(np.uint64) + np.uint64(1)) * _GAMMA)
    return (bits >> np.uint64(21)).astype(np.float64) * 2.0**-43


_GAMMA: Final = np.uint64(0x9E3779B97F4A7C15)


def _mix(bits: UInt64Array) -> UInt64Array:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
