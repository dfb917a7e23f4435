"""Routing of tokens to experts from a router's scores, and the sum of the experts' results.

For few tokens one program does all of it, where torch has twenty kernels, most of them for sorting. It takes the
likeliest remaining expert of each token ``C`` times, in two passes: the first counts the tokens of each expert, the
second gives each token its place in the order (a counting sort).
"""

import dataclasses
from typing import Final, NamedTuple

import torch

from neuron.triton_kernels._triton import tl, triton
from neuron.triton_kernels.launch import cdiv, launch, power_of_two
from neuron.triton_kernels.operation import HALF_TYPES, Make, Operation, Run

MAX_TOKENS: Final = 64
MAX_TILE: Final = 64 * 128
"""Most tokens of one program, and most elements of its tile of tokens by experts, which stays in registers."""
BLOCK_HIDDEN: Final = 1024
LEAST: Final = 1e-20
"""Number added to a sum of weights before it divides, as in the models' own code."""
SMALL = tl.constexpr(LEAST)
UNORDERED, ABSENT, TAKEN = tl.constexpr(-1e29), tl.constexpr(-1e30), tl.constexpr(-2e30)
"""Weights of experts that are NaN, of those that are not there, and of those already taken."""


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


class Picks(NamedTuple):
    """Choice of experts, as :class:`neuron.layers.experts.Router` describes it."""

    choices: int
    normalise: bool = True
    sigmoid: bool = False
    num_groups: int = 1
    top_groups: int = 1
    scale: float = 1.0


@Operation
def route(scores: torch.Tensor, picks: Picks, correction: torch.Tensor | None = None) -> Routing:
    """Choose experts for each token from router ``scores`` ``[T, E]``; ``correction`` ``[E]`` is float32.

    Kernels take the lower number first among equally likely experts, torch any. A row with a NaN gets experts, too; its
    weights are NaN.
    """
    choices = picks.choices
    shares = scores.float().sigmoid() if picks.sigmoid else scores.float().softmax(-1)
    wanted = shares if correction is None else shares + correction
    if picks.num_groups > 1:
        groups = wanted.unflatten(1, (picks.num_groups, -1))
        best = groups.topk(2, dim=-1).values.sum(-1).topk(picks.top_groups, dim=-1).indices
        kept = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter(1, best, True)
        wanted = groups.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(1)
    experts = wanted.topk(choices, dim=-1).indices
    weights = shares.gather(1, experts)
    if picks.normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + LEAST)
    weights = weights * picks.scale
    flat = experts.reshape(-1)
    order = flat.argsort(stable=True)
    numbers = torch.arange(scores.shape[1] + 1, device=scores.device)
    starts = torch.searchsorted(flat.index_select(0, order), numbers)
    return Routing(order.to(torch.int32), starts.to(torch.int32), weights.reshape(-1).contiguous(), choices)


@triton.jit
def _group_choices(wanted, e, NUM_GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """Return ``wanted`` with ABSENT for experts that are not in the groups with the best sums of two."""
    group = (e // SIZE)[None, :]
    sums = tl.full(wanted.shape, ABSENT, tl.float32)
    for g in range(NUM_GROUPS):
        own = tl.where(group == g, wanted, ABSENT)
        best = tl.max(own, 1)
        others = tl.where(e[None, :] == tl.argmax(own, 1)[:, None], ABSENT, own)
        sums = tl.where(group == g, (best + tl.max(others, 1))[:, None], sums)
    kept = tl.full(wanted.shape, ABSENT, tl.float32)
    for _ in range(TOP_GROUPS):
        picked = group == (tl.argmax(sums, 1) // SIZE)[:, None]
        kept = tl.where(picked, wanted, kept)
        sums = tl.where(picked, TAKEN, sums)
    return kept


@triton.jit(do_not_specialize=["T", "scale"])
def _route_kernel(
    scores, correction, order, starts, weights, T, scale,
    E: tl.constexpr, CHOICES: tl.constexpr, NORMALISE: tl.constexpr, SIGMOID: tl.constexpr, NUM_GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    t = tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    inside = (t < T)[:, None] & (e < E)[None, :]
    score = tl.load(scores + t[:, None] * E + e[None, :], mask=inside, other=float("-inf")).to(tl.float32)
    # A row beyond the last is uniform: its result is not stored, and holds no NaN.
    score = tl.where((t < T)[:, None], score, tl.where((e < E)[None, :], 0.0, float("-inf")))
    if SIGMOID:
        share = 1.0 / (1.0 + tl.exp(-score))
    else:
        share = tl.exp(score - tl.max(score, 1)[:, None])
        share = share / tl.sum(share, 1)[:, None]
    wanted = share
    if correction is not None:
        wanted += tl.load(correction + e, mask=e < E, other=0.0)[None, :]
    # Each row must take CHOICES experts, or entries of the order stay unwritten and the matmuls use any rows.
    wanted = tl.where(wanted == wanted, wanted, UNORDERED)
    wanted = tl.where((e < E)[None, :], wanted, ABSENT)
    if NUM_GROUPS > 1:
        wanted = _group_choices(wanted, e, NUM_GROUPS, TOP_GROUPS, E // NUM_GROUPS)

    left = wanted
    total = tl.zeros([BLOCK_T], tl.float32)
    for _ in range(CHOICES):
        chosen = e[None, :] == tl.argmax(left, 1)[:, None]
        total += tl.sum(tl.where(chosen, share, 0.0), 1)
        left = tl.where(chosen, TAKEN, left)
    routed = tl.where(inside & (left == TAKEN), 1, 0)
    count = tl.sum(routed, 0)
    first = tl.cumsum(count, 0) - count
    tl.store(starts + e, first, mask=e < E)
    tl.store(starts + E, T * CHOICES)
    place = first[None, :] + tl.cumsum(routed, 0) - routed

    left = wanted
    for choice in range(CHOICES):
        chosen = e[None, :] == tl.argmax(left, 1)[:, None]
        weight = tl.sum(tl.where(chosen, share, 0.0), 1)
        if NORMALISE:
            weight /= total + SMALL
        weight *= scale
        pair = t * CHOICES + choice
        tl.store(weights + pair, weight, mask=t < T)
        tl.store(order + tl.sum(tl.where(chosen, place, 0), 1), pair, mask=t < T)
        left = tl.where(chosen, TAKEN, left)


@route.launcher
def _launch_route(scores: torch.Tensor, picks: Picks, correction: torch.Tensor | None = None) -> Routing:
    num_tokens, num_experts = scores.shape
    choices = picks.choices
    block_e = max(power_of_two(num_experts), 16)
    most = min(MAX_TOKENS, MAX_TILE // block_e)
    if num_tokens > most:
        return route.eager(scores, picks, correction)
    pairs, device = num_tokens * choices, scores.device
    routing = Routing(
        order=torch.empty(pairs, dtype=torch.int32, device=device),
        starts=torch.empty(num_experts + 1, dtype=torch.int32, device=device),
        weights=torch.empty(pairs, dtype=torch.float32, device=device),
        choices=choices,
    )
    block_t = 1 if num_tokens == 1 else min(16, most) if num_tokens <= 16 else most
    launch(
        _route_kernel,
        (1,),
        routing,
        scores=scores, correction=correction, T=num_tokens, scale=picks.scale, E=num_experts, CHOICES=choices,
        NORMALISE=picks.normalise, SIGMOID=picks.sigmoid, NUM_GROUPS=picks.num_groups, TOP_GROUPS=picks.top_groups,
        BLOCK_T=block_t, BLOCK_E=block_e, num_warps=min(max(block_t * block_e // 512, 1), 16),
    )  # fmt: skip
    return routing


@route.cases(dtypes=HALF_TYPES)
def _route_cases(check: Run, make: Make) -> None:
    for tokens, experts, picks in (
        (1, 128, Picks(8)),
        (7, 5, Picks(3, normalise=False)),
        (16, 16, Picks(1)),
        (61, 20, Picks(9, scale=1.5)),
        (7, 20, Picks(3, sigmoid=True, scale=2.5)),
        (17, 24, Picks(5, sigmoid=True, num_groups=4, top_groups=2)),
    ):
        # No two are equally likely: torch chooses among such arbitrarily.
        ranks = torch.stack([torch.randperm(experts, device=make.device) for _ in range(tokens)])
        # So large a correction that it decides, and differs from group to group.
        correction = torch.linspace(-2, 2, experts, device=make.device).roll(3) if picks.sigmoid else None
        check((ranks / 16).to(make.dtype), picks, correction)


@route.launches()
def _route_launches(run: Run, make: Make) -> None:
    for tokens in (1, 8, 64):
        run(make(tokens, 128), Picks(8))
        run(make(tokens, 160), Picks(8, sigmoid=True), make(160, dtype=torch.float32))


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
