"""``out = x w^T + bias`` for many rows: ``x`` ``[M, K]``, ``w`` ``[N, K]``, both with the last dimension contiguous.

Two kernels. On Hopper and later a persistent one: as many programs as processors, each walking over output tiles,
operands copied by tensor descriptors (TMA), accumulators in float32. Elsewhere, and where a row is not a multiple of 16
bytes, a pipelined one with one tile a program. Tiles are taken in groups of GROUP rows of tiles, so that concurrent
programs share operands in the second-level cache (the order of the Triton tutorial's matmul, our own code).
"""

from typing import Final

import torch
from torch.nn import functional

from neuron.triton_kernels._triton import tl, triton
from neuron.triton_kernels.launch import Target, Tiles, cdiv, launch, target_of
from neuron.triton_kernels.operation import Make, Operation, Run

GROUP: Final = 8


@Operation
def matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``x w^T + bias`` ``[M, N]`` of ``x`` ``[M, K]`` and ``weight`` ``[N, K]``, contiguous."""
    return functional.linear(x, weight, bias)


@triton.jit
def tile_of(tile, rows, columns, GROUP: tl.constexpr):
    """Return the row and column of tile number ``tile``, in groups of GROUP rows."""
    band = tile // (GROUP * columns)
    height = tl.minimum(rows - band * GROUP, GROUP)
    within = tile % (GROUP * columns)
    return band * GROUP + within % height, within // height


@triton.jit(do_not_specialize=["M"])
def _matmul_kernel(
    x, w, bias, out, M, N, K, x_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    i, j = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    m = i * BLOCK_M + tl.arange(0, BLOCK_M)
    n = j * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows past the end repeat the last one: cheaper than a mask, and they are not stored.
    x_at = x + tl.minimum(m, M - 1).to(tl.int64)[:, None] * x_stride + k[None, :]
    w_at = w + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K + k[None, :]
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        inside = (k < K - start)[None, :]
        a = tl.load(x_at, mask=inside, other=0.0)
        b = tl.load(w_at, mask=inside, other=0.0)
        accumulator = tl.dot(a, tl.trans(b), accumulator)
        x_at += BLOCK_K
        w_at += BLOCK_K
    if bias is not None:
        accumulator += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    mask = (m < M)[:, None] & (n < N)[None, :]
    tl.store(out + m.to(tl.int64)[:, None] * N + n[None, :], accumulator.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _persistent_matmul_kernel(
    x, w, bias, out, M, N, K, x_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    x_tiles = tl.make_tensor_descriptor(x, [M, K], [x_stride, 1], [BLOCK_M, BLOCK_K])
    w_tiles = tl.make_tensor_descriptor(w, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
    out_tiles = tl.make_tensor_descriptor(out, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    # Flattened, both loops are one pipeline: the next tile's operands are in flight while this one is stored.
    for tile in tl.range(tl.program_id(0), rows * columns, tl.num_programs(0), flatten=True):
        i, j = tile_of(tile, rows, columns, GROUP)
        accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            a = x_tiles.load([i * BLOCK_M, start])
            b = w_tiles.load([j * BLOCK_N, start])
            accumulator = tl.dot(a, tl.trans(b), accumulator)
        if bias is not None:
            n = j * BLOCK_N + tl.arange(0, BLOCK_N)
            accumulator += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        out_tiles.store([i * BLOCK_M, j * BLOCK_N], accumulator.to(out.dtype.element_ty))


def _has_descriptors(target: Target) -> bool:
    """Whether copies by descriptors are plain instructions.

    For sm_120 the assembler of Triton 3.6 puts a call with a stack frame beside each, for copies to other blocks.
    """
    if target.capability != 120:
        return target.has_descriptors
    import triton

    return not triton.__version__.startswith("3.6.")


def matmul_tiles(num_rows: int, aligned: bool, described: bool, target: Target) -> Tiles:
    """Return a small or a large choice for each GPU, by rows only.

    Rows not ``aligned`` to 16 bytes are copied element by element through registers, which spills in large tiles.
    Without descriptors (not ``described``) addresses take registers too, and the largest tile spills on sm_90.
    """
    if not aligned:
        return Tiles(64, 64, 32, 4, 2)
    large = num_rows > 256
    if target.capability in (90, 100):
        return Tiles(128, 256 if described else 128, 64, 8, 3) if large else Tiles(64, 128, 64, 4, 4)
    if target.big_shared_memory:
        return Tiles(128, 128, 64, 8, 3) if large else Tiles(64, 128, 64, 4, 3)
    return Tiles(128, 128, 32, 8, 3) if large else Tiles(64, 128, 32, 4, 3)


@matmul.launcher
def _launch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    num_rows, depth = x.shape
    width = weight.shape[0]
    target = target_of(x.device)
    out = torch.empty((num_rows, width), dtype=x.dtype, device=x.device)
    # Whole units of 16 elements, as the compiler may assume of a size that is fixed for a model.
    aligned = depth % 16 == 0 and x.stride(0) % 16 == 0
    persistent = _has_descriptors(target) and aligned and width % 16 == 0
    tiles = matmul_tiles(num_rows, aligned, persistent, target)
    num_tiles = cdiv(num_rows, tiles.BLOCK_M) * cdiv(width, tiles.BLOCK_N)
    launch(
        _persistent_matmul_kernel if persistent else _matmul_kernel,
        (min(num_tiles, target.num_sms) if persistent else num_tiles,),
        tiles,
        x=x, w=weight, bias=bias, out=out, M=num_rows, N=width, K=depth, x_stride=x.stride(0), GROUP=GROUP,
    )  # fmt: skip
    return out


@matmul.cases()
def _cases(check: Run, make: Make) -> None:
    for rows, depth, width in ((1, 16, 16), (70, 144, 200), (300, 80, 272), (65, 77, 131), (70, 48, 1)):
        bias = make(width) if rows == 70 else None
        check(make(rows, depth), make(width, depth, scale=depth**-0.5), bias)


@matmul.launches()
def _launches(run: Run, make: Make) -> None:
    for rows in (200, 4096):
        run(make(rows, 4096), make(6144, 4096))
        run(make(rows, 77), make(131, 77), make(131))
    # The plain form is also what Hopper runs where only the output's rows are not whole.
    run(make(4096, 4096), make(49155, 4096))
