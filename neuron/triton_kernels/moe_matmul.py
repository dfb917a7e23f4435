"""Matmuls of a mixture of experts: each row by the weights of the expert it was routed to, in one launch.

``out[r] = x[order[r] // rows_per_token] w[expert(r)]^T``, optionally times the routing weight. ``x`` is
``[T, K]``, ``w`` ``[E, N, K]``. Rows are the (token, choice) pairs sorted by expert, so that an expert's rows are tiles
of a plain matmul (as in megablocks, arXiv:2211.15841, without padding to whole blocks). The grid is a bound, as in
:mod:`neuron.triton_kernels.prefill_attention`, so routing never leaves the device.
"""

import itertools

import torch
from torch.nn import functional

from neuron.formats.matrix import QuantizedMatrix
from neuron.formats.schemes import EXAMPLES
from neuron.triton_kernels._triton import tl, triton
from neuron.triton_kernels.launch import Target, Tiles, cdiv, launch, target_of
from neuron.triton_kernels.moe_routing import Picks, Routing, route
from neuron.triton_kernels.operation import HALF_TYPES, Make, Operation, Run
from neuron.triton_kernels.prefill_attention import find_block
from neuron.triton_kernels.quantized_matmul import FORMS, launch_product, quantized_matmul, shapes_of_forms

Experts = torch.Tensor | QuantizedMatrix
"""Weights of experts: ``[E, N, K]``, or ``[E N, K]`` quantised."""


@Operation
def moe_matmul(x: torch.Tensor, weight: Experts, routing: Routing, *, weighted: bool = False) -> torch.Tensor:
    """Return ``[T C, N]``, row ``token * C + choice``: each pair's row of ``x`` by its expert's ``[N, K]``.

    ``x`` is ``[T, K]``, shared by a token's choices, or ``[T C, K]``, contiguous. With ``weighted`` each row is
    multiplied by its routing weight, so that summing over the choices finishes the layer.
    """
    num_pairs, num_experts = len(routing.order), len(routing.starts) - 1
    shared = num_pairs // len(x)
    width = _width(weight, num_experts)
    out = torch.empty((num_pairs, width), dtype=x.dtype, device=x.device)
    for expert, (start, stop) in enumerate(itertools.pairwise(routing.starts.tolist())):
        if start == stop:
            continue
        pairs = routing.order[start:stop].long()
        rows = x[pairs // shared]
        if isinstance(weight, torch.Tensor):
            product = functional.linear(rows, weight[expert])
        else:
            own = slice(expert * width, (expert + 1) * width)
            product = quantized_matmul.eager(rows, weight.map(lambda array, own=own: array[own]))  # type: ignore[misc]
        out[pairs] = product * routing.weights[pairs, None].to(x.dtype) if weighted else product
    return out


def _width(weight: Experts, num_experts: int) -> int:
    return weight.shape[1] if isinstance(weight, torch.Tensor) else weight.shape[0] // num_experts


@triton.jit(do_not_specialize=["blocks"])
def _moe_matmul_kernel(
    x, w, out, order, starts, weights, blocks, N, K,
    EXPERTS: tl.constexpr, SHARED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    none, all_ = tl.full([], 0, tl.int32), tl.full([], EXPERTS, tl.int32)
    expert, block = find_block(starts, none, all_, tl.program_id(0) % blocks, BLOCK_M)
    first = tl.load(starts + expert)
    length = tl.load(starts + expert + 1) - first
    if block * BLOCK_M >= length:
        return
    r = block * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) // blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    pair = tl.load(order + first + tl.minimum(r, length - 1)).to(tl.int64)
    x_at = x + (pair // SHARED)[:, None] * K + k[None, :]
    w_at = w + (expert.to(tl.int64) * N + tl.minimum(n, N - 1))[:, None] * K + k[None, :]
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        inside = (k < K - start)[None, :]
        a = tl.load(x_at, mask=inside, other=0.0)
        b = tl.load(w_at, mask=inside, other=0.0)
        sums = tl.dot(a, tl.trans(b), sums)
        x_at += BLOCK_K
        w_at += BLOCK_K
    if weights is not None:
        sums *= tl.load(weights + pair)[:, None]
    mask = (r < length)[:, None] & (n < N)[None, :]
    tl.store(out + pair[:, None] * N + n[None, :], sums.to(out.dtype.element_ty), mask=mask)


def moe_tiles(rows_per_expert: int, target: Target) -> Tiles:
    """Return the tiles for experts of so many rows on average."""
    if rows_per_expert <= 16:
        return Tiles(16, 64, 128, 4, 3) if target.big_shared_memory else Tiles(16, 64, 64, 4, 4)
    if rows_per_expert <= 64 or not target.big_shared_memory:
        return Tiles(64, 128, 64, 4, 3)
    return Tiles(128, 128, 64, 8, 3)


@moe_matmul.launcher
def _launch(x: torch.Tensor, weight: Experts, routing: Routing, *, weighted: bool = False) -> torch.Tensor:
    num_experts, depth = routing.starts.shape[0] - 1, x.shape[1]
    width = _width(weight, num_experts)
    num_pairs = routing.order.shape[0]
    if x.shape[0] not in (num_pairs, num_pairs // routing.choices):
        raise ValueError(f"x has {x.shape[0]} rows; {num_pairs} pairs of {routing.choices} choices are routed")
    out = torch.empty((num_pairs, width), dtype=x.dtype, device=x.device)
    if isinstance(weight, QuantizedMatrix):
        launch_product(x, weight, out, routing=routing, weighted=weighted)
        return out
    tiles = moe_tiles(cdiv(num_pairs, num_experts), target_of(x.device))
    blocks = num_pairs // tiles.BLOCK_M + num_experts
    launch(
        _moe_matmul_kernel,
        (blocks * cdiv(width, tiles.BLOCK_N),),
        tiles,
        x=x, w=weight, out=out, order=routing.order, starts=routing.starts,
        weights=routing.weights if weighted else None, blocks=blocks, N=width, K=depth,
        EXPERTS=num_experts, SHARED=1 if x.shape[0] == num_pairs else routing.choices,
    )  # fmt: skip
    return out


@moe_matmul.cases("of floats", "int8", "fp8", "int4", "Q8_0", "Q4_K", "Q6_K", "MXFP4", *EXAMPLES, dtypes=HALF_TYPES)
def _cases(check: Run, make: Make, form: str) -> None:
    shapes = ((1, 4, 2, 48, 40), (37, 6, 3, 80, 72), (90, 3, 2, 64, 130))
    for tokens, experts, choices, depth, width in shapes if form == "of floats" else ((37, 5, 3, 256, 40),):
        weight = make(experts * width, depth, dtype=torch.float32, scale=depth**-0.5)
        own = FORMS[form](weight) if form in FORMS else weight.to(make.dtype).view(experts, width, depth)
        routing = route.eager(make(tokens, experts), Picks(choices))
        check(make(tokens, depth), own, routing)
        check(make(tokens, depth), own, routing, weighted=True)
        check(make(tokens * choices, depth), own, routing, weighted=True)


@moe_matmul.launches()
def _launches(run: Run, make: Make) -> None:
    for tokens in (1, 128, 1024, 4096) if make.dtype == torch.bfloat16 else (128,):
        weights = make(tokens * 8, dtype=torch.float32)
        routing = Routing(make.integers(tokens * 8), make.integers(129), weights, 8)
        run(make(tokens, 2048), make(128, 1536, 2048), routing)
        inner = make(tokens * 8, 768)
        run(inner, make(128, 2048, 768), routing, weighted=True)
        for weight in shapes_of_forms(make, 128 * 2048, 768) if tokens in (1, 1024) else ():
            run(inner, weight, routing, weighted=True)
