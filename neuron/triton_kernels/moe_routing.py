"""Routing of tokens to experts from a router's scores, and the sum of the experts' results.

For few tokens one program does all of it, where torch has twenty kernels, most of them for sorting. It takes the
likeliest remaining expert of each token ``C`` times, in two passes: the first counts the tokens of each expert, the
second gives each token its place in the order (a counting sort).
"""

from typing import Final

import torch
import triton
import triton.language as tl

from neuron.triton_kernels.launch import cdiv, launch, power_of_two
from neuron.triton_kernels.routing import Routing

MAX_TOKENS: Final = 64
"""Most tokens of one program: a tile of them by all experts stays in registers."""
BLOCK_HIDDEN: Final = 1024


@triton.jit(do_not_specialize=["T"])
def _route_kernel(
    scores,
    order,
    starts,
    weights,
    T,
    E: tl.constexpr,
    CHOICES: tl.constexpr,
    NORMALISE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
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


def route(scores: torch.Tensor, choices: int, *, normalise: bool = True) -> Routing:
    """Choose the ``choices`` likeliest experts of each of up to MAX_TOKENS tokens from ``scores`` ``[T, E]``.

    Among equally likely experts the lower number goes first.
    """
    num_tokens, num_experts = scores.shape
    if not 1 <= num_tokens <= MAX_TOKENS:
        raise ValueError(f"1 to {MAX_TOKENS} tokens are routed at once, not {num_tokens}")
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
        {"scores": scores, "order": routing.order, "starts": routing.starts, "weights": routing.weights}
        | {"T": num_tokens},
        {"E": num_experts, "CHOICES": choices, "NORMALISE": normalise, "BLOCK_T": block_t, "BLOCK_E": block_e},
        num_warps=min(max(block_t * block_e // 512, 1), 16),
    )
    return routing


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


def add_choices(parts: torch.Tensor, choices: int, residual: torch.Tensor) -> None:
    """Add ``parts`` ``[T C, hidden]``, summed over a token's choices, to ``residual`` ``[T, hidden]`` in place."""
    num_tokens, hidden = residual.shape
    launch(
        _combine_kernel,
        (num_tokens, cdiv(hidden, BLOCK_HIDDEN)),
        {"parts": parts, "residual": residual, "hidden": hidden},
        {"CHOICES": choices, "BLOCK": BLOCK_HIDDEN},
        num_warps=4,
    )
