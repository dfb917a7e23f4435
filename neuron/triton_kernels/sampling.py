"""Sampling of tokens from logits on the device, without waiting on the host.

In this order, as :mod:`neuron.engine.sampler` has it: penalties (repetition of prompt and output, arXiv:1909.05858;
presence and frequency of output only), bias, grammar mask; then temperature, top-k, top-p of what that leaves, min-p
relative to the likeliest; then one token, drawn by the Gumbel-max trick: ``argmax(logit / T - log(-log u))``, with
``u`` of Philox 4x32-10 (Salmon et al., SC 2011) at the counter (token id, number of the draw) under the row's seed,
so that a row's draw depends only on its own logits, seed and position. Temperature 0 is the argmax.

A row is split over programs of BLOCK logits, or one would pass over a whole vocabulary at the rate of one processor: a
step of a small model is shorter than that. Each applies its changes to the logits, draws the best where no filter is
on, and stores the result and the greatest logit of each run of RUN. The last to arrive (see
:mod:`neuron.triton_kernels.workspace`) merges the results, and filters alone: it reads only the runs whose greatest
logit may pass, a few of thousands for usual logits.

Top-k and top-p keep logits at or above a threshold, found by bisecting on their bits, which sort as integers as the
numbers do: exact, with three probes a pass. Tokens that tie with the last one kept are kept too.

Also returned: the log-probability of the chosen token in the model's own distribution, before any of the above; and a
row with a NaN or an infinity among its logits, or with no token allowed, gets NON_FINITE. ``logits`` ``[R, V]`` float32
are only read.
"""

import dataclasses
from typing import Final

import numpy as np
import torch

from neuron.triton_kernels import sampling_reference, sampling_rows
from neuron.triton_kernels._triton import tl, triton
from neuron.triton_kernels.launch import cdiv, launch, power_of_two
from neuron.triton_kernels.operation import Make, Operation, Run
from neuron.triton_kernels.sampling_rows import SamplingRows
from neuron.triton_kernels.workspace import counters

NON_FINITE: Final = -1
RUN = tl.constexpr(32)
"""Number of logits whose greatest is stored: a cache line."""
NUM_FOUND = tl.constexpr(7)
"""Number of results that each program stores."""


@triton.jit
def _ordered(x):
    """Return uint32 that sort as the float32 ``x`` do."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _noisy(value, v, seed, draw, sharpness):
    """Return the logits of tokens ``v``, sharpened, with Gumbel noise: the argmax is a draw."""
    bits, _, _, _ = tl.philox(seed, v, draw + tl.zeros_like(v), tl.zeros_like(v), tl.zeros_like(v))
    # 24 bits, and half a step up: never 0, never 1.
    u = ((bits >> 8).to(tl.int32).to(tl.float32) + 0.5) * 5.9604644775390625e-08
    return value * sharpness - tl.log(-tl.log(u))


@triton.jit
def _run(x, size, runs, num_runs, start, LISTED: tl.constexpr, BLOCK: tl.constexpr):
    """Return the numbers in BLOCK / RUN runs of ``x`` ``[size]``, from the ``start``-th on, and their positions.

    Numbers beyond the end are -inf. The runs are the ones in ``runs``, or all in turn.
    """
    place = start + tl.arange(0, BLOCK // RUN)
    there = place < num_runs
    run = place
    if LISTED:
        run = tl.load(runs + place, mask=there, other=0)
    v = run[:, None] * RUN + tl.arange(0, RUN)[None, :]
    # .cg: past the first-level cache, which other processors' stores do not reach.
    value = tl.load(x + v, mask=there[:, None] & (v < size), other=float("-inf"), cache_modifier=".cg")
    return value, v


@triton.jit
def _above(
    x, size, runs, num_runs, top, sharpness, first, step, level,
    LISTED: tl.constexpr, MASS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return, for three probes in arithmetic progression, the number (or the mass) of logits above each.

    Only logits of order ``level`` or more count: the ones that top-k keeps.
    """
    low = tl.zeros([BLOCK // RUN, RUN], tl.float32)
    middle = tl.zeros([BLOCK // RUN, RUN], tl.float32)
    high = tl.zeros([BLOCK // RUN, RUN], tl.float32)
    for start in range(0, num_runs, BLOCK // RUN):
        value, _ = _run(x, size, runs, num_runs, start, LISTED, BLOCK)
        order = _ordered(value)
        one = tl.where((value > float("-inf")) & (order >= level), 1.0, 0.0)
        if MASS:
            one *= tl.exp((value - top) * sharpness)
        low += tl.where(order > first, one, 0.0)
        middle += tl.where(order > first + step, one, 0.0)
        high += tl.where(order > first + 2 * step, one, 0.0)
    return tl.sum(tl.sum(low, 1), 0), tl.sum(tl.sum(middle, 1), 0), tl.sum(tl.sum(high, 1), 0)


@triton.jit
def _list_runs(maxima, runs, num_runs, level, BLOCK: tl.constexpr):
    """List in ``runs`` the runs of ``num_runs`` with a logit of order ``level`` or more; return their number."""
    tl.debug_barrier()  # all threads are done with the list before
    found = tl.zeros([], tl.int32)
    for start in range(0, num_runs, BLOCK):
        run = start + tl.arange(0, BLOCK)
        most = tl.load(maxima + run, mask=run < num_runs, other=float("-inf"), cache_modifier=".cg")
        takes = ((run < num_runs) & (_ordered(most) >= level)).to(tl.int32)
        tl.store(runs + (found + tl.cumsum(takes, 0) - 1), run, mask=takes != 0)
        found += tl.sum(takes, 0)
    tl.debug_barrier()
    return found


@triton.jit
def _threshold(
    x, size, maxima, runs, num_runs, count, top, sharpness, limit, low, level,
    LISTED: tl.constexpr, MASS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the least order, from ``low`` on, with less than ``limit`` above it: logits at or over it are kept.

    ``count`` runs are read. A long list is made anew as the bounds close in.
    """
    high = _ordered(top)
    while low < high:
        if LISTED:
            if count > BLOCK // RUN:
                count = _list_runs(maxima, runs, num_runs, low, BLOCK)
        step = ((high - low) >> 2) + 1
        a, b, c = _above(x, size, runs, count, top, sharpness, low + step - 1, step, level, LISTED, MASS, BLOCK)
        low += ((a >= limit).to(tl.uint32) + (b >= limit).to(tl.uint32) + (c >= limit).to(tl.uint32)) * step
        high = tl.minimum(high, low + step - 1)
    # Sums of the same masses in another order may differ in the last bit.
    return tl.minimum(low, high)


@triton.jit(do_not_specialize=["num_bias"])
def _sample_kernel(
    logits,
    work,
    temperature,
    top_k,
    top_p,
    min_p,
    seeds,
    counters,
    slots,
    penalties,
    counts,
    in_prompt,
    bias_tokens,
    bias_values,
    allowed,
    ids,
    logprobs,
    maxima,
    runs,
    found,
    arrived,
    V,
    num_bias,
    BLOCK: tl.constexpr,
    BLOCK_BIAS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    part, row = tl.program_id(0), tl.program_id(1)
    num_parts = tl.cdiv(V, BLOCK)
    num_runs = num_parts * (BLOCK // RUN)
    wide_row = row.to(tl.int64)
    raw_logits = logits + wide_row * V
    # Where the logits are changed, the changed ones are a copy.
    x = raw_logits
    if work is not None:
        x = work + wide_row * V
    maxima += wide_row * num_runs
    runs += wide_row * num_runs
    found += wide_row * num_parts * NUM_FOUND
    heat = tl.load(temperature + row)
    # The logits are not divided by the temperature: 1 / T multiplies them where it matters, order stays the same.
    sharpness = 1.0 / tl.where(heat == 0.0, 1.0, heat)
    kept = tl.load(top_k + row)
    share = tl.load(top_p + row)
    floor = tl.load(min_p + row)
    by_rank = (kept > 0) & (kept < V)
    filtered = (heat > 0.0) & (by_rank | (share < 1.0) | (floor > 0.0))
    seed = tl.load(seeds + row)
    draw = tl.load(counters + row)
    if penalties is not None:
        slot = tl.load(slots + row).to(tl.int64)
        repetition = tl.load(penalties + row * 3)
        presence = tl.load(penalties + row * 3 + 1)
        frequency = tl.load(penalties + row * 3 + 2)

    # The model's own distribution, and the changed logits.
    v = part * BLOCK + tl.arange(0, BLOCK)
    inside = v < V
    value = tl.load(raw_logits + v, mask=inside, other=0.0)
    sound = tl.sum(value - value, 0)  # NaN where not finite
    raw = tl.where(inside, value, float("-inf"))
    peak = tl.max(raw, 0)
    mass = tl.sum(tl.exp(raw - tl.where(peak == float("-inf"), 0.0, peak)), 0)
    if penalties is not None:
        times = tl.load(counts + slot * V + v, mask=inside, other=0)
        seen = (times > 0) | (tl.load(in_prompt + slot * V + v, mask=inside, other=0) != 0)
        value = tl.where(seen, tl.where(value > 0, value / repetition, value * repetition), value)
        value -= frequency * times.to(tl.float32) + tl.where(times > 0, presence, 0.0)
    if allowed is not None:
        words = tl.load(allowed + row * tl.cdiv(V, 32) + v // 32, mask=inside, other=0)
        value = tl.where((words >> (v % 32)) & 1 != 0, value, float("-inf"))
    if work is not None:
        tl.store(x + v, value, mask=inside)
    if bias_tokens is not None:
        # A thread reads another thread's stores.
        tl.debug_barrier()
        for start in range(0, num_bias, BLOCK_BIAS):
            i = start + tl.arange(0, BLOCK_BIAS)
            biased = tl.load(bias_tokens + row * num_bias + i, mask=i < num_bias, other=-1)
            here = (biased >= part * BLOCK) & (biased < tl.minimum(part * BLOCK + BLOCK, V))
            changed = tl.load(x + biased, mask=here, other=0.0)
            changed += tl.load(bias_values + row * num_bias + i, mask=here, other=0.0)
            tl.store(x + biased, changed, mask=here)
        tl.debug_barrier()
        value = tl.load(x + v, mask=inside, other=0.0)
    value = tl.where(inside, value, float("-inf"))
    most = tl.max(value, 0)
    sharpened = tl.sum(tl.exp((value - tl.where(most == float("-inf"), 0.0, most)) * sharpness), 0)
    score = value
    if (heat > 0.0) & (filtered == 0):
        score = _noisy(value, v, seed, draw, sharpness)
    best = tl.max(score, 0)
    chosen = tl.min(tl.where(inside & (score == best), v, V), 0)

    run = part * (BLOCK // RUN) + tl.arange(0, BLOCK // RUN)
    tl.store(maxima + run, tl.max(tl.reshape(value, [BLOCK // RUN, RUN]), 1))
    at = found + part
    tl.store(at, peak)
    tl.store(at + num_parts, mass)
    tl.store(at + 2 * num_parts, sound)
    tl.store(at + 3 * num_parts, most)
    tl.store(at + 4 * num_parts, sharpened)
    tl.store(at + 5 * num_parts, best)
    tl.store(at + 6 * num_parts, chosen.to(tl.float32))  # whole to 2^24
    tl.debug_barrier()
    if tl.atomic_add(arrived + row, 1, sem="acq_rel") < num_parts - 1:
        return
    tl.debug_barrier()
    tl.store(arrived + row, 0)

    i = tl.arange(0, BLOCK_PARTS)
    there = i < num_parts
    at = found + i
    peaks = tl.load(at, mask=there, other=float("-inf"), cache_modifier=".cg")
    masses = tl.load(at + num_parts, mask=there, other=0.0, cache_modifier=".cg")
    sounds = tl.load(at + 2 * num_parts, mask=there, other=0.0, cache_modifier=".cg")
    mosts = tl.load(at + 3 * num_parts, mask=there, other=float("-inf"), cache_modifier=".cg")
    sharpeneds = tl.load(at + 4 * num_parts, mask=there, other=0.0, cache_modifier=".cg")
    bests = tl.load(at + 5 * num_parts, mask=there, other=float("-inf"), cache_modifier=".cg")
    chosens = tl.load(at + 6 * num_parts, mask=there, other=0.0, cache_modifier=".cg").to(tl.int32)
    whole = tl.max(peaks, 0)
    log_mass = whole + tl.log(tl.sum(masses * tl.exp(peaks - whole), 0))
    top = tl.max(mosts, 0)
    finite = (tl.sum(sounds, 0) == 0.0) & (top > float("-inf"))
    token = tl.min(tl.where(there & (bests == tl.max(bests, 0)), chosens, V), 0)

    if filtered & finite:
        level = tl.zeros([], tl.uint32)
        total = tl.sum(sharpeneds * tl.exp((mosts - top) * sharpness), 0)
        count = num_runs
        if by_rank:
            # At least top-k runs have their greatest at or over this, so nothing below it is kept.
            limit = kept.to(tl.float32)
            lines = tl.cdiv(num_runs, RUN)
            low = _threshold(
                maxima, num_runs, maxima, runs, num_runs, lines, top, sharpness, limit, level, level,
                False, False, BLOCK,
            )  # fmt: skip
            count = _list_runs(maxima, runs, num_runs, low, BLOCK)
            level = _threshold(
                x, V, maxima, runs, num_runs, count, top, sharpness, limit, low, level, True, False, BLOCK
            )
        if share < 1.0:
            if by_rank:
                count = _list_runs(maxima, runs, num_runs, level, BLOCK)
                nothing = tl.zeros([], tl.uint32)
                total, _, _ = _above(
                    x, V, runs, count, top, sharpness, nothing, nothing, level, True, True, BLOCK
                )  # fmt: skip
            # Of a share of 0 only the likeliest is kept, which has no mass above it.
            limit = tl.maximum(share * total, 1e-30)
            # V tokens below this one have at most half of the mass that may be dropped.
            low = _ordered(top + tl.log((1.0 - share) * total / (2.0 * V)) / sharpness)
            low = tl.maximum(low, level)
            count = _list_runs(maxima, runs, num_runs, low, BLOCK)
            level = _threshold(
                x, V, maxima, runs, num_runs, count, top, sharpness, limit, low, level, True, True, BLOCK
            )
        level = tl.maximum(level, _ordered(top + tl.log(tl.maximum(floor, 1e-37)) / sharpness))
        count = _list_runs(maxima, runs, num_runs, level, BLOCK)
        most_noisy = tl.full([BLOCK // RUN, RUN], float("-inf"), tl.float32)
        at_most = tl.zeros([BLOCK // RUN, RUN], tl.int32)
        for start in range(0, count, BLOCK // RUN):
            logit, where = _run(x, V, runs, count, start, True, BLOCK)
            noisy = tl.where(_ordered(logit) >= level, _noisy(logit, where, seed, draw, sharpness), float("-inf"))
            better = noisy > most_noisy
            at_most = tl.where(better, where, at_most)
            most_noisy = tl.where(better, noisy, most_noisy)
        highest = tl.max(tl.max(most_noisy, 1), 0)
        token = tl.min(tl.min(tl.where(most_noisy == highest, at_most, V), 1), 0)
    token = tl.where(finite & (token < V), token, 0)
    token_logit = tl.load(raw_logits + token)
    tl.store(logprobs + row, tl.where(finite, token_logit - log_mass, float("nan")))
    tl.store(ids + row, tl.where(finite, token, -1))
    if penalties is not None:
        if finite:
            its_count = counts + slot * V + token
            tl.store(its_count, tl.load(its_count) + 1)


@Operation
def sample(logits: torch.Tensor, rows: SamplingRows) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a token id int32 ``[R]`` and its log-probability float32 ``[R]`` for each row of ``logits`` ``[R, V]``."""
    return sampling_reference.sample_rows(logits, rows)


@sample.launcher
def _launch(logits: torch.Tensor, rows: SamplingRows) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows, vocab_size = logits.shape
    device = logits.device
    ids = torch.empty(num_rows, dtype=torch.int32, device=device)
    logprobs = torch.empty(num_rows, dtype=torch.float32, device=device)
    changed = any(x is not None for x in (rows.penalties, rows.bias_tokens, rows.allowed))
    block = max(min(power_of_two(vocab_size), 2048), RUN.value)
    parts = cdiv(vocab_size, block)
    num_runs = parts * block // RUN.value
    launch(
        _sample_kernel,
        (parts, num_rows),
        rows,
        logits=logits,
        work=torch.empty_like(logits) if changed else None,
        ids=ids,
        logprobs=logprobs,
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
    )
    return ids, logprobs


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
        logits = make(num_rows, vocab_size, scale=3)
        logits[num_rows // 2, vocab_size // 2] = torch.nan
        check(logits, random_rows(num_rows, vocab_size, make.device, everything=everything))


@sample.launches()
def _launches(run: Run, make: Make) -> None:
    for changes in (False, True):
        run(make(8, 151936, dtype=torch.float32), sampling_rows.like(8, 151936, 64, changes, make.integers))
