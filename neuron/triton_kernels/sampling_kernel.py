"""Kernel of :mod:`neuron.triton_kernels.sampling`: one launch from logits to tokens.

A row is split over programs of BLOCK logits, or one would pass over a whole vocabulary at the rate of one processor: a
step of a small model is shorter than that. Each applies its changes to the logits, and stores their likeliest, their
mass, and the greatest logit of each run of RUN. The last to arrive (see :mod:`neuron.triton_kernels.workspace`) merges
these results and draws alone. Without filters it reads the one part again in which the draw falls; with filters only
the runs whose greatest logit may pass, a few of thousands for usual logits.

Top-k and top-p keep logits at or above a threshold, found by bisecting on their bits, which sort as integers as the
numbers do: exact, with three probes a pass.
"""

from neuron.triton_kernels._triton import tl, triton

RUN = tl.constexpr(32)
"""Number of logits whose greatest is stored: a cache line."""
NUM_FOUND = tl.constexpr(4)
"""Number of results that each program stores."""


@triton.jit
def _ordered(x):
    """Return uint32 that sort as the float32 ``x`` do."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _mix(bits):
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    return bits ^ (bits >> 31)


@triton.jit
def _uniform(seed, counter):
    """Return the number in [0, 1] of the int64 ``seed`` and the int32 ``counter``: 43 bits, rounded to float32."""
    gamma: tl.constexpr = 0x9E3779B97F4A7C15
    bits = _mix(_mix(seed.to(tl.uint64) + gamma) + (counter.to(tl.uint64) + 1) * gamma)
    return (bits >> 21).to(tl.int64).to(tl.float32) * 1.1368683772161603e-13


@triton.jit
def _weights(value, top, sharpness, level):
    """Return ``exp((value - top) / T)``, or 0 for logits of an order below ``level``."""
    return tl.where(_ordered(value) >= level, tl.exp((value - top) * sharpness), 0.0)


@triton.jit
def _pick(masses, target, SIZE: tl.constexpr):
    """Return the first index of ``masses`` whose running sum exceeds ``target``, and the sum before it.

    Where none does, as of rounding, it is the last index with a mass.
    """
    i = tl.arange(0, SIZE)
    begins = tl.cumsum(masses, 0) - masses
    index = tl.max(tl.where((masses > 0.0) & (begins <= target), i, 0), 0)
    return index, tl.sum(tl.where(i < index, masses, 0.0), 0)


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
def _mass(x, size, runs, count, top, sharpness, level, BLOCK: tl.constexpr):
    """Return the sum of the weights in the listed runs."""
    masses = tl.zeros([BLOCK // RUN], tl.float32)
    for start in range(0, count, BLOCK // RUN):
        value, _ = _run(x, size, runs, count, start, True, BLOCK)
        masses += tl.sum(_weights(value, top, sharpness, level), 1)
    return tl.sum(masses, 0)


@triton.jit
def _invert(x, size, runs, count, top, sharpness, level, target, BLOCK: tl.constexpr):
    """Return the first token in the listed runs whose running sum of weights exceeds ``target``, or the last kept."""
    first = tl.zeros([], tl.int32)
    before = tl.zeros([], tl.float32)
    running = tl.zeros([], tl.float32)
    for start in range(0, count, BLOCK // RUN):
        value, _ = _run(x, size, runs, count, start, True, BLOCK)
        mass = tl.sum(tl.sum(_weights(value, top, sharpness, level), 1), 0)
        if (mass > 0.0) & (running <= target):
            first = start
            before = running
        running += mass
    value, _ = _run(x, size, runs, count, first, True, BLOCK)
    at, passed = _pick(tl.sum(_weights(value, top, sharpness, level), 1), target - before, BLOCK // RUN)
    v = tl.load(runs + first + at) * RUN + tl.arange(0, RUN)
    value = tl.load(x + v, mask=v < size, other=float("-inf"), cache_modifier=".cg")
    at, _ = _pick(_weights(value, top, sharpness, level), target - before - passed, RUN)
    return tl.max(tl.where(tl.arange(0, RUN) == at, v, 0), 0)


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
def sample_kernel(
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
    """Run a part of a row; the arguments are fields of ``SamplingRows``, results, and memory for parts and runs."""
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
    if penalties is not None:
        slot = tl.load(slots + row).to(tl.int64)
        repetition = tl.load(penalties + row * 3)
        presence = tl.load(penalties + row * 3 + 1)
        frequency = tl.load(penalties + row * 3 + 2)

    v = part * BLOCK + tl.arange(0, BLOCK)
    inside = v < V
    value = tl.load(raw_logits + v, mask=inside, other=0.0)
    sound = tl.sum(value - value, 0)  # NaN where not finite
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
    chosen = tl.min(tl.where(inside & (value == most), v, V), 0)

    run = part * (BLOCK // RUN) + tl.arange(0, BLOCK // RUN)
    tl.store(maxima + run, tl.max(tl.reshape(value, [BLOCK // RUN, RUN]), 1))
    at = found + part
    tl.store(at, sound)
    tl.store(at + num_parts, most)
    tl.store(at + 2 * num_parts, sharpened)
    tl.store(at + 3 * num_parts, chosen.to(tl.float32))  # whole to 2^24
    tl.debug_barrier()
    if tl.atomic_add(arrived + row, 1, sem="acq_rel") < num_parts - 1:
        return
    tl.debug_barrier()
    tl.store(arrived + row, 0)

    i = tl.arange(0, BLOCK_PARTS)
    there = i < num_parts
    at = found + i
    sounds = tl.load(at, mask=there, other=0.0, cache_modifier=".cg")
    mosts = tl.load(at + num_parts, mask=there, other=float("-inf"), cache_modifier=".cg")
    sharpeneds = tl.load(at + 2 * num_parts, mask=there, other=0.0, cache_modifier=".cg")
    chosens = tl.load(at + 3 * num_parts, mask=there, other=0.0, cache_modifier=".cg").to(tl.int32)
    top = tl.max(mosts, 0)
    finite = (tl.sum(sounds, 0) == 0.0) & (top > float("-inf"))
    token = tl.min(tl.where(there & (mosts == top), chosens, V), 0)

    masses = sharpeneds * tl.exp((mosts - top) * sharpness)
    total = tl.sum(masses, 0)
    level = tl.zeros([], tl.uint32)
    target = _uniform(tl.load(seeds + row), tl.load(counters + row))
    if filtered & finite:
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
                total = _mass(x, V, runs, count, top, sharpness, level, BLOCK)
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
        target *= _mass(x, V, runs, count, top, sharpness, level, BLOCK)
        token = _invert(x, V, runs, count, top, sharpness, level, target, BLOCK)
    elif (heat > 0.0) & finite:
        # All runs of the part that the target falls into.
        target *= total
        part, before = _pick(masses, target, BLOCK_PARTS)
        part_runs = part * (BLOCK // RUN) + tl.arange(0, BLOCK // RUN)
        tl.store(runs + tl.arange(0, BLOCK // RUN), part_runs)
        tl.debug_barrier()
        token = _invert(x, V, runs, BLOCK // RUN, top, sharpness, level, target - before, BLOCK)
    token = tl.where(finite & (token < V), token, 0)
    tl.store(ids + row, tl.where(finite, token, -1))
    if penalties is not None:
        if finite:
            its_count = counts + slot * V + token
            tl.store(its_count, tl.load(its_count) + 1)
