"""Sampling of tokens from logits ``[R, V]`` float32, which are only read: the definition of a draw.

A row's draw depends on its own logits, settings, seed and number of tokens only, and is the same on a CPU and on a GPU.
In this order:

1. Changes of the logits: penalties (repetition of prompt and output, arXiv:1909.05858: a positive logit is divided,
   another multiplied; presence and frequency of output: subtracted), bias, and -inf where the mask forbids a token.
2. With temperature 0, the first of the likeliest tokens. Else each token has the weight ``w = exp((x - max x) / T)``.
3. Filters: top-k; top-p of what that leaves (a token is kept if the weights above its own make less than that share,
   so the likeliest always is); min-p relative to the likeliest. Tokens that tie with the last one kept are kept too.
4. A number ``u`` in [0, 1): 43 bits of splitmix64's finaliser (Steele et al., OOPSLA 2014) over seed and counter, in
   integers of 64 bits::

       gamma = 0x9E3779B97F4A7C15
       u = (mix(mix(seed + gamma) + (counter + 1) * gamma) >> 21) / 2^43
       mix(b):  b = (b ^ b >> 30) * 0xBF58476D1CE4E5B9;  b = (b ^ b >> 27) * 0x94D049BB133111EB;  b ^ b >> 31

5. The first kept token, in order of its id, with which the running sum of kept weights exceeds ``u`` times their total;
   the last kept one, if none does because of rounding.

Weights are float32. Their sums are float64 in eager torch and in ``neuron/cpu_kernels/draw.c``, and float32 in the
kernel, where the border between two tokens may be off by 1e-6 of the total. ``tests/neuron/triton_kernels/draws.json``
has numbers and tokens that all of them give.

A row with a NaN or an infinity among its logits, or with no token allowed, gets NON_FINITE.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Final

import numpy as np
import torch

from neuron.triton_kernels.launch import cdiv, launch, power_of_two
from neuron.triton_kernels.operation import Make, Operation, Run
from neuron.triton_kernels.sampling_kernel import NUM_FOUND, RUN, sample_kernel
from neuron.triton_kernels.workspace import counters

NON_FINITE: Final = -1
"""Id of a row whose logits hold a NaN or an infinity, or that may have no token."""
NUM_CANDIDATES: Final = 512
"""Number of tokens that top-p tries before it sorts the whole vocabulary: 90 us against 3.2 ms a row at V = 49,152."""


@dataclasses.dataclass(frozen=True, slots=True)
class SamplingRows:
    """Sampling parameters of R rows, on the device; V is the vocabulary. ``None`` is off for all rows."""

    temperature: torch.Tensor
    """``[R]`` float32; 0 is greedy."""
    top_k: torch.Tensor
    """``[R]`` int32; 0 is off."""
    top_p: torch.Tensor
    """``[R]`` float32; 1 is off."""
    min_p: torch.Tensor
    """``[R]`` float32; 0 is off."""
    seeds: torch.Tensor
    """``[R]`` int64"""
    counters: torch.Tensor
    """``[R]`` int32: number of tokens that the row has generated."""
    slots: torch.Tensor | None = None
    """``[R]`` int32: the row's place in the two tables below."""
    penalties: torch.Tensor | None = None
    """``[R, 3]`` float32: repetition, presence, frequency."""
    counts: torch.Tensor | None = None
    """``[slots, V]`` int32: count of each token among the generated; the drawn token is counted."""
    in_prompt: torch.Tensor | None = None
    """``[slots, V]`` bool"""
    bias_tokens: torch.Tensor | None = None
    """``[R, X]`` int32, padded with -1; no token twice."""
    bias_values: torch.Tensor | None = None
    """``[R, X]`` float32"""
    allowed: torch.Tensor | None = None
    """``[R, ceil(V / 32)]`` int32: bit ``v % 32`` of word ``v // 32`` is set where token v is allowed."""

    def plain(self, chosen: torch.Tensor) -> "SamplingRows":
        """Return the settings of the rows ``chosen`` int64, without changes of logits."""
        fields = (self.temperature, self.top_k, self.top_p, self.min_p, self.seeds, self.counters)
        return SamplingRows(*(field[chosen] for field in fields))

    def count(self, ids: torch.Tensor) -> None:
        """Count the drawn ``ids`` ``[R]``, but for NON_FINITE, among the generated tokens, where they are counted."""
        if self.counts is not None and self.slots is not None:
            drawn = (ids >= 0).int()
            self.counts.index_put_((self.slots.long(), ids.clamp(min=0).long()), drawn, accumulate=True)


def like(
    num_rows: int, vocab_size: int, num_slots: int, changes: bool, make: Callable[..., torch.Tensor]
) -> SamplingRows:
    """Return rows of tensors by ``make(*shape, dtype=...)``; with ``changes`` also the tables that change logits."""
    f32, i32 = torch.float32, torch.int32
    rows = SamplingRows(
        temperature=make(num_rows, dtype=f32),
        top_k=make(num_rows, dtype=i32),
        top_p=make(num_rows, dtype=f32),
        min_p=make(num_rows, dtype=f32),
        seeds=make(num_rows, dtype=torch.int64),
        counters=make(num_rows, dtype=i32),
    )
    if not changes:
        return rows
    return dataclasses.replace(
        rows,
        slots=make(num_rows, dtype=i32),
        penalties=make(num_rows, 3, dtype=f32),
        counts=make(num_slots, vocab_size, dtype=i32),
        in_prompt=make(num_slots, vocab_size, dtype=torch.bool),
        bias_tokens=make(num_rows, 300, dtype=i32),
        bias_values=make(num_rows, 300, dtype=f32),
        allowed=make(num_rows, -(-vocab_size // 32), dtype=i32),
    )


def uniform(seeds: torch.Tensor, counters: torch.Tensor) -> torch.Tensor:
    """Return the number in [0, 1) of each seed (int64) and counter (int32), float64 of 43 bits."""
    # Products of int64 wrap; a right shift fills with the sign.
    bits = _mix(_mix(seeds + _GAMMA) + (counters.long() + 1) * _GAMMA)
    return _shifted(bits, 21).double() * 2.0**-43


_GAMMA: Final = 0x9E3779B97F4A7C15 - (1 << 64)


def _mix(bits: torch.Tensor) -> torch.Tensor:
    bits = (bits ^ _shifted(bits, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    bits = (bits ^ _shifted(bits, 27)) * (0x94D049BB133111EB - (1 << 64))
    return bits ^ _shifted(bits, 31)


def _shifted(bits: torch.Tensor, by: int) -> torch.Tensor:
    return bits >> by & (1 << 64 - by) - 1


@Operation
def sample(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Return a token id int32 ``[R]`` for each row of ``logits`` ``[R, V]``."""
    x = changed_logits(logits, rows)
    # A tenth of the time of isfinite().all(), and a third of that of argmax().
    finite = logits.sum(-1).isfinite()
    top, ids = x.max(-1)
    finite &= top > -torch.inf
    is_drawn = rows.temperature > 0
    is_cut = is_drawn & ((rows.top_k > 0) & (rows.top_k < x.shape[-1]) | (rows.top_p < 1))
    for which, draw in ((is_drawn & ~is_cut, _draw), (is_cut, _draw_cut)):
        chosen = which.nonzero()[:, 0]
        if len(chosen):
            ids[chosen] = draw(x if len(chosen) == len(x) else x[chosen], top[chosen, None], rows.plain(chosen))
    ids = ids.int().masked_fill_(~finite, NON_FINITE)
    rows.count(ids)
    return ids


def changed_logits(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Return ``logits`` with penalties, bias and mask, a copy if there are any."""
    if rows.penalties is None and rows.bias_tokens is None and rows.allowed is None:
        return logits
    changed = logits.clone()
    # A row at a time, and of it only the tokens that change: passes over all rows take several times as long.
    if rows.penalties is not None and rows.slots is not None and rows.counts is not None and rows.in_prompt is not None:
        for row in (rows.penalties != rows.penalties.new_tensor((1, 0, 0))).any(-1).nonzero()[:, 0].tolist():
            counts, (repetition, presence, frequency) = rows.counts[rows.slots[row]], rows.penalties[row]
            seen = ((counts > 0) | rows.in_prompt[rows.slots[row]]).nonzero()[:, 0]
            x, times = changed[row, seen], counts[seen]
            x = torch.where(x > 0, x / repetition, x * repetition)
            changed[row, seen] = x - (frequency * times + presence * (times > 0))
    if rows.bias_tokens is not None and rows.bias_values is not None:
        for row in (rows.bias_tokens[:, 0] >= 0).nonzero()[:, 0].tolist():
            tokens = rows.bias_tokens[row]
            num_tokens = int((tokens >= 0).sum())
            changed[row].index_add_(0, tokens[:num_tokens], rows.bias_values[row, :num_tokens])
    if rows.allowed is not None:
        octets = rows.allowed.view(torch.uint8).int()
        for row in (rows.allowed != -1).any(-1).nonzero()[:, 0].tolist():
            # A seventeenth of the time of masked_fill().
            changed[row] += _octets(logits.device).index_select(0, octets[row]).flatten()[: logits.shape[-1]]
    return changed


@functools.cache
def _octets(device: torch.device) -> torch.Tensor:
    """Return what is added to the logits of eight tokens, for each byte of a mask: ``[256, 8]``, 0 or -inf."""
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    return torch.where(bits == 0, -torch.inf, 0.0)


def _weights(x: torch.Tensor, top: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    return (x - top).div_(rows.temperature[:, None]).exp_()


def _draw(x: torch.Tensor, top: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Return the index of the drawn logit in each row of ``x``, filtered by min-p."""
    weights = _weights(x, top, rows)
    if rows.min_p.any():
        weights *= weights >= rows.min_p[:, None]
    running = weights.cumsum(-1, dtype=torch.float64)
    target = uniform(rows.seeds, rows.counters)[:, None] * running[:, -1:]
    index = torch.searchsorted(running, target, right=True)[:, 0]
    return index.clamp_(max=x.shape[-1] - 1)  # only a row of NaN gets that far


def _draw_cut(x: torch.Tensor, top: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Return the same, filtered by top-k and top-p before, among as few candidates as suffice."""
    vocab_size = x.shape[-1]
    top_k = rows.top_k.masked_fill(rows.top_k == 0, vocab_size).clamp(max=vocab_size)[:, None].long()
    top_p = rows.top_p.double().clamp(min=1e-30).masked_fill(rows.top_p >= 1, torch.inf)[:, None]
    is_whole = top_k == vocab_size
    total = _weights(x, top, rows).sum(-1, keepdim=True, dtype=torch.float64) if is_whole.any() else 0.0
    width = int(top_k.masked_fill(is_whole, NUM_CANDIDATES).max()) + 1
    while True:
        width = min(width, vocab_size)
        values, candidates = x.topk(width)
        weights = _weights(values, top, rows).double()
        kept = values >= values.gather(-1, top_k.clamp(max=width) - 1)
        running = (weights * kept).cumsum(-1)
        kept &= running - weights < top_p * torch.where(is_whole, total, running[:, -1:])
        least = values.gather(-1, kept.sum(-1, keepdim=True).clamp(min=1) - 1)
        # Rare: a flat distribution, top-p close to 1, or many equal logits.
        if width == vocab_size or bool((values[:, -1:] < least).all()):
            break
        width *= 8
    candidates, order = candidates.sort(-1)
    values = values.masked_fill(values < least, -torch.inf).gather(-1, order)
    return candidates.gather(-1, _draw(values, top, rows)[:, None])[:, 0]


@sample.launcher
def _launch(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    num_rows, vocab_size = logits.shape
    device = logits.device
    ids = torch.empty(num_rows, dtype=torch.int32, device=device)
    changed = any(x is not None for x in (rows.penalties, rows.bias_tokens, rows.allowed))
    block = max(min(power_of_two(vocab_size), 2048), RUN.value)
    parts = cdiv(vocab_size, block)
    num_runs = parts * block // RUN.value
    launch(
        sample_kernel,
        (parts, num_rows),
        rows,
        logits=logits,
        work=torch.empty_like(logits) if changed else None,
        ids=ids,
        maxima=torch.empty((num_rows, num_runs), dtype=torch.float32, device=device),
        runs=torch.empty((num_rows, num_runs), dtype=torch.int32, device=device),
        found=torch.empty((num_rows, NUM_FOUND.value, parts), dtype=torch.float32, device=device),
        arrived=counters(device, num_rows),
        V=vocab_size,
        num_bias=rows.bias_tokens.shape[1] if rows.bias_tokens is not None else 0,
        BLOCK=block,
        BLOCK_BIAS=256,
        BLOCK_PARTS=power_of_two(parts),
        num_warps=8,
        # Unbounded, ptxas of Triton 3.6 takes 80 and spills on sm_100.
        max_registers=128,
    )
    return ids


def random_rows(num_rows: int, vocab_size: int, device: torch.device, *, everything: bool) -> SamplingRows:
    """Return rows of different settings; with ``everything`` also penalties, bias and a mask."""
    generator = np.random.default_rng(num_rows)

    def pick(*choices: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor([choices[i % len(choices)] for i in range(num_rows)], dtype=dtype, device=device)

    rows = SamplingRows(
        temperature=pick(0.0, 1.0, 0.7, 1.3, 5.0),
        top_k=pick(0, 0, 5, 1, 40, 0, 3, 300, dtype=torch.int32),
        top_p=pick(1.0, 0.9, 1.0, 0.3, 0.95, 0.0),
        min_p=pick(0.0, 0.0, 0.2, 0.0, 0.05),
        seeds=torch.from_numpy(generator.integers(0, 1 << 62, num_rows)).to(device),
        counters=torch.arange(num_rows, dtype=torch.int32, device=device),
    )
    if not everything:
        return rows
    bias = np.full((num_rows, 7), -1, np.int32)
    for row in range(num_rows):
        bias[row, : row % 8] = generator.choice(vocab_size, row % 8, replace=False)
    words = generator.integers(-(1 << 31), 1 << 31, (num_rows, -(-vocab_size // 32)), dtype=np.int64).astype(np.int32)
    words[::2] = -1
    words[-1] = 0
    return dataclasses.replace(
        rows,
        slots=torch.from_numpy(generator.permutation(num_rows).astype(np.int32)).to(device),
        penalties=torch.from_numpy(generator.uniform((0.5, -1, -1), (2, 1, 1), (num_rows, 3)).astype(np.float32)).to(
            device
        ),
        counts=torch.from_numpy(generator.poisson(0.3, (num_rows, vocab_size)).astype(np.int32)).to(device),
        in_prompt=torch.from_numpy(generator.random((num_rows, vocab_size)) < 0.2).to(device),
        bias_tokens=torch.from_numpy(bias).to(device),
        bias_values=torch.from_numpy(generator.normal(0, 3, bias.shape).astype(np.float32)).to(device),
        allowed=torch.from_numpy(words).to(device),
    )


@sample.cases(dtypes=(torch.float32,))
def _cases(check: Run, make: Make) -> None:
    for num_rows, vocab_size, everything in ((11, 131, False), (13, 131, True), (10, 5000, False), (9, 4999, True)):
        # Not random, so that no number falls onto the border between two tokens, where float32 may take either.
        generator = np.random.default_rng(vocab_size)
        logits = torch.from_numpy(generator.normal(0, 3, (num_rows, vocab_size)).astype(np.float32)).to(make.device)
        logits[num_rows // 2, vocab_size // 2] = torch.nan
        check(logits, random_rows(num_rows, vocab_size, make.device, everything=everything))


@sample.launches()
def _launches(run: Run, make: Make) -> None:
    for changes in (False, True):
        run(make(8, 151936, dtype=torch.float32), like(8, 151936, 64, changes, make.integers))
