"""Attention of one new token a sequence over the paged cache, split over the cached tokens (flash-decoding).

``out[b, h] = sum_s softmax_s(cap(scale q[b, h] . k[s, h / G])) v[s, h / G]``. A program takes one key-value head of one
sequence and a run of its tokens; the G query heads are the rows of one tile, padded to the 16 of a matrix unit, so
every cached byte is read once. Each stores an unnormalised sum, a maximum and a total, and the last to arrive merges
them (the algebra of arXiv:2307.08691), without a second kernel: see :mod:`neuron.triton_kernels.workspace`.

The fused form also does the work between projection and attention: it norms and rotates its queries (16 rows,
recomputed by every split), and the split that owns the new token rotates its key, attends to it from registers and
writes key and value to the cache. No program reads another's writes, so no barrier is needed.
"""

import math
from typing import Final

import torch

from neuron.triton_kernels._triton import cuda, tl, triton
from neuron.triton_kernels.attention_cases import HEADS, ROUNDED_HEADS, Heads, real_steps
from neuron.triton_kernels.batch import AttentionParameters, Batch, PagedCache
from neuron.triton_kernels.cache_codes import codes_of, scale_of
from neuron.triton_kernels.launch import Argument, Target, cdiv, launch, power_of_two, target_of
from neuron.triton_kernels.operation import Make, Operation, Run
from neuron.triton_kernels.prefill_attention import LOG2_E, attention_by_definition, capped
from neuron.triton_kernels.rope import rope_and_cache
from neuron.triton_kernels.rotary import Rotary
from neuron.triton_kernels.workspace import counters

MIN_SPLIT_TOKENS: Final = 128
"""Least number of tokens of a split: two tiles, so that the pipeline is worth filling."""
MAX_SPLITS: Final = 64
MERGE_ROWS = tl.constexpr(32)
"""Number of heads of splits that the merge reads at once."""


@Operation
def decode_attention(
    q: torch.Tensor,
    cache: PagedCache,
    batch: Batch,
    parameters: AttentionParameters,
    out: torch.Tensor,
    *,
    num_sequences: int,
) -> None:
    """Write the attention of the first ``num_sequences`` rows of ``q`` ``[T, H, D]`` into ``out`` ``[T, H, D]``.

    Sequence b's only query is row b, and its key and value are in the cache already.
    """
    out[:num_sequences] = attention_by_definition(q, cache, batch, parameters)[:num_sequences]


@Operation
def rope_decode_attention(
    qkv: torch.Tensor, rotary: Rotary, cache: PagedCache, batch: Batch, parameters: AttentionParameters
) -> torch.Tensor:
    """Norm, rotate, write the new keys and values, and attend: ``[B, H D]`` of ``qkv`` ``[B, (H + 2 K) D]``."""
    q = rope_and_cache.eager(qkv, rotary, cache, batch.slot_mapping, parameters)
    return attention_by_definition(q, cache, batch, parameters).reshape(len(qkv), -1)


@triton.jit
def _rotated(x, norm, offsets, mask, cos, sin, d, eps, D: tl.constexpr, AXIS: tl.constexpr):
    """Return the heads at ``x + offsets`` normed and rotated, float32; ``d`` is the element's index in its head.

    The other half of a pair is read a second time, from the cache lines just read, rather than shuffled over.
    """
    half: tl.constexpr = D // 2
    pair = tl.where(d < half, half, -half)
    value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(x + offsets + pair, mask=mask, other=0.0).to(tl.float32)
    if norm is not None:
        scale = tl.rsqrt(tl.sum(value * value, AXIS, keep_dims=True) / D + eps)
        value *= scale * tl.load(norm + offsets, mask=mask, other=0.0).to(tl.float32)
        other *= scale * tl.load(norm + offsets + pair, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(cos + d, mask=d < D, other=0.0).to(tl.float32)
    s = tl.load(sin + d % half, mask=d < D, other=0.0).to(tl.float32)
    return value * c + other * tl.where(d < half, -s, s)


@triton.jit
def _merged(parts, num_parts, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the attention of GROUP heads, padded to a power of two, from ``num_parts`` partial results.

    Several parts are read at once: one after the other each would wait for the second-level cache.
    """
    heads: tl.constexpr = triton.next_power_of_2(GROUP)
    at_once: tl.constexpr = MERGE_ROWS // heads if heads < MERGE_ROWS else 1
    d = tl.arange(0, BLOCK_D)
    i = tl.arange(0, at_once * heads)
    r = i % heads
    accumulator = tl.zeros([heads, BLOCK_D], tl.float32)
    total = tl.zeros([heads], tl.float32)
    maximum = tl.full([heads], float("-inf"), tl.float32)
    for start in tl.range(0, num_parts, at_once):
        part = start + i // heads
        there = (part < num_parts) & (r < GROUP)
        at = part * (GROUP * (D + 2))
        # .cg: past the first-level cache, which other processors' stores do not reach.
        maxima = tl.load(parts + (at + GROUP * D + r), mask=there, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(parts + (at + GROUP * (D + 1) + r), mask=there, other=0.0, cache_modifier=".cg")
        sums_at = (at + r * D)[:, None] + d[None, :]
        sums = tl.load(parts + sums_at, mask=there[:, None] & (d < D)[None, :], other=0.0, cache_modifier=".cg")
        maxima = tl.reshape(maxima, [at_once, heads])
        higher = tl.maximum(maximum, tl.max(maxima, 0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        fade, weights = tl.exp2(maximum - shift), tl.exp2(maxima - shift[None, :])
        total = total * fade + tl.sum(tl.reshape(totals, [at_once, heads]) * weights, 0)
        sums = tl.reshape(sums, [at_once, heads, BLOCK_D]) * weights[:, :, None]
        accumulator = accumulator * fade[:, None] + tl.sum(sums, 0)
        maximum = higher
    return accumulator / total[:, None]


@triton.jit(do_not_specialize=["eps", "table_stride", "window", "num_splits", "scale_log2", "soft_cap"])
def _decode_attention_kernel(
    q, qk_norm, cos, sin, slot_mapping, key_cache, value_cache, key_scales, value_scales, out, page_table,
    context_lens, partial, arrived, q_stride, eps, table_stride, window, num_splits, scale_log2, soft_cap,
    FUSED: tl.constexpr, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    MIN_TOKENS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    group: tl.constexpr = H // K
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    sequence = tl.program_id(2)
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    context = tl.load(context_lens + sequence)
    row = sequence.to(tl.int64)
    r = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    mask = (r < group)[:, None] & (d < D)[None, :]
    head = kv_head * group + r
    heads_at = head[:, None] * D + d[None, :]

    # The tokens before the window are skipped, and the new token is not in the cache yet if it is made here.
    lowest = 0
    if HAS_WINDOW:
        lowest = tl.maximum(context - window, 0) // BLOCK_N * BLOCK_N
    cached_end = context
    if FUSED:
        cached_end = context - 1
    share = tl.cdiv(tl.cdiv(context - lowest, num_splits), MIN_TOKENS) * MIN_TOKENS
    begin = lowest + split * share
    end = tl.minimum(begin + share, cached_end)
    owns_new = (context - 1 >= begin) & (context - 1 < begin + share)

    if FUSED:
        query = _rotated(q + row * q_stride, qk_norm, heads_at, mask, cos + row * D, sin + row * (D // 2),
                         d[None, :], eps, D, 1).to(q.dtype.element_ty)  # fmt: skip
    else:
        query = tl.load(q + row * (H * D) + heads_at, mask=mask, other=0.0)

    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    pages = page_table + row * table_stride
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        n = start + tl.arange(0, BLOCK_N)
        cached = n < end
        page = tl.load(pages + n // PAGE, mask=cached, other=0).to(tl.int64)
        at = (page * PAGE + n % PAGE)[:, None] * (K * D) + kv_head * D + d[None, :]
        inside = cached[:, None] & (d < D)[None, :]
        k = tl.load(key_cache + at, mask=inside, other=0.0)
        v = tl.load(value_cache + at, mask=inside, other=0.0)
        if key_scales is not None:
            scales_at = (page * K + kv_head) * PAGE + n % PAGE
            key_scale = tl.load(key_scales + scales_at, mask=cached, other=0.0)
            value_scale = tl.load(value_scales + scales_at, mask=cached, other=0.0)
            k = k.to(tl.float32).to(query.dtype)
            v = v.to(tl.float32).to(query.dtype)
        scores = tl.dot(query, tl.trans(k))
        if key_scales is not None:
            scores *= key_scale[None, :]
        if HAS_CAP:
            scores = capped(scores * scale_log2 / 1.4426950408889634, soft_cap) * 1.4426950408889634
        else:
            scores = scores * scale_log2
        seen = cached
        if HAS_WINDOW:
            seen = seen & (n >= context - window)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, 1))
        shift = higher
        if HAS_WINDOW:
            shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - shift[:, None])
        fade = tl.exp2(maximum - shift)
        total = total * fade + tl.sum(weights, 1)
        if key_scales is not None:
            weights *= value_scale[None, :]
        accumulator = tl.dot(weights.to(v.dtype), v, accumulator * fade[:, None])
        maximum = higher

    if FUSED:
        if owns_new:
            new = q + row * q_stride
            key = _rotated(new, qk_norm, (H + kv_head) * D + d, d < D, cos + row * D, sin + row * (D // 2),
                           d, eps, D, 0).to(q.dtype.element_ty)  # fmt: skip
            value = tl.load(new + (H + K + kv_head) * D + d, mask=d < D, other=0.0)
            slot = tl.load(slot_mapping + sequence)
            at = slot * (K * D) + kv_head * D + d
            if key_scales is None:
                tl.store(key_cache + at, key, mask=d < D)
                tl.store(value_cache + at, value, mask=d < D)
            else:
                code: tl.constexpr = key_cache.dtype.element_ty
                key = key.to(tl.float32)
                value = value.to(tl.float32)
                key_scale = scale_of(tl.max(tl.abs(key), 0), tl.sum(key, 0), code)
                value_scale = scale_of(tl.max(tl.abs(value), 0), tl.sum(value, 0), code)
                key_code = codes_of(key / key_scale, code)
                value_code = codes_of(value / value_scale, code)
                tl.store(key_cache + at, key_code, mask=d < D)
                tl.store(value_cache + at, value_code, mask=d < D)
                scales_at = (slot // PAGE * K + kv_head) * PAGE + slot % PAGE
                tl.store(key_scales + scales_at, key_scale)
                tl.store(value_scales + scales_at, value_scale)
                # Attended to as every later token will read it.
                key = key_code.to(tl.float32) * key_scale
                value = value_code.to(tl.float32) * value_scale
            score = tl.sum(query.to(tl.float32) * key.to(tl.float32)[None, :], 1)
            if HAS_CAP:
                score = capped(score * scale_log2 / 1.4426950408889634, soft_cap) * 1.4426950408889634
            else:
                score = score * scale_log2
            higher = tl.maximum(maximum, score)
            weight = tl.exp2(score - higher)
            fade = tl.exp2(maximum - higher)
            total = total * fade + weight
            accumulator = accumulator * fade[:, None] + weight[:, None] * value.to(tl.float32)[None, :]
            maximum = higher

    out_at = out + row * (H * D) + heads_at
    if num_splits == 1:
        tl.store(out_at, (accumulator / total[:, None]).to(out.dtype.element_ty), mask=mask)
        return
    # A split's part: G rows of D sums, and behind all of them the maxima and the totals.
    part = (row * K + kv_head) * num_splits + split
    rows: tl.constexpr = group * (D + 2)
    scalars: tl.constexpr = group * D
    part_at = partial + part * rows
    tl.store(part_at + r[:, None] * D + d[None, :], accumulator, mask=mask)
    tl.store(part_at + scalars + r, maximum, mask=r < group)
    tl.store(part_at + scalars + group + r, total, mask=r < group)
    # Every thread's stores come before the one thread's release, and its acquire before every thread's loads.
    tl.debug_barrier()
    counter = arrived + sequence * K + kv_head
    if tl.atomic_add(counter, 1, sem="acq_rel") < num_splits - 1:
        return
    tl.debug_barrier()
    tl.store(counter, 0)
    # Splits past the sequence's end are empty: only the used ones are read.
    part_at = partial + (row * K + kv_head) * num_splits * rows
    merged = _merged(part_at, tl.cdiv(context - lowest, share), group, D, BLOCK_D)
    r = tl.arange(0, merged.shape[0])
    out_at = out + row * (H * D) + (kv_head * group + r)[:, None] * D + d[None, :]
    tl.store(out_at, merged.to(out.dtype.element_ty), mask=(r < group)[:, None] & (d < D)[None, :])


def num_splits_for(num_sequences: int, num_kv_heads: int, max_context: int, target: Target) -> int:
    """Return the number of splits: two programs a multiprocessor, but no split under MIN_SPLIT_TOKENS."""
    wanted = cdiv(2 * target.num_sms, num_sequences * num_kv_heads)
    return max(min(wanted, cdiv(max_context, MIN_SPLIT_TOKENS), MAX_SPLITS), 1)


def decode_tiles(head_dim: int, target: Target) -> tuple[int, int, int, int | None]:
    """Return BLOCK_N, warps, stages and the bound on a thread's registers.

    The page numbers that a tile's addresses come from take a stage of their own at each distance: two tiles of keys and
    values are in flight with 5 stages (64 KiB a program, two to three programs a processor), and one with 2 to 4, which
    is requested only after the tile in its place has been used. Without a bound on registers each assembler spills 8
    bytes of one form or another, for more programs a processor than shared memory holds.
    """
    num_stages = 5 if target.big_shared_memory else 2
    if head_dim <= 128:
        # A dimension that is no power of two takes masks, and with 168 those spill on sm_100.
        return 64, 4, num_stages, 168 if head_dim == power_of_two(head_dim) else 255
    # With 4 warps a window and a cap together spill 8 bytes on sm_80 by Triton 3.7.1 (3.9.0 makes do).
    return (32, 8, num_stages, None) if target.capability == 80 else (32, 4, num_stages, 255)


@decode_attention.launcher
def _launch_decode(
    q: torch.Tensor,
    cache: PagedCache,
    batch: Batch,
    parameters: AttentionParameters,
    out: torch.Tensor,
    *,
    num_sequences: int,
) -> None:
    unused = {"qk_norm": None, "cos": None, "sin": None, "slot_mapping": None}
    _launch(q, cache, batch, parameters, out, num_sequences, FUSED=False, **unused)


@rope_decode_attention.launcher
def _launch_fused(
    qkv: torch.Tensor, rotary: Rotary, cache: PagedCache, batch: Batch, parameters: AttentionParameters
) -> torch.Tensor:
    num_kv_heads, head_dim = cache.keys.shape[2:]
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    out = torch.empty((len(qkv), num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    cos, sin = rotary
    _launch(qkv, cache, batch, parameters, out, len(qkv), FUSED=True, cos=cos, sin=sin)
    return out.view(len(qkv), -1)


def _launch(
    q: torch.Tensor,
    cache: PagedCache,
    batch: Batch,
    parameters: AttentionParameters,
    out: torch.Tensor,
    num_sequences: int,
    **more: Argument,
) -> None:
    page_size, num_kv_heads, head_dim = cache.keys.shape[1:]
    num_heads, window = out.shape[1], parameters.window
    target = target_of(q.device)
    group = num_heads // num_kv_heads
    max_context = batch.page_table.shape[1] * page_size
    splits = num_splits_for(num_sequences, num_kv_heads, min(max_context, window or max_context), target)
    parts = (num_sequences * num_kv_heads * splits, group * (head_dim + 2))
    block_n, num_warps, num_stages, max_registers = decode_tiles(head_dim, target)
    launch(
        _decode_attention_kernel,
        (num_kv_heads, splits, num_sequences),
        batch,
        parameters,
        q=q, key_cache=cache.keys, value_cache=cache.values, key_scales=cache.key_scales,
        value_scales=cache.value_scales, out=out,
        partial=torch.empty(parts, dtype=torch.float32, device=q.device),
        arrived=counters(q.device, num_sequences * num_kv_heads), q_stride=q.stride(0),
        table_stride=batch.page_table.stride(0), num_splits=splits, scale_log2=parameters.scale * LOG2_E,
        soft_cap=parameters.soft_cap or math.inf, H=num_heads, K=num_kv_heads, D=head_dim, PAGE=page_size,
        MIN_TOKENS=MIN_SPLIT_TOKENS, BLOCK_M=max(power_of_two(group), 16), BLOCK_N=block_n,
        BLOCK_D=power_of_two(head_dim), HAS_WINDOW=window > 0, HAS_CAP=parameters.soft_cap > 0, STAGES=num_stages,
        num_warps=num_warps, max_registers=max_registers, **more,
    )  # fmt: skip


CONTEXTS: Final = ([1], [300, 129, 128, 17, 1], [600])


@decode_attention.cases(*HEADS, *ROUNDED_HEADS)
def _decode_cases(check: Run, make: Make, heads: Heads) -> None:
    for contexts in CONTEXTS:
        step = heads.step(make, [(1, context) for context in contexts])
        out = torch.full_like(step.q, torch.nan)
        check(step.q, step.cache, step.batch, step.parameters, out, num_sequences=len(contexts))


@rope_decode_attention.cases(*HEADS)
@rope_decode_attention.cases(*ROUNDED_HEADS, dtypes=(torch.float32,))
def _fused_cases(check: Run, make: Make, heads: Heads) -> None:
    """Check that the new tokens' slots are written and not read; in 16 bits, a code may be another by rounding."""
    for contexts in CONTEXTS:
        step = heads.step(make, [(1, context) for context in contexts])
        cache, slots = step.cache, step.batch.slot_mapping
        for pool, scales in ((cache.keys, cache.key_scales), (cache.values, cache.value_scales)):
            if scales is None:
                pool.view(-1, *pool.shape[2:])[slots] = torch.nan
            else:
                scales[slots // pool.shape[1], :, slots % pool.shape[1]] = torch.nan
        check(step.qkv, step.rotary, step.cache, step.batch, step.parameters)


@decode_attention.launches()
def _launches(run: Run, make: Make) -> None:
    for step in real_steps(make):
        run(step.q, step.cache, step.batch, step.parameters, step.q, num_sequences=len(step.q))


@rope_decode_attention.launches()
def _fused_launches(run: Run, make: Make) -> None:
    for step in real_steps(make):
        run(step.qkv, step.rotary, step.cache, step.batch, step.parameters)
