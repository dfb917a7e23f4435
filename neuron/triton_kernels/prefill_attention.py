"""Causal attention of prompts over the paged cache: sequences of any length in one launch.

``out[t, h] = sum_s softmax_s(cap(scale q[t, h] . k[s, h / G])) v[s, h / G]`` over the cached tokens ``s`` of the row's
sequence at or before it, and, with a sliding window, less than ``window`` before it; ``cap(x) = c tanh(x / c)``. The
algorithm is FlashAttention-2 (arXiv:2307.08691): one pass over the keys with a running maximum and sum.

The G = H / K query heads that share a key-value head are rows of one tile, so a tile of 128 rows is ``128 / G`` tokens
and every key is read once for all of them. The grid is a bound that needs no read of device memory: T tokens in B
sequences have at most ``T / tokens + B`` blocks, and a program finds its own by bisecting ``cu_seqlens``.

Blocks wholly before the diagonal skip the masks, which add a third to the loop's instructions.
"""

import math
from typing import Final

import torch

from neuron.triton_kernels._triton import tl, triton
from neuron.triton_kernels.attention_cases import HEADS, ROUNDED_HEADS, Heads, real_steps
from neuron.triton_kernels.batch import AttentionParameters, Batch, PagedCache
from neuron.triton_kernels.cache_codes import read
from neuron.triton_kernels.launch import Target, cdiv, launch, power_of_two, target_of
from neuron.triton_kernels.operation import Make, Operation, Run

LOG2_E: Final = 1.4426950408889634


def attention_by_definition(
    q: torch.Tensor, cache: PagedCache, batch: Batch, parameters: AttentionParameters
) -> torch.Tensor:
    """Return attention ``[T, H, D]`` in float32 and by the definition, one sequence after another."""
    num_heads = q.shape[1]
    num_kv_heads, head_dim = cache.keys.shape[2:]
    scale, window, soft_cap = parameters[:3]
    outputs = []
    starts = batch.cu_seqlens.tolist()
    for index, context in enumerate(batch.context_lens.tolist()):
        keys, values = (
            pool.reshape(-1, num_kv_heads, head_dim)[:context].repeat_interleave(num_heads // num_kv_heads, 1)
            for pool in read(cache, batch.page_table[index].long(), torch.float32)
        )
        queries = q[starts[index] : starts[index + 1]].float()
        scores = torch.einsum("thd,shd->hts", queries, keys) * scale
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        position = torch.arange(context - len(queries), context, device=q.device)[:, None]
        cached = torch.arange(context, device=q.device)[None, :]
        seen = cached <= position
        if window:
            seen &= cached > position - window
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hts,shd->thd", weights, values).to(q.dtype))
    return torch.cat(outputs)


@Operation
def prefill_attention(
    q: torch.Tensor,
    cache: PagedCache,
    batch: Batch,
    parameters: AttentionParameters,
    out: torch.Tensor,
    *,
    first_sequence: int = 0,
) -> None:
    """Write the attention of every row of ``q`` ``[T, H, D]`` from ``first_sequence`` on into ``out`` ``[T, H, D]``.

    The rows' keys and values are in the cache already.
    """
    start = int(batch.cu_seqlens[first_sequence])
    out[start:] = attention_by_definition(q, cache, batch, parameters)[start:]


@triton.jit
def capped(scores, soft_cap):
    """Return ``soft_cap * tanh(scores / soft_cap)``; tanh by exp, which the interpreter has too."""
    return soft_cap * (2.0 / (1.0 + tl.exp(-2.0 * scores / soft_cap)) - 1.0)


@triton.jit
def find_block(starts, first, last, block, BLOCK: tl.constexpr):
    """Return the segment that ``block`` belongs to and the block's number in it.

    Segment i, from ``starts[i]`` to ``starts[i + 1]``, is given the block numbers from
    ``starts[i] // BLOCK + i`` (both counted from ``first``): never too few, at most one too many.
    """
    origin = tl.load(starts + first)
    low, high = first, last
    while high - low > 1:
        middle = (low + high) // 2
        if (tl.load(starts + middle) - origin) // BLOCK + middle - first <= block:
            low = middle
        else:
            high = middle
    return low, block - (tl.load(starts + low) - origin) // BLOCK - (low - first)


@triton.jit
def _blocks(
    accumulator, total, maximum, q, keys, values, key_scales, value_scales, pages, begin, end, position, context,
    window, scale_log2, soft_cap,
    MASKED: tl.constexpr, K: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        n = start + tl.arange(0, BLOCK_N)
        cached = n < context
        page = tl.load(pages + n // PAGE, mask=cached, other=0).to(tl.int64)
        at = (page * PAGE + n % PAGE)[:, None] * (K * D) + d[None, :]
        if D == BLOCK_D:
            if MASKED:
                k = tl.load(keys + at, mask=cached[:, None], other=0.0)
            else:
                k = tl.load(keys + at)
        else:
            k = tl.load(keys + at, mask=cached[:, None] & (d < D)[None, :], other=0.0)
        if key_scales is not None:
            scales_at = page * (K * PAGE) + n % PAGE
            k = k.to(tl.float32).to(q.dtype)
        scores = tl.dot(q, tl.trans(k))
        if key_scales is not None:
            scores *= tl.load(key_scales + scales_at, mask=cached, other=0.0)[None, :]
        if HAS_CAP:
            scores = capped(scores * scale_log2 / 1.4426950408889634, soft_cap) * 1.4426950408889634
        else:
            scores = scores * scale_log2
        if MASKED:
            seen = n[None, :] <= position[:, None]
            if HAS_WINDOW:
                seen = seen & (n[None, :] > position[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, 1))
        if HAS_WINDOW:
            # A row may have no key yet: its window begins in a later block.
            shift = tl.where(higher == float("-inf"), 0.0, higher)
        else:
            shift = higher
        weights = tl.exp2(scores - shift[:, None])
        fade = tl.exp2(maximum - shift)
        total = total * fade + tl.sum(weights, 1)
        accumulator = accumulator * fade[:, None]
        if D == BLOCK_D:
            if MASKED:
                v = tl.load(values + at, mask=cached[:, None], other=0.0)
            else:
                v = tl.load(values + at)
        else:
            v = tl.load(values + at, mask=cached[:, None] & (d < D)[None, :], other=0.0)
        if value_scales is not None:
            weights *= tl.load(value_scales + scales_at, mask=cached, other=0.0)[None, :]
            v = v.to(tl.float32).to(q.dtype)
        accumulator = tl.dot(weights.to(v.dtype), v, accumulator)
        maximum = higher
    return accumulator, total, maximum


@triton.jit(do_not_specialize=["table_stride", "first", "last", "window", "scale_log2", "soft_cap"])
def _prefill_attention_kernel(
    q, key_cache, value_cache, key_scales, value_scales, out, cu_seqlens, page_table, context_lens, table_stride,
    first, last, window, scale_log2, soft_cap,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    group: tl.constexpr = H // K
    tokens: tl.constexpr = BLOCK_M // group
    kv_head = tl.program_id(0)
    # Late blocks have the most keys: they go first, so that the short ones fill the end.
    sequence, block = find_block(cu_seqlens, first, last, tl.num_programs(1) - 1 - tl.program_id(1), tokens)
    row_start = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - row_start
    if block * tokens >= length:
        return
    context = tl.load(context_lens + sequence)

    r = tl.arange(0, BLOCK_M)
    token = block * tokens + r // group
    inside = (token < length) & (r < tokens * group)
    position = context - length + tl.minimum(token, length - 1)
    d = tl.arange(0, BLOCK_D)
    row = (row_start + token).to(tl.int64)
    at = (row * H + kv_head * group + r % group)[:, None] * D + d[None, :]
    mask = inside[:, None] & (d < D)[None, :]
    query = tl.load(q + at, mask=mask, other=0.0)

    end = tl.minimum(context, context - length + (block + 1) * tokens)
    if HAS_WINDOW:
        begin = tl.maximum(context - length + block * tokens - window + 1, 0) // BLOCK_N * BLOCK_N
        plain_end = begin
    else:
        begin = 0
        # All rows of the block attend to keys up to its first query.
        plain_end = (context - length + block * tokens + 1) // BLOCK_N * BLOCK_N
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    keys = key_cache + kv_head * D
    values = value_cache + kv_head * D
    if key_scales is not None:
        key_scales += kv_head * PAGE
        value_scales += kv_head * PAGE
    pages = page_table + sequence.to(tl.int64) * table_stride
    if not HAS_WINDOW:
        accumulator, total, maximum = _blocks(
            accumulator, total, maximum, query, keys, values, key_scales, value_scales, pages, begin, plain_end,
            position, context, window, scale_log2, soft_cap, False, K, D, PAGE, BLOCK_N, BLOCK_D, HAS_WINDOW,
            HAS_CAP, STAGES,
        )  # fmt: skip
    accumulator, total, maximum = _blocks(
        accumulator, total, maximum, query, keys, values, key_scales, value_scales, pages, plain_end, end,
        position, context, window, scale_log2, soft_cap, True, K, D, PAGE, BLOCK_N, BLOCK_D, HAS_WINDOW, HAS_CAP,
        STAGES,
    )  # fmt: skip
    tl.store(out + at, (accumulator / total[:, None]).to(out.dtype.element_ty), mask=mask)


def prefill_tiles(head_dim: int, target: Target, *, is_rounded: bool = False) -> tuple[int, int, int, int]:
    """Return BLOCK_M, BLOCK_N, warps and stages: the largest that spill nowhere (see ``bench/results/kernels.json``).

    On Hopper 64 rows a warp group is what HGMMA needs. Registers leave room for one program a processor there, so that
    nothing but its own pipeline hides the memory behind its products: with 5 stages two tiles of keys and values are in
    flight, since page numbers take stages of their own; with 2 each is waited for as soon as it is requested. A cache
    that ``is_rounded`` takes registers to widen its codes.
    """
    if target.capability in (90, 100):
        if head_dim > 128 and is_rounded:
            return (128, 16, 8, 5) if target.capability == 90 else (64, 32, 4, 2)
        if head_dim > 64:
            stages = 2 if is_rounded and target.capability == 100 else 5
            return (128, 64, 8, stages) if head_dim <= 128 else (128, 32, 8, 5)
        # On sm_100 four warps spill 72 bytes, and five stages 8 by Triton 3.6.
        return (128, 64, 4, 5) if target.capability == 90 else (128, 64, 8, 2)
    if head_dim > 128:
        return (64, 32, 8, 1)
    # Codes spill up to 40 bytes with four warps, by heads' dimension, capability and version of Triton.
    return (64, 32, 8 if is_rounded else 4, 2)


@prefill_attention.launcher
def _launch(
    q: torch.Tensor,
    cache: PagedCache,
    batch: Batch,
    parameters: AttentionParameters,
    out: torch.Tensor,
    *,
    first_sequence: int = 0,
) -> None:
    num_tokens, num_heads, head_dim = q.shape
    page_size, num_kv_heads = cache.keys.shape[1:3]
    num_sequences = batch.context_lens.shape[0]
    block_m, block_n, num_warps, num_stages = prefill_tiles(
        head_dim, target_of(q.device), is_rounded=cache.key_scales is not None
    )
    tokens = block_m // (num_heads // num_kv_heads)
    launch(
        _prefill_attention_kernel,
        (num_kv_heads, cdiv(num_tokens - first_sequence, tokens) + num_sequences - first_sequence),
        batch,
        q=q, key_cache=cache.keys, value_cache=cache.values, key_scales=cache.key_scales,
        value_scales=cache.value_scales, out=out, table_stride=batch.page_table.stride(0), first=first_sequence,
        last=num_sequences, window=parameters.window, scale_log2=parameters.scale * LOG2_E,
        soft_cap=parameters.soft_cap or math.inf, H=num_heads, K=num_kv_heads, D=head_dim, PAGE=page_size,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=power_of_two(head_dim), HAS_WINDOW=parameters.window > 0,
        HAS_CAP=parameters.soft_cap > 0, STAGES=num_stages, num_warps=num_warps,
    )  # fmt: skip


@prefill_attention.cases(*HEADS, *ROUNDED_HEADS)
def _cases(check: Run, make: Make, heads: Heads) -> None:
    step = heads.step(make, [(1, 50), (1, 3), (5, 5), (70, 91), (1, 17), (33, 140)])
    for first in (2, 0):
        out = torch.full_like(step.q, torch.nan)
        check(step.q, step.cache, step.batch, step.parameters, out, first_sequence=first)


@prefill_attention.launches()
def _launches(run: Run, make: Make) -> None:
    for step in real_steps(make):
        run(step.q, step.cache, step.batch, step.parameters, step.q)
