"""Routing of tokens to experts from a router's scores, and the sum of the experts' results.

For few tokens one program does all of it, where torch has twenty kernels, most of them for sorting. It takes the
likeliest remaining expert of each token ``C`` times, in two passes: the first counts the tokens of each expert, the
second gives each token its place in the order (a counting sort).
"""

import dataclasses
from typing import Final

import torch

from neuron.triton_kernels._triton import tl, triton
from neuron.triton_kernels.launch import cdiv, launch, power_of_two
from neuron.triton_kernels.operation import HALF_TYPES, Make, Operation, Run

MAX_TOKENS: Final = 64
"""Most tokens of one program: a tile of them by all experts stays in registers."""
BLOCK_HIDDEN: Final = 1024


@dataclasses.dataclass(frozen=True, slots=True)
class Routing:
    """Rows of each expert, for T tokens with C choices each; all on the device."""

    order: torch.Tensor
    """``[T C]`` int32: pairs, as ``token * C + choice``, sorted by expert."""
    starts: torch.Tensor
    """``[E + 1]`` int32: expert e has ``order[starts[e]:starts[e + 1]]``."""
    weights: torch.Tensor
    """``[T C]`` float32: the weight of each pair, by pair."""
    choices: int


@Operation
def route(scores: torch.Tensor, choices: int, *, normalise: bool = True) -> Routing:
    """Choose the ``choices`` likeliest experts of each token from router ``scores`` ``[T, E]``.

    Kernels take the lower number first among equally likely experts, torch any.
    """
    probabilities = scores.float().softmax(-1)
    weights, experts = probabilities.topk(choices, dim=-1)
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    flat = experts.reshape(-1)
    order = flat.argsort(stable=True)
    numbers = torch.arange(scores.shape[1] + 1, device=scores.device)
    starts = torch.searchsorted(flat.index_select(0, order), numbers)
    return Routing(order.to(torch.int32), starts.to(torch.int32), weights.reshape(-1).contiguous(), choices)


@triton.jit(do_not_specialize=["T"])
def _route_kernel(
    scores, order, starts, weights, T,
    E: tl.constexpr, CHOICES: tl.constexpr, NORMALISE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    t = tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    inside = (t < T)[:, None] & (e < E)[None, :]
    score = tl.load(scores + t[:, None] * E + e[None, :], mask=inside, other=float("-inf")).to(tl.float32)
    # A row beyond the last is uniform: its result is not stored, and holds no NaN.
    score = tl.where((t < T)[:, None], score, tl.where((e < E)[None, :], 0.0, float("-inf")))
    share = tl.exp(score - tl.max(score, 1)[:, None])
    share = tl.where((e < E)[None, :], share / tl.sum(share, 1)[:, None], -1.0)

    left = share
    total = tl.zeros([BLOCK_T], tl.float32)
    for _ in range(CHOICES):
        chosen = e[None, :] == tl.argmax(left, 1)[:, None]
        total += tl.max(left, 1)
        left = tl.where(chosen, -2.0, left)
    routed = tl.where(inside & (left == -2.0), 1, 0)
    count = tl.sum(routed, 0)
    first = tl.cumsum(count, 0) - count
    tl.store(starts + e, first, mask=e < E)
    tl.store(starts + E, T * CHOICES)
    place = first[None, :] + tl.cumsum(routed, 0) - routed

    left = share
    for choice in range(CHOICES):
        chosen = e[None, :] == tl.argmax(left, 1)[:, None]
        weight = tl.max(left, 1)
        if NORMALISE:
            weight /= total
        pair = t * CHOICES + choice
        tl.store(weights + pair, weight, mask=t < T)
        tl.store(order + tl.sum(tl.where(chosen, place, 0), 1), pair, mask=t < T)
        left = tl.where(chosen, -2.0, left)


@route.launcher
def _launch_route(scores: torch.Tensor, choices: int, *, normalise: bool = True) -> Routing:
    num_tokens, num_experts = scores.shape
    if num_tokens > MAX_TOKENS:
        return route.eager(scores, choices, normalise=normalise)
    pairs, device = num_tokens * choices, scores.device
    routing = Routing(
        order=torch.empty(pairs, dtype=torch.int32, device=device),
        starts=torch.empty(num_experts + 1, dtype=torch.int32, device=device),
        weights=torch.empty(pairs, dtype=torch.float32, device=device),
        choices=choices,
    )
    block_t = 1 if num_tokens == 1 else 16 if num_tokens <= 16 else MAX_TOKENS
    block_e = max(power_of_two(num_experts), 16)
    launch(
        _route_kernel,
        (1,),
        routing,
        scores=scores, T=num_tokens, E=num_experts, CHOICES=choices, NORMALISE=normalise, BLOCK_T=block_t,
        BLOCK_E=block_e, num_warps=min(max(block_t * block_e // 512, 1), 16),
    )  # fmt: skip
    return routing


@route.cases(dtypes=HALF_TYPES)
def _route_cases(check: Run, make: Make) -> None:
    for tokens, experts, choices, normalise in (
        (1, 128, 8, True),
        (7, 5, 3, False),
        (16, 16, 1, True),
        (61, 20, 9, True),
    ):
        # No two are equally likely: torch chooses among such arbitrarily.
        ranks = torch.stack([torch.randperm(experts, device=make.device) for _ in range(tokens)])
        check((ranks / 16).to(make.dtype), choices, normalise=normalise)


@route.launches()
def _route_launches(run: Run, make: Make) -> None:
    for tokens in (1, 8, 64):
        run(make(tokens, 128), 8)


@Operation
def add_choices(parts: torch.Tensor, choices: int, residual: torch.Tensor) -> None:
    """Add ``parts`` ``[T C, hidden]``, summed over a token's choices, to ``residual`` ``[T, hidden]`` in place."""
    total = parts.view(len(residual), choices, -1).sum(1, dtype=torch.float32)
    residual.copy_(residual.float() + total)


@triton.jit
def _combine_kernel(parts, residual, hidden, CHOICES: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden
    total = tl.load(residual + token * hidden + column, mask=inside, other=0.0).to(tl.float32)
    for choice in range(CHOICES):
        at = parts + (token * CHOICES + choice) * hidden + column
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(residual + token * hidden + column, total.to(residual.dtype.element_ty), mask=inside)


@add_choices.launcher
def _launch_sum(parts: torch.Tensor, choices: int, residual: torch.Tensor) -> None:
    num_tokens, hidden = residual.shape
    launch(
        _combine_kernel,
        (num_tokens, cdiv(hidden, BLOCK_HIDDEN)),
        parts=parts, residual=residual, hidden=hidden, CHOICES=choices, BLOCK=BLOCK_HIDDEN,
    )  # fmt: skip


@add_choices.cases(dtypes=HALF_TYPES)
def _sum_cases(check: Run, make: Make) -> None:
    for tokens, choices in ((1, 8), (7, 3), (61, 9)):
        check(make(tokens * choices, 77), choices, make(tokens, 77))


@add_choices.launches()
def _sum_launches(run: Run, make: Make) -> None:
    run(make(1024, 768), 8, make(128, 768))
