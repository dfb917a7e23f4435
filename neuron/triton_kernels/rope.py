"""Rotary embedding of queries and keys, with optional per-head norm, and the write into the paged cache.

``qkv`` ``[T, (H + 2 K) D]`` is the fused projection. Heads rotate by halves (arXiv:2104.09864, pairs (i, i + D/2)):
``y[i] = x[i] cos - x[i + D/2] sin`` and ``y[i + D/2] = x[i + D/2] cos + x[i] sin``. Where the model normalises heads,
``x <- x / rms(x) * weight`` comes first. Keys and values go to ``slot_mapping`` in the caches ``[P, page, K, D]``,
queries are returned ``[T, H, D]``. One program does a few heads of one token, as a tile of two halves, all in float32.
"""

import torch
import triton
import triton.language as tl

from neuron.triton_kernels.launch import cdiv, launch, power_of_two


@triton.jit(do_not_specialize=["eps"])
def _rope_kernel(
    qkv,
    qk_norm,
    cos,
    sin,
    slot_mapping,
    key_cache,
    value_cache,
    out,
    stride,
    eps,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
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
    tl.store(value_at, first.to(value_cache.dtype.element_ty), mask=inside & is_value)
    tl.store(value_at + half, second.to(value_cache.dtype.element_ty), mask=inside & is_value)

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
    tl.store(key_at, low, mask=is_key)
    tl.store(key_at + half, high, mask=is_key)


def rope_and_cache(
    qkv: torch.Tensor,
    qk_norm: torch.Tensor | None,
    eps: float,
    rotary: tuple[torch.Tensor, torch.Tensor],
    slot_mapping: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
) -> torch.Tensor:
    """Rotate queries and keys, write keys and values to their KV slots, return the queries ``[T, H, D]``.

    ``rotary`` is the result of :func:`neuron.triton_kernels.reference.rotary_table`; ``qk_norm`` is ``[H + K, D]`` or
    None; ``slot_mapping`` ``[T]`` are int64.
    """
    num_kv_heads, head_dim = key_cache.shape[2:]
    num_tokens = qkv.shape[0]
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    out = torch.empty((num_tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    block_half = power_of_two(head_dim // 2)
    block_heads = max(512 // block_half, 1)
    cos, sin = rotary
    launch(
        _rope_kernel,
        (num_tokens, cdiv(num_heads + 2 * num_kv_heads, block_heads)),
        {"qkv": qkv, "qk_norm": qk_norm, "cos": cos, "sin": sin, "slot_mapping": slot_mapping}
        | {"key_cache": key_cache, "value_cache": value_cache, "out": out, "stride": qkv.stride(0), "eps": eps},
        {"H": num_heads, "K": num_kv_heads, "D": head_dim, "BLOCK_H": block_heads, "BLOCK_HALF": block_half},
        num_warps=2,
    )
    return out
