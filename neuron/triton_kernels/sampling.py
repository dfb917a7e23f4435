"""From logits to a token on the device, one program a row, with nothing for the host to wait for.

In this order, as :mod:`neuron.engine.sampler` has it: penalties (repetition of prompt and output, arXiv:1909.05858;
presence and frequency of output only), bias, grammar mask; then temperature, top-k, top-p of what that leaves, min-p
relative to the likeliest; then one token, drawn by the Gumbel-max trick: ``argmax(logit / T - log(-log u))``, with
``u`` of Philox 4x32-10 (Salmon et al., SC 2011) at the counter (token id, number of the draw) under the row's seed,
so that a
row's draw depends on nothing but its own logits, seed and position. Temperature 0 is the argmax.

Top-k and top-p keep what lies at or above a threshold, found by bisecting on the bits of the logits: as integers they
sort as the numbers do, so that 32 bits are settled exactly in 16 passes of three probes. Tokens that tie with the last
one kept are kept too. A row without these two filters needs two passes over its logits.

Also returned: the log-probability of the chosen token in the model's own distribution, before any of the above; and a
row with a NaN or an infinity among its logits, or with no token allowed, gets NON_FINITE. ``logits`` ``[R, V]`` float32
are only read.
"""

from typing import Final

import torch
import triton
import triton.language as tl

from neuron.triton_kernels.launch import launch, power_of_two
from neuron.triton_kernels.sampling_rows import SamplingRows

NON_FINITE: Final = -1


@triton.jit
def _ordered(x):
    """Return uint32 that sort as the float32 ``x`` do."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _above(x, V, top, sharpness, first, step, level, BLOCK: tl.constexpr, MASS: tl.constexpr):
    """Return, for three probes in arithmetic progression, how many logits (or how much mass) lie above each.

    Only logits whose order is at least ``level`` count: what top-k has left.
    """
    column = tl.arange(0, BLOCK)
    low = tl.zeros([BLOCK], tl.float32)
    middle = tl.zeros([BLOCK], tl.float32)
    high = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        v = start + column
        value = tl.load(x + v, mask=v < V, other=float("-inf"))
        order = _ordered(value)
        one = tl.where((v < V) & (order >= level), 1.0, 0.0)
        if MASS:
            one *= tl.exp((value - top) * sharpness)
        low += tl.where(order > first, one, 0.0)
        middle += tl.where(order > first + step, one, 0.0)
        high += tl.where(order > first + 2 * step, one, 0.0)
    return tl.sum(low, 0), tl.sum(middle, 0), tl.sum(high, 0)


@triton.jit
def _threshold(x, V, top, sharpness, limit, level, BLOCK: tl.constexpr, MASS: tl.constexpr):
    """Return the least order of which less than ``limit`` lies above: kept is what is at or over it.

    Two bits a pass, from the top: the result's next two are how many of the three probes still have ``limit`` above.
    """
    found = tl.zeros([], tl.uint32)
    step = tl.full([], 1 << 30, tl.uint32)
    for _ in range(16):
        # All orders that begin with these bits are at most the next probe less one.
        a, b, c = _above(x, V, top, sharpness, found + step - 1, step, level, BLOCK, MASS)
        digit = (a >= limit).to(tl.uint32) + (b >= limit).to(tl.uint32) + (c >= limit).to(tl.uint32)
        found += digit * step
        step = step >> 2
    return found


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
    seats,
    penalties,
    counts,
    in_prompt,
    bias_tokens,
    bias_values,
    allowed,
    ids,
    logprobs,
    V,
    num_bias,
    BLOCK: tl.constexpr,
    BLOCK_BIAS: tl.constexpr,
):
    row = tl.program_id(0)
    raw_logits = logits + row.to(tl.int64) * V
    # Where the logits are changed, the changed ones are a copy.
    x = raw_logits
    if work is not None:
        x = work + row.to(tl.int64) * V
    column = tl.arange(0, BLOCK)
    heat = tl.load(temperature + row)
    if penalties is not None:
        seat = tl.load(seats + row).to(tl.int64)
        repetition = tl.load(penalties + row * 3)
        presence = tl.load(penalties + row * 3 + 1)
        frequency = tl.load(penalties + row * 3 + 2)

    # The model's own distribution, and the logits changed as asked.
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    sound = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        v = start + column
        inside = v < V
        value = tl.load(raw_logits + v, mask=inside, other=0.0)
        sound += value - value  # NaN for what is not finite
        raw = tl.where(inside, value, float("-inf"))
        higher = tl.maximum(peak, raw)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        mass = mass * tl.exp(peak - shift) + tl.exp(raw - shift)
        peak = higher
        if penalties is not None:
            count = tl.load(counts + seat * V + v, mask=inside, other=0)
            seen = (count > 0) | (tl.load(in_prompt + seat * V + v, mask=inside, other=0) != 0)
            value = tl.where(seen, tl.where(value > 0, value / repetition, value * repetition), value)
            value -= frequency * count.to(tl.float32) + tl.where(count > 0, presence, 0.0)
        if allowed is not None:
            words = tl.load(allowed + row * tl.cdiv(V, 32) + v // 32, mask=inside, other=0)
            value = tl.where((words >> (v % 32)) & 1 != 0, value, float("-inf"))
        if work is not None:
            tl.store(x + v, value, mask=inside)
    whole = tl.max(peak, 0)
    log_mass = whole + tl.log(tl.sum(tl.where(peak == float("-inf"), 0.0, mass * tl.exp(peak - whole)), 0))
    finite = tl.sum(sound, 0) == 0.0
    if bias_tokens is not None:
        tl.debug_barrier()
        for start in range(0, num_bias, BLOCK_BIAS):
            i = start + tl.arange(0, BLOCK_BIAS)
            token = tl.load(bias_tokens + row * num_bias + i, mask=i < num_bias, other=-1)
            used = (token >= 0) & (token < V)
            value = tl.load(x + token, mask=used, other=0.0)
            value += tl.load(bias_values + row * num_bias + i, mask=used, other=0.0)
            tl.store(x + token, value, mask=used)
    # What one thread has stored another reads below.
    tl.debug_barrier()

    # The logits are not divided by the temperature: 1 / T multiplies them where it matters, order stays the same.
    tops = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, V, BLOCK):
        v = start + column
        tops = tl.maximum(tops, tl.load(x + v, mask=v < V, other=float("-inf")))
    top = tl.max(tops, 0)
    finite = finite & (top > float("-inf"))
    greedy = heat == 0.0
    sharpness = 1.0 / tl.where(greedy, 1.0, heat)
    level = tl.zeros([], tl.uint32)
    kept = tl.load(top_k + row)
    share = tl.load(top_p + row)
    if finite & (heat > 0.0):
        if (kept > 0) & (kept < V):
            level = _threshold(x, V, top, sharpness, kept.to(tl.float32), level, BLOCK, False)
        if share < 1.0:
            total = tl.zeros([BLOCK], tl.float32)
            for start in range(0, V, BLOCK):
                v = start + column
                value = tl.load(x + v, mask=v < V, other=float("-inf"))
                total += tl.where(_ordered(value) >= level, tl.exp((value - top) * sharpness), 0.0)
            # Nothing at all is kept of a share of 0 but the likeliest, which no mass lies above.
            limit = tl.maximum(share * tl.sum(total, 0), 1e-30)
            level = _threshold(x, V, top, sharpness, limit, level, BLOCK, True)
    least = top + tl.log(tl.maximum(tl.load(min_p + row), 1e-37)) / sharpness

    seed = tl.load(seeds + row)
    draw = tl.load(counters + row)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    chosen = tl.zeros([BLOCK], tl.int32)
    for start in range(0, V, BLOCK):
        v = start + column
        value = tl.load(x + v, mask=v < V, other=float("-inf"))
        score = value
        if heat > 0.0:
            bits, _, _, _ = tl.philox(seed, v, draw + tl.zeros_like(v), tl.zeros_like(v), tl.zeros_like(v))
            # 24 bits, and half a step up: never 0, never 1.
            u = ((bits >> 8).to(tl.int32).to(tl.float32) + 0.5) * 5.9604644775390625e-08
            noisy = value * sharpness - tl.log(-tl.log(u))
            score = tl.where((_ordered(value) >= level) & (value >= least), noisy, float("-inf"))
        better = (score > best) & (v < V)
        chosen = tl.where(better, v, chosen)
        best = tl.where(better, score, best)
    highest = tl.max(best, 0)
    token = tl.min(tl.where(best == highest, chosen, V), 0)
    token = tl.where(token < V, token, 0)
    token_logit = tl.load(raw_logits + token)
    tl.store(logprobs + row, tl.where(finite, token_logit - log_mass, float("nan")))
    tl.store(ids + row, tl.where(finite, token, -1))
    if penalties is not None:
        if finite:
            at = counts + seat * V + token
            tl.store(at, tl.load(at) + 1)


def sample_rows(logits: torch.Tensor, rows: SamplingRows) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a token id int32 ``[R]`` and its log-probability float32 ``[R]`` for each row of ``logits`` ``[R, V]``."""
    num_rows, vocab_size = logits.shape
    ids = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    logprobs = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    changed = any(x is not None for x in (rows.penalties, rows.bias_tokens, rows.allowed))
    num_bias = rows.bias_tokens.shape[1] if rows.bias_tokens is not None else 0
    block = min(power_of_two(vocab_size), 4096)
    launch(
        _sample_kernel,
        (num_rows,),
        {"logits": logits, "work": torch.empty_like(logits) if changed else None}
        | {"temperature": rows.temperature, "top_k": rows.top_k, "top_p": rows.top_p, "min_p": rows.min_p}
        | {"seeds": rows.seeds, "counters": rows.counters, "seats": rows.seats, "penalties": rows.penalties}
        | {"counts": rows.counts, "in_prompt": rows.in_prompt, "bias_tokens": rows.bias_tokens}
        | {"bias_values": rows.bias_values, "allowed": rows.allowed, "ids": ids, "logprobs": logprobs}
        | {"V": vocab_size, "num_bias": num_bias},
        {"BLOCK": block, "BLOCK_BIAS": 256},
        # By Triton 3.6 eight spill on sm_80 where nothing is changed, and sixteen where something is.
        num_warps=8 if changed else 16,
    )
    return ids, logprobs
