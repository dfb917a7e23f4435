"""Rotary embedding of queries and keys, with optional per-head norm, and the write into the paged cache.

``qkv`` ``[T, (H + 2 K) D]`` is the fused projection. Heads rotate by halves (arXiv:2104.09864, pairs (i, i + D/2)):
``y[i] = x[i] cos - x[i + D/2] sin`` and ``y[i + D/2] = x[i + D/2] cos + x[i] sin``. Where the model normalises heads,
``x <- x / rms(x) * weight`` comes first. Keys and values go to ``slot_mapping`` in the caches ``[P, page, K, D]``,
queries are returned ``[T, H, D]``. One program does a few heads of one token, as a tile of two halves, all in float32.
"""

import torch
from torch.nn import functional

from neuron.triton_kernels._triton import tl, triton
from neuron.triton_kernels.attention_cases import ROUNDED_HEADS, Heads, real_steps
from neuron.triton_kernels.batch import AttentionParameters, PagedCache
from neuron.triton_kernels.cache_codes import codes_of, scale_of, write
from neuron.triton_kernels.launch import cdiv, launch, power_of_two
from neuron.triton_kernels.operation import Make, Operation, Run
from neuron.triton_kernels.random_batch import PAGE
from neuron.triton_kernels.rotary import Rotary, rotary_table, table_of


@Operation
def rope_and_cache(
    qkv: torch.Tensor,
    rotary: Rotary,
    cache: PagedCache,
    slot_mapping: torch.Tensor,
    parameters: AttentionParameters,
) -> torch.Tensor:
    """Rotate queries and keys, write keys and values to their KV slots, return the queries ``[T, H, D]``.

    ``qkv`` is ``[T, (H + 2 K) D]``, ``slot_mapping`` ``[T]`` int64.
    """
    num_kv_heads, head_dim = cache.keys.shape[2:]
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    rotated_heads = heads.shape[1] - num_kv_heads
    x = heads[:, :rotated_heads]
    if parameters.qk_norm is not None:
        x = functional.rms_norm(x, (head_dim,), None, parameters.eps).mul_(parameters.qk_norm)
    cos, sin = rotary
    half = head_dim // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin, value=-1)
    out[..., half:].addcmul_(x[..., :half], sin)
    write(cache, slot_mapping, out[:, rotated_heads - num_kv_heads :], heads[:, rotated_heads:])
    return out[:, : rotated_heads - num_kv_heads]


@triton.jit(do_not_specialize=["eps"])
def _rope_kernel(
    qkv, qk_norm, cos, sin, slot_mapping, key_cache, value_cache, key_scales, value_scales, out, stride, eps,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    half: tl.constexpr = D // 2
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    i = tl.arange(0, BLOCK_HALF)
    inside = (head < H + 2 * K)[:, None] & (i < half)[None, :]
    offsets = head[:, None] * D + i[None, :]
    first = tl.load(qkv + token * stride + offsets, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(qkv + token * stride + offsets + half, mask=inside, other=0.0).to(tl.float32)
    slot = tl.load(slot_mapping + token)
    is_value = (head >= H + K)[:, None]
    # Values pass through as they are; their columns are those of the last K heads.
    value_at = value_cache + slot * (K * D) + offsets - (H + K) * D
    code: tl.constexpr = key_cache.dtype.element_ty
    scales_at = (slot // PAGE * K + head) * PAGE + slot % PAGE
    if value_scales is None:
        tl.store(value_at, first.to(code), mask=inside & is_value)
        tl.store(value_at + half, second.to(code), mask=inside & is_value)
    else:
        largest = tl.maximum(tl.max(tl.abs(first), 1), tl.max(tl.abs(second), 1))
        own = scale_of(largest, tl.sum(first, 1) + tl.sum(second, 1), code)
        tl.store(value_at, codes_of(first / own[:, None], code), mask=inside & is_value)
        tl.store(value_at + half, codes_of(second / own[:, None], code), mask=inside & is_value)
        tl.store(value_scales + scales_at - (H + K) * PAGE, own, mask=(head >= H + K) & (head < H + 2 * K))

    rotated = inside & (head < H + K)[:, None]
    if qk_norm is not None:
        mean = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / D
        scale = tl.rsqrt(mean + eps)[:, None]
        first *= scale * tl.load(qk_norm + offsets, mask=rotated, other=0.0).to(tl.float32)
        second *= scale * tl.load(qk_norm + offsets + half, mask=rotated, other=0.0).to(tl.float32)
    c = tl.load(cos + token * D + i, mask=i < half, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + token * half + i, mask=i < half, other=0.0).to(tl.float32)[None, :]
    low = (first * c - second * s).to(out.dtype.element_ty)
    high = (second * c + first * s).to(out.dtype.element_ty)
    is_query = rotated & (head < H)[:, None]
    query_at = out + token * (H * D) + offsets
    tl.store(query_at, low, mask=is_query)
    tl.store(query_at + half, high, mask=is_query)
    is_key = rotated & (head >= H)[:, None]
    key_at = key_cache + slot * (K * D) + offsets - H * D
    if key_scales is None:
        tl.store(key_at, low, mask=is_key)
        tl.store(key_at + half, high, mask=is_key)
    else:
        wide_low, wide_high = low.to(tl.float32), high.to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(wide_low), 1), tl.max(tl.abs(wide_high), 1))
        own = scale_of(largest, tl.sum(wide_low, 1) + tl.sum(wide_high, 1), code)
        tl.store(key_at, codes_of(wide_low / own[:, None], code), mask=is_key)
        tl.store(key_at + half, codes_of(wide_high / own[:, None], code), mask=is_key)
        tl.store(key_scales + scales_at - H * PAGE, own, mask=(head >= H) & (head < H + K))


@rope_and_cache.launcher
def _launch(
    qkv: torch.Tensor,
    rotary: Rotary,
    cache: PagedCache,
    slot_mapping: torch.Tensor,
    parameters: AttentionParameters,
) -> torch.Tensor:
    num_kv_heads, head_dim = cache.keys.shape[2:]
    num_tokens = qkv.shape[0]
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    out = torch.empty((num_tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    block_half = power_of_two(head_dim // 2)
    block_heads = max(512 // block_half, 1)
    launch(
        _rope_kernel,
        (num_tokens, cdiv(num_heads + 2 * num_kv_heads, block_heads)),
        parameters,
        qkv=qkv, cos=rotary[0], sin=rotary[1], slot_mapping=slot_mapping, key_cache=cache.keys,
        value_cache=cache.values, key_scales=cache.key_scales, value_scales=cache.value_scales, out=out,
        stride=qkv.stride(0), H=num_heads, K=num_kv_heads, D=head_dim, PAGE=cache.keys.shape[1],
        BLOCK_H=block_heads, BLOCK_HALF=block_half, num_warps=2,
    )  # fmt: skip
    return out


@rope_and_cache.cases()
def _cases(check: Run, make: Make) -> None:
    for num_heads, num_kv_heads, head_dim, normed in ((9, 3, 64, False), (6, 2, 12, True), (4, 4, 80, True)):
        positions, table = torch.tensor([0, 7, 1000], device=make.device), table_of(head_dim // 2, make.device)
        rotary = rotary_table.eager(positions, table, make.dtype)
        cache = PagedCache(*(torch.zeros_like(make(3, PAGE, num_kv_heads, head_dim)) for _ in range(2)))
        slot_mapping = torch.tensor([33, 16, 47], device=make.device)
        qk_norm = make(num_heads + num_kv_heads, head_dim) if normed else None
        qkv = make(3, (num_heads + 2 * num_kv_heads) * head_dim)
        check(qkv, rotary, cache, slot_mapping, AttentionParameters(0.0, qk_norm=qk_norm, eps=1e-6))


@rope_and_cache.cases(*ROUNDED_HEADS, dtypes=(torch.float32,))
def _rounded_cases(check: Run, make: Make, heads: Heads) -> None:
    step = heads.step(make, [(3, 40), (1, 17)])
    check(step.qkv, step.rotary, step.cache, step.batch.slot_mapping, step.parameters)


@rope_and_cache.launches()
def _launches(run: Run, make: Make) -> None:
    for step in real_steps(make):
        run(step.qkv, step.rotary, step.cache, step.batch.slot_mapping, step.parameters)
