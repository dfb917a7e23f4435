"""``out = x w^T`` for 1 to 64 rows, bound by one read of ``w`` ``[N, K]``, with fused neighbours.

Optionally fused:

- *norm prologue*: ``x`` ``[M, K]`` is RMS-normalised. ``sum_k w x g / rms(x) = (sum_k w (x g)) / rms(x)``, so the mean
  square is summed up in the same pass and divides the result: no second pass, no kernel of its own.
- *gate and up*: ``w`` is ``[2 N, K]``; a program computes the same columns of both halves and stores ``f(gate) * up``.
- *bias*, and *residual*: the product is added to ``residual`` ``[M, N]`` in place instead of stored.

One row is a sum of products on the ordinary units, with a tile of weights in flight while the last is multiplied; 2 to
64 rows are rows of a matrix tile. K is split over programs where N alone does not fill the GPU; the last to arrive
adds up (see :mod:`neuron.triton_kernels.workspace`). With dependent launch the first tile of weights, which no other
kernel writes, is requested before the wait for the activations.
"""

from typing import Final

import torch
from torch.nn import functional

from neuron.triton_kernels._triton import cuda, tl, triton
from neuron.triton_kernels.activation import activate, gated_activation
from neuron.triton_kernels.launch import Target, Tiles, cdiv, launch, target_of
from neuron.triton_kernels.norm import Norm, rms_norm
from neuron.triton_kernels.operation import Make, Operation, Run
from neuron.triton_kernels.workspace import counters

MAX_ROWS: Final = 64
MAX_SPLITS: Final = 8


@Operation
def skinny_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm: Norm | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the product ``[M, N]`` of contiguous ``x`` ``[M, K]``, M up to 64, and ``weight``, with fused neighbours.

    With ``activation`` ``"silu"`` or ``"gelu"`` ``weight`` is ``[2 N, K]``, else ``[N, K]``; then ``bias`` is the
    gate's. ``residual`` ``[M, N]`` is added to, in place, and returned. Float16 takes no ``norm`` for more than one
    row: ``x g`` before the division by the root mean square can overflow it.
    """
    out = functional.linear(x if norm is None else rms_norm.eager(x, *norm), weight)
    if bias is not None:
        out[:, : len(bias)] += bias
    if activation is not None:
        out = gated_activation.eager(out, activation)
    return out if residual is None else residual.add_(out)


@triton.jit
def _weights(w, n, k, N, K, end):
    """Return a tile of weights, which are read once: evicted first from the cache."""
    mask = (n < N)[:, None] & (k < end)[None, :]
    at = n.to(tl.int64)[:, None] * K + k[None, :]
    return tl.load(w + at, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["eps", "num_splits"])
def _gemv_kernel(
    x, w, norm, bias, residual, out, partial, arrived, N, K, eps, num_splits,
    ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    gated: tl.constexpr = ACTIVATION is not None
    block, split = tl.program_id(0), tl.program_id(1)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)
    share = tl.cdiv(tl.cdiv(K, BLOCK_K), num_splits) * BLOCK_K
    begin = split * share
    end = tl.minimum(begin + share, K)
    if PDL:
        cuda.gdc_launch_dependents()
    first = _weights(w, n, begin + lane, N, K, end)
    second = first
    if gated:
        second = _weights(w + N.to(tl.int64) * K, n, begin + lane, N, K, end)
    if PDL:
        cuda.gdc_wait()
    sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    more_sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for start in range(begin, end, BLOCK_K):
        k = start + lane
        value = tl.load(x + k, mask=k < end, other=0.0).to(tl.float32)
        if norm is not None:
            squares += value * value
            value *= tl.load(norm + k, mask=k < end, other=0.0).to(tl.float32)
        next_first = _weights(w, n, k + BLOCK_K, N, K, end)
        if gated:
            next_second = _weights(w + N.to(tl.int64) * K, n, k + BLOCK_K, N, K, end)
            more_sums += second.to(tl.float32) * value[None, :]
            second = next_second
        sums += first.to(tl.float32) * value[None, :]
        first = next_first
    result = tl.sum(sums, 1)
    gate_up = tl.sum(more_sums, 1)
    square = tl.sum(squares, 0)
    if num_splits > 1:
        # Parts lie as [block, split, 3, BLOCK_N]; the third row holds the sum of squares.
        at = partial + (block * num_splits + split) * (3 * BLOCK_N) + tl.arange(0, BLOCK_N)
        tl.store(at, result)
        tl.store(at + BLOCK_N, gate_up)
        tl.store(at + 2 * BLOCK_N, tl.zeros([BLOCK_N], tl.float32) + square)
        tl.debug_barrier()
        if tl.atomic_add(arrived + block, 1, sem="acq_rel") < num_splits - 1:
            return
        tl.debug_barrier()
        tl.store(arrived + block, 0)
        result = tl.zeros([BLOCK_N], tl.float32)
        gate_up = tl.zeros([BLOCK_N], tl.float32)
        many = tl.zeros([BLOCK_N], tl.float32)
        at = partial + block * num_splits * (3 * BLOCK_N) + tl.arange(0, BLOCK_N)
        for _ in range(num_splits):
            result += tl.load(at, cache_modifier=".cg")
            gate_up += tl.load(at + BLOCK_N, cache_modifier=".cg")
            many += tl.load(at + 2 * BLOCK_N, cache_modifier=".cg")
            at += 3 * BLOCK_N
        square = tl.max(many, 0)
    if norm is not None:
        scale = tl.rsqrt(square / K + eps)
        result *= scale
        gate_up *= scale
    if bias is not None:
        result += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    if gated:
        result = activate(result, ACTIVATION) * gate_up
    if residual is not None:
        result += tl.load(residual + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + n, result.to(out.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["M", "eps", "num_splits"])
def _skinny_kernel(
    x, w, norm, bias, residual, out, partial, arrived, M, N, K, eps, num_splits,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    gated: tl.constexpr = ACTIVATION is not None
    block, split = tl.program_id(0), tl.program_id(1)
    m = tl.arange(0, BLOCK_M)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    share = tl.cdiv(tl.cdiv(K, BLOCK_K), num_splits) * BLOCK_K
    begin = split * share
    end = tl.minimum(begin + share, K)
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    more_sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        mask = (m < M)[:, None] & (k < end)[None, :]
        value = tl.load(x + m[:, None] * K + k[None, :], mask=mask, other=0.0)
        if norm is not None:
            wide = value.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
            gain = tl.load(norm + k, mask=k < end, other=0.0).to(tl.float32)
            value = (wide * gain[None, :]).to(x.dtype.element_ty)
        sums = tl.dot(value, tl.trans(_weights(w, n, k, N, K, end)), sums)
        if gated:
            up = _weights(w + N.to(tl.int64) * K, n, k, N, K, end)
            more_sums = tl.dot(value, tl.trans(up), more_sums)
    inside = (m < M)[:, None] & (n < N)[None, :]
    if num_splits > 1:
        size: tl.constexpr = BLOCK_M * BLOCK_N
        tile = m[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        at = partial + (block * num_splits + split) * (2 * size + BLOCK_M)
        tl.store(at + tile, sums)
        if gated:
            tl.store(at + size + tile, more_sums)
        tl.store(at + 2 * size + m, squares)
        tl.debug_barrier()
        if tl.atomic_add(arrived + block, 1, sem="acq_rel") < num_splits - 1:
            return
        tl.debug_barrier()
        tl.store(arrived + block, 0)
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        more_sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        squares = tl.zeros([BLOCK_M], tl.float32)
        at = partial + block * num_splits * (2 * size + BLOCK_M)
        for _ in range(num_splits):
            sums += tl.load(at + tile, cache_modifier=".cg")
            if gated:
                more_sums += tl.load(at + size + tile, cache_modifier=".cg")
            squares += tl.load(at + 2 * size + m, cache_modifier=".cg")
            at += 2 * size + BLOCK_M
    if norm is not None:
        scale = tl.rsqrt(squares / K + eps)[:, None]
        sums *= scale
        more_sums *= scale
    if bias is not None:
        sums += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if gated:
        sums = activate(sums, ACTIVATION) * more_sums
    at = m[:, None] * N + n[None, :]
    if residual is not None:
        sums += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=inside)


def num_splits_for(num_blocks: int, depth: int, block_k: int, target: Target) -> int:
    """Return the number of splits of K: four programs a multiprocessor, but no split under four tiles."""
    wanted = 4 * target.num_sms // max(num_blocks, 1)
    return max(min(wanted, cdiv(depth, 4 * block_k), MAX_SPLITS), 1)


def skinny_tiles(num_rows: int, gated: bool, target: Target) -> Tiles:
    """Return the tiles for several rows: 32 to 96 KiB of weights in flight a program.

    A ``gated`` product has two tiles of weights a stage; by Triton 3.6 the fourth stage of 64 rows spills on sm_100.
    """
    if num_rows <= 16:
        return Tiles(16, 32, 256 if target.big_shared_memory else 128, 4, 3)
    return Tiles(64, 32, 128, 4, 3 if gated else 4) if target.big_shared_memory else Tiles(64, 32, 64, 4, 4)


@skinny_matmul.launcher
def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm: Norm | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    num_rows, depth = x.shape
    width = weight.shape[0] // (2 if activation else 1)
    if not 1 <= num_rows <= MAX_ROWS:
        raise ValueError(f"a skinny matmul has 1 to {MAX_ROWS} rows, not {num_rows}")
    if norm is not None and x.dtype == torch.float16 and num_rows > 1:
        raise ValueError("the norm prologue of several float16 rows can overflow; normalise first")
    target = target_of(x.device)
    out = torch.empty((num_rows, width), dtype=x.dtype, device=x.device) if residual is None else residual
    gain, eps = norm or (None, 0.0)
    if num_rows == 1:
        tiles = Tiles(1, 4 if activation else 8, 1024, 4, 1)
        part_size = 3 * tiles.BLOCK_N
    else:
        tiles = skinny_tiles(num_rows, activation is not None, target)
        part_size = 2 * tiles.BLOCK_M * tiles.BLOCK_N + tiles.BLOCK_M
    num_blocks = cdiv(width, tiles.BLOCK_N)
    splits = num_splits_for(num_blocks, depth, tiles.BLOCK_K, target)
    partial = torch.empty((num_blocks * splits, part_size), dtype=torch.float32, device=x.device)
    more = {} if num_rows == 1 else {"M": num_rows}
    launch(
        _gemv_kernel if num_rows == 1 else _skinny_kernel,
        (num_blocks, splits),
        tiles,
        x=x, w=weight, norm=gain, bias=bias, residual=residual, out=out, partial=partial,
        arrived=counters(x.device, num_blocks), N=width, K=depth, eps=eps, num_splits=splits, ACTIVATION=activation,
        **more,
    )  # fmt: skip
    return out


@skinny_matmul.cases()
def _cases(check: Run, make: Make) -> None:
    for rows, depth, width in ((1, 2064, 40), (1, 77, 9), (3, 1040, 48), (16, 130, 33), (40, 512, 70)):
        x, weight = make(rows, depth), make(2 * width, depth, scale=depth**-0.5)
        norm = (make(depth), 1e-5) if make.dtype != torch.float16 or rows == 1 else None
        check(x, weight, make(2 * width), norm=norm)
        for function in ("silu", "gelu"):
            check(x, weight, norm=norm, activation=function)
        check(x, weight, residual=make(rows, 2 * width))
        check(x, weight[:1])


@skinny_matmul.launches()
def _launches(run: Run, make: Make) -> None:
    for rows in (1, 16, 64) if make.dtype == torch.bfloat16 else (16,):
        x = make(rows, 4096)
        norm = (make(4096), 1e-6) if make.dtype == torch.bfloat16 or rows == 1 else None
        run(x, make(6144, 4096), make(6144), norm=norm)
        run(x, make(24576, 4096), norm=norm, activation="silu")
        run(x, make(4096, 4096), residual=make(rows, 4096))
