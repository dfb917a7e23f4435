"""``out = x w^T + bias`` with ``w`` ``[N, K]`` quantised, dequantised in registers on its way to the multiplier.

Formats and their layout: :mod:`neuron.triton_kernels.quantized`. ``x`` is ``[M, K]``, M from 1 up; K is a multiple of
the group.

For one row a group is multiplied before it is scaled, ``sum_k w x = scale sum_k q x + minimum sum_k x``: one
multiplication by a scale for 32 elements instead of 32. For more rows quants become the activations' dtype, scaled, and
go through the matrix units; per-channel scales wait for the epilogue. For large M tiles grow, and the extra work of
dequantising (once for each BLOCK_M rows) stays under the time of the products.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from neuron.triton_kernels.launch import Target, cdiv, launch, target_of
from neuron.triton_kernels.quantized import BLOCK, Quantization, QuantizedMatrix


@triton.jit
def _quantized_gemv_kernel(
    x,
    quants,
    scales,
    minima,
    bias,
    out,
    N,
    K,
    INT4: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    # A tile is [BLOCK_N rows, BLOCKS blocks, bytes of a block]: a thread holds whole runs of 16 bytes.
    bytes_: tl.constexpr = 16 if INT4 else 32
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, bytes_)
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    sums = tl.zeros([BLOCK_N, BLOCKS], tl.float32)
    num_blocks = K // 32
    row = n.to(tl.int64)
    for start in range(0, num_blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        inside = block < num_blocks
        mask = (n < N)[:, None] & inside[None, :]
        at = (row[:, None] * num_blocks + block[None, :])[:, :, None] * bytes_ + lane[None, None, :]
        q = tl.load(quants + at, mask=mask[:, :, None], other=0.0, eviction_policy="evict_first")
        x_at = x + block[:, None] * 32 + lane[None, :]
        value = tl.load(x_at, mask=inside[:, None], other=0.0).to(tl.float32)
        if INT4:
            upper = tl.load(x_at + 16, mask=inside[:, None], other=0.0).to(tl.float32)
            low, high = (q & 15).to(tl.float32), (q >> 4).to(tl.float32)
            part = tl.sum(low * value[None, :, :] + high * upper[None, :, :], 2)
            total = tl.sum(value + upper, 1)[None, :]
        else:
            part = tl.sum(q.to(tl.float32) * value[None, :, :], 2)
            total = tl.sum(value, 1)[None, :]
        if GROUP > 0:
            scale_at = row[:, None] * (K // GROUP) + (block // (GROUP // 32))[None, :]
            scale = tl.load(scales + scale_at, mask=mask, other=0.0).to(tl.float32)
            if minima is not None:
                part = part * scale + total * tl.load(minima + scale_at, mask=mask, other=0.0).to(tl.float32)
            elif INT4:
                part = (part - 8.0 * total) * scale
            else:
                part = part * scale
        sums += part
    result = tl.sum(sums, 1)
    if GROUP == 0:
        result *= tl.load(scales + n, mask=n < N, other=0.0).to(tl.float32)
    if bias is not None:
        result += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + n, result.to(out.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["M"])
def _quantized_matmul_kernel(
    x,
    quants,
    scales,
    minima,
    bias,
    out,
    M,
    N,
    K,
    x_stride,
    INT4: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    bytes_: tl.constexpr = 16 if INT4 else 32
    columns: tl.constexpr = BLOCKS * bytes_
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.arange(0, columns)
    group_of = tl.arange(0, BLOCKS)
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    num_blocks = K // 32
    row = tl.minimum(n, N - 1).to(tl.int64)
    x_row = x + tl.minimum(m, M - 1).to(tl.int64)[:, None] * x_stride
    for start in tl.range(0, num_blocks, BLOCKS, num_stages=STAGES):
        inside = (start + c // bytes_ < num_blocks)[None, :]
        k = start * 32 + c // bytes_ * 32 + c % bytes_
        at = row[:, None] * (num_blocks * bytes_) + start * bytes_ + c[None, :]
        q = tl.load(quants + at, mask=inside, other=0.0)
        value = tl.load(x_row + k[None, :], mask=inside, other=0.0)
        if INT4:
            upper = tl.load(x_row + k[None, :] + 16, mask=inside, other=0.0)
        if GROUP > 0:
            block = start + group_of
            scale_at = row[:, None] * (K // GROUP) + (block // (GROUP // 32))[None, :]
            scale_mask = (block < num_blocks)[None, :]
            scale = tl.load(scales + scale_at, mask=scale_mask, other=0.0).to(tl.float32)[:, :, None]
            if minima is not None:
                least = tl.load(minima + scale_at, mask=scale_mask, other=0.0).to(tl.float32)[:, :, None]
            elif INT4:
                least = -8.0 * scale
            else:
                least = 0.0 * scale
            parts = tl.reshape(q, [BLOCK_N, BLOCKS, bytes_])
            if INT4:
                low = (parts & 15).to(tl.float32) * scale + least
                high = (parts >> 4).to(tl.float32) * scale + least
                low = tl.reshape(low, [BLOCK_N, columns]).to(x.dtype.element_ty)
                high = tl.reshape(high, [BLOCK_N, columns]).to(x.dtype.element_ty)
                sums = tl.dot(value, tl.trans(low), sums)
                sums = tl.dot(upper, tl.trans(high), sums)
            else:
                wide = tl.reshape(parts.to(tl.float32) * scale, [BLOCK_N, columns]).to(x.dtype.element_ty)
                sums = tl.dot(value, tl.trans(wide), sums)
        else:
            # By way of float32, exact for both formats: the interpreter has no other way from int8 to bfloat16.
            sums = tl.dot(value, tl.trans(q.to(tl.float32).to(x.dtype.element_ty)), sums)
    if GROUP == 0:
        sums *= tl.load(scales + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        sums += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    mask = (m < M)[:, None] & (n < N)[None, :]
    tl.store(out + m.to(tl.int64)[:, None] * N + n[None, :], sums.to(out.dtype.element_ty), mask=mask)


def quantized_tiles(num_rows: int, target: Target) -> tuple[int, int, int, int, int]:
    """Return BLOCK_M, BLOCK_N, BLOCKS of 32 elements, warps and stages."""
    if num_rows <= 16:
        # Float16 by 8-bit weights with 128 columns a tile spills 8 bytes on sm_100.
        return (16, 64, 2, 4, 3) if target.capability == 100 else (16, 64, 4, 4, 3)
    if num_rows <= 64:
        return (64, 64, 4, 4, 3)
    return (128, 128, 2, 8, 3) if target.capability in (90, 100) else (64, 128, 2, 8, 2)


def quantized_matmul(x: torch.Tensor, weight: QuantizedMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``x w^T + bias`` ``[M, N]`` of ``x`` ``[M, K]``, contiguous in its last dimension."""
    num_rows, depth = x.shape
    width = weight.shape[0]
    if depth % BLOCK:
        raise ValueError(f"a quantised matmul wants a multiple of {BLOCK} columns, not {depth}")
    target = target_of(x.device)
    if weight.quantization is Quantization.FP8 and target.capability < 89:
        raise ValueError(f"sm_{target.capability} cannot convert float8 e4m3; sm_89 and later can")
    dependent = target.has_dependent_launch and x.device.type != "cpu"
    int4 = weight.quantization is Quantization.INT4
    out = torch.empty((num_rows, width), dtype=x.dtype, device=x.device)
    arguments = {"x": x, "quants": weight.quants, "scales": weight.scales, "minima": weight.minima}
    arguments |= {"bias": bias, "out": out}
    constants = {"INT4": int4, "GROUP": weight.group, "PDL": dependent}
    if num_rows == 1:
        block_n = 8
        launch(
            _quantized_gemv_kernel,
            (cdiv(width, block_n),),
            {**arguments, "N": width, "K": depth},
            {**constants, "BLOCK_N": block_n, "BLOCKS": 64 if int4 else 32},
            num_warps=4,
            dependent_launch=dependent,
        )
        return out
    block_m, block_n, blocks, num_warps, num_stages = quantized_tiles(num_rows, target)
    launch(
        _quantized_matmul_kernel,
        (cdiv(num_rows, block_m), cdiv(width, block_n)),
        {**arguments, "M": num_rows, "N": width, "K": depth, "x_stride": x.stride(0)},
        {**constants, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCKS": blocks, "STAGES": num_stages},
        num_warps=num_warps,
        num_stages=num_stages,
        dependent_launch=dependent,
    )
    return out
