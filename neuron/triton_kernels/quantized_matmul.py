"""``out = x w^T + bias`` with ``w`` ``[N, K]`` quantised, dequantised in registers on its way to the multiplier.

Formats and their layout: :mod:`neuron.formats`. ``x`` is ``[M, K]``, M from 1 up; K is a multiple of
the group. A ``residual`` is added to in place instead of a result stored. A mixture of experts is the same with rows
gathered by their routing and the weights of their expert (see :mod:`neuron.triton_kernels.moe_matmul`).

For one row a group is multiplied before it is scaled, ``sum_k w x = scale sum_k q x + minimum sum_k x``: one
multiplication by a scale for 32 elements instead of 32. For more rows quants become the activations' dtype, scaled, and
go through the matrix units; per-channel scales wait for the epilogue. For large M tiles grow, and the extra work of
dequantising (once for each BLOCK_M rows) stays under the time of the products.
"""

from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
import torch
from torch.nn import functional

from neuron.formats import BLOCK
from neuron.formats.format import StoredFormat
from neuron.formats.matrix import Quantization, QuantizedMatrix
from neuron.formats.registry import FORMATS, ROUNDED_FORMATS, STORED_FORMATS
from neuron.formats.rounded import quantize_int4
from neuron.triton_kernels._triton import cuda, tl, triton
from neuron.triton_kernels.launch import Target, Tiles, cdiv, launch, target_of
from neuron.triton_kernels.moe_routing import Routing
from neuron.triton_kernels.operation import HALF_TYPES, Make, Operation, Run
from neuron.triton_kernels.prefill_attention import find_block


@Operation
def quantized_matmul(
    x: torch.Tensor,
    weight: QuantizedMatrix,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``x w^T + bias`` ``[M, N]`` of ``x`` ``[M, K]``, contiguous in its last dimension.

    ``residual`` ``[M, N]``, contiguous, is added to in place, and returned.
    """
    out = functional.linear(x.float(), weight.dequantize(), None if bias is None else bias.float())
    return out.to(x.dtype) if residual is None else residual.add_(out)


@triton.jit
def _group_scales(scales, supers, row, block, inside, K, GROUP: tl.constexpr, UNIT: tl.constexpr):
    """Return the float32 scale of each block of UNIT elements: ``[rows, blocks]``."""
    at = row[:, None] * (K // GROUP) + (block // (GROUP // UNIT))[None, :]
    found = tl.load(scales + at, mask=inside, other=0.0).to(tl.float32)
    if supers is not None:
        super_at = row[:, None] * (K // 256) + (block // (256 // UNIT))[None, :]
        found *= tl.load(supers + super_at, mask=inside, other=0.0).to(tl.float32)
    return found


@triton.jit
def _quantized_gemv_kernel(
    x, quants, scales, minima, super_scales, super_minima, bias, residual, out, N, K,
    INT4: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    # A tile is [BLOCK_N rows, BLOCKS blocks, bytes of a block]: a thread holds whole runs of 16 bytes.
    bytes_: tl.constexpr = UNIT // 2 if INT4 else UNIT
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, bytes_)
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    sums = tl.zeros([BLOCK_N, BLOCKS], tl.float32)
    num_blocks = K // UNIT
    row = n.to(tl.int64)
    for start in range(0, num_blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        inside = block < num_blocks
        mask = (n < N)[:, None] & inside[None, :]
        at = (row[:, None] * num_blocks + block[None, :])[:, :, None] * bytes_ + lane[None, None, :]
        q = tl.load(quants + at, mask=mask[:, :, None], other=0.0, eviction_policy="evict_first")
        x_at = x + block[:, None] * UNIT + lane[None, :]
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
            scale = _group_scales(scales, super_scales, row, block, mask, K, GROUP, UNIT)
            if minima is not None:
                part = part * scale + total * _group_scales(minima, super_minima, row, block, mask, K, GROUP, UNIT)
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
    if residual is not None:
        result += tl.load(residual + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + n, result.to(out.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["M"])
def _quantized_matmul_kernel(
    x, quants, scales, minima, super_scales, super_minima, bias, residual, out, order, starts, weights, M, N, K,
    x_stride, out_stride,
    INT4: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, EXPERTS: tl.constexpr, SHARED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    bytes_: tl.constexpr = UNIT // 2 if INT4 else UNIT
    columns: tl.constexpr = BLOCKS * bytes_
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1).to(tl.int64)
    if EXPERTS > 0:
        none, all_ = tl.full([], 0, tl.int32), tl.full([], EXPERTS, tl.int32)
        expert, own = find_block(starts, none, all_, tl.program_id(0), BLOCK_M)
        first = tl.load(starts + expert)
        length = tl.load(starts + expert + 1) - first
        if own * BLOCK_M >= length:
            return
        m = own * BLOCK_M + tl.arange(0, BLOCK_M)
        out_row = tl.load(order + first + tl.minimum(m, length - 1)).to(tl.int64)
        x_row = x + (out_row // SHARED)[:, None] * x_stride
        row += expert.to(tl.int64) * N
        inside_rows = m < length
    else:
        m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        out_row = tl.minimum(m, M - 1).to(tl.int64)
        x_row = x + out_row[:, None] * x_stride
        inside_rows = m < M
    c = tl.arange(0, columns)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    num_blocks = K // UNIT
    for start in tl.range(0, num_blocks, BLOCKS, num_stages=STAGES):
        inside = (start + c // bytes_ < num_blocks)[None, :]
        k = start * UNIT + c // bytes_ * UNIT + c % bytes_
        at = row[:, None] * (num_blocks * bytes_) + start * bytes_ + c[None, :]
        q = tl.load(quants + at, mask=inside, other=0.0)
        value = tl.load(x_row + k[None, :], mask=inside, other=0.0)
        if INT4:
            upper = tl.load(x_row + k[None, :] + 16, mask=inside, other=0.0)
        if GROUP > 0:
            block = start + tl.arange(0, BLOCKS)
            there = (block < num_blocks)[None, :]
            scale = _group_scales(scales, super_scales, row, block, there, K, GROUP, UNIT)[:, :, None]
            if minima is not None:
                least = _group_scales(minima, super_minima, row, block, there, K, GROUP, UNIT)[:, :, None]
            elif INT4:
                least = -8.0 * scale
            parts = tl.reshape(q, [BLOCK_N, BLOCKS, bytes_])
            if INT4:
                low = (parts & 15).to(tl.float32) * scale + least
                high = (parts >> 4).to(tl.float32) * scale + least
                low = tl.reshape(low, [BLOCK_N, columns]).to(x.dtype.element_ty)
                high = tl.reshape(high, [BLOCK_N, columns]).to(x.dtype.element_ty)
                sums = tl.dot(value, tl.trans(low), sums)
                sums = tl.dot(upper, tl.trans(high), sums)
            else:
                wide = parts.to(tl.float32) * scale
                if minima is not None:
                    wide += least
                wide = tl.reshape(wide, [BLOCK_N, columns]).to(x.dtype.element_ty)
                sums = tl.dot(value, tl.trans(wide), sums)
        else:
            # By way of float32, exact for both formats: the interpreter has no other way from int8 to bfloat16.
            sums = tl.dot(value, tl.trans(q.to(tl.float32).to(x.dtype.element_ty)), sums)
    if GROUP == 0:
        sums *= tl.load(scales + row).to(tl.float32)[None, :]
    if bias is not None:
        sums += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if weights is not None:
        sums *= tl.load(weights + out_row)[:, None]
    mask = inside_rows[:, None] & (n < N)[None, :]
    out_at = out_row[:, None] * out_stride + n[None, :]
    if residual is not None:
        sums += tl.load(residual + out_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + out_at, sums.to(out.dtype.element_ty), mask=mask)


def quantized_tiles(num_rows: int, bulky: bool, target: Target) -> Tiles:
    """Return the tiles of so many rows.

    ``bulky`` weights take many registers while they are unpacked: 4-bit quants, and scales with scales of their own. A
    size below the fastest spilled with one of the supported compilers (``make check-kernels``).
    """
    if num_rows <= 16:
        if target.capability == 100:
            return Tiles(16, 32 if bulky else 64, 64, 4, 3)
        return Tiles(16, 64, 64 if target.capability == 120 else 128, 4, 3)
    if num_rows <= 64:
        return Tiles(64, 64, 64 if bulky or target.capability == 120 else 128, 4, 3)
    return Tiles(128, 128, 64, 8, 3) if target.capability in (90, 100) else Tiles(64, 128, 64, 8, 2)


@quantized_matmul.launcher
def _launch(
    x: torch.Tensor,
    weight: QuantizedMatrix,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    out = torch.empty((len(x), weight.shape[0]), dtype=x.dtype, device=x.device) if residual is None else residual
    launch_product(x, weight, out, bias=bias, residual=residual)
    return out


def launch_product(
    x: torch.Tensor,
    weight: QuantizedMatrix,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    routing: Routing | None = None,
    weighted: bool = False,
) -> None:
    """Write the product into ``out`` ``[M, N]``, which may be columns of a matrix and may be ``residual``.

    With ``routing`` ``weight`` is ``[E N, K]`` and the rows are as :func:`~.moe_matmul.moe_matmul` has them.
    """
    num_rows, width = out.shape
    depth = x.shape[1]
    unit = min(weight.group, BLOCK) or BLOCK
    if depth % BLOCK:
        raise ValueError(f"a quantised matmul wants a multiple of {BLOCK} columns, not {depth}")
    target = target_of(x.device)
    if weight.quantization is Quantization.FP8 and target.capability < 89:
        raise ValueError(f"sm_{target.capability} cannot convert float8 e4m3; sm_89 and later can")
    int4 = weight.quantization is Quantization.INT4
    form = {"INT4": int4, "GROUP": weight.group, "UNIT": unit}
    if num_rows == 1 and routing is None:
        block_n, blocks = 8, (64 if int4 else 32) * BLOCK // unit
        launch(
            _quantized_gemv_kernel,
            (cdiv(width, block_n),),
            weight,
            x=x, bias=bias, residual=residual, out=out, N=width, K=depth, BLOCK_N=block_n, BLOCKS=blocks, **form,
        )  # fmt: skip
        return
    experts, shared, rows_per_tile = 0, 1, num_rows
    if routing is not None:
        experts = routing.starts.shape[0] - 1
        shared = num_rows // len(x)
        rows_per_tile = cdiv(num_rows, experts)
    tiles = quantized_tiles(rows_per_tile, int4 or weight.super_scales is not None, target)
    num_blocks = num_rows // tiles.BLOCK_M + experts if experts else cdiv(num_rows, tiles.BLOCK_M)
    launch(
        _quantized_matmul_kernel,
        (num_blocks, cdiv(width, tiles.BLOCK_N)),
        weight,
        tiles,
        x=x, bias=bias, residual=residual, out=out, order=routing.order if routing else None,
        starts=routing.starts if routing else None, weights=routing.weights if routing and weighted else None,
        M=num_rows, N=width, K=depth, x_stride=x.stride(0), out_stride=out.stride(0),
        EXPERTS=experts, SHARED=shared, BLOCKS=tiles.BLOCK_K // unit, **form,
    )  # fmt: skip


def _random(format: StoredFormat) -> Callable[[torch.Tensor], QuantizedMatrix]:
    """Return a function that makes random blocks of a format of the shape of its argument."""

    def make(weight: torch.Tensor) -> QuantizedMatrix:
        generator = np.random.default_rng(3)
        num_blocks = weight.numel() // format.block
        blocks = generator.integers(0, 256, (num_blocks, format.block_bytes), dtype=np.uint8)
        scales = generator.uniform(0.01, 0.1, (num_blocks, 2)) / (BLOCK if format.block > BLOCK else 1)
        halves = scales.astype(np.float16).view(np.uint8)
        if format.name == "Q6_K":
            blocks[:, -2:] = halves[:, :2]
        else:
            blocks[:, :4] = halves
        return format.read(torch.from_numpy(blocks).to(weight.device), len(weight))

    return make


FORMS: Final[dict[str, Callable[[torch.Tensor], QuantizedMatrix]]] = {
    **{name: format.quantize for name, format in ROUNDED_FORMATS.items()},
    "int4 g32": lambda weight: quantize_int4(weight, 32),
    **{name: _random(format) for name, format in STORED_FORMATS.items()},
}
"""Every form, made of a matrix ``[N, K]`` with K a multiple of 256; GGUF's are random."""


@quantized_matmul.cases(*FORMS, dtypes=HALF_TYPES)
def _cases(check: Run, make: Make, form: str) -> None:
    for rows, depth, width in ((1, 512, 20), (5, 768, 70), (40, 256, 33), (130, 512, 140)):
        weight = FORMS[form](make(width, depth, dtype=torch.float32, scale=depth**-0.5))
        x = make(rows, depth)
        check(x, weight, make(width))
        check(x, weight, residual=make(rows, width, scale=depth**0.5))


def shapes_of_forms(make: Make, rows: int, columns: int) -> Iterator[QuantizedMatrix]:
    """Yield a matrix in each form that a model can have on a GPU."""
    for name, format in FORMATS.items():
        if name != "fp8" or target_of(make.device).capability >= 89:
            yield format.layout(columns).empty(rows, columns, make.device)


@quantized_matmul.launches()
def _launches(run: Run, make: Make) -> None:
    for rows in (1, 16, 64, 2048) if make.dtype == torch.bfloat16 else (16,):
        for weight in shapes_of_forms(make, 4096, 4096):
            run(make(rows, 4096), weight)
            run(make(rows, 4096), weight, residual=make(rows, 4096))
