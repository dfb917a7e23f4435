"""Gated delta rule (arXiv:2412.06464): a recurrence whose state forgets, and is corrected towards each new value.

With a head's state S ``[Dk, Dv]``, decay ``g = a softplus(alpha + bias)``, ``a < 0``, strength ``b = sigmoid(beta)``,
and q and k of length 1, q times ``Dk^-0.5``:

    S <- e^g S;  S <- S + k (b (v - S^T k))^T;  o = S^T q

Prompts are computed in chunks of C tokens, with G the running sum of g in a chunk, ``D_ij = e^(G_i - G_j)`` for j <= i,
and A the part of ``b_i (k_i k_j) D_ij`` with j < i:

    (I + A) U = b V;  (I + A) W = b e^G K;  V' = U - W S
    O = e^G Q S + (Q K^T * D) V';  S <- e^(G_C) S + (e^(G_C - G) K)^T V'

The triangular systems are solved by forward substitution: powers of A overflow where keys are alike. Differences of G
are taken, and masked, before e^x, which overflows otherwise. All in float32.
"""

from typing import Final, NamedTuple

import torch
from torch.nn import functional

from neuron.triton_kernels.batch import Batch
from neuron.triton_kernels.operation import Operation

NORM_EPS: Final = 1e-6
"""Epsilon under the root of a key's or query's length."""


@Operation
def gated_delta(
    qkv: torch.Tensor,
    gates: torch.Tensor,
    decay: torch.Tensor,
    bias: torch.Tensor,
    states: torch.Tensor,
    batch: Batch,
    *,
    tiled: bool,
    chunk_tokens: int,
) -> torch.Tensor:
    """Return ``o`` ``[T, H Dv]`` of ``qkv`` ``[T, 2 K Dk + H Dv]`` and ``gates`` ``[T, 2 H]``: beta, then alpha.

    ``decay`` and ``bias`` are ``[H]`` float32. ``states`` ``[slots, H, Dk, Dv]`` float32 are updated in place. Value
    head h has key head ``h // (H / K)``, or if ``tiled`` ``h % K``.
    """
    assert batch.state_slots is not None
    slots, rows, decodes = batch.state_slots.long(), batch.cu_seqlens.tolist(), batch.num_decodes

    def tokens(start: int, stop: int) -> _Tokens:
        return _tokens(qkv[start:stop].float(), gates[start:stop].float(), decay, bias, states.shape, tiled)

    parts = []
    if decodes:
        out, states[slots[:decodes]] = _recurrence(tokens(0, decodes), states[slots[:decodes]])
        parts.append(out)
    for index in range(decodes, len(slots)):
        state, end = states[slots[index]], rows[index + 1]
        for start in range(rows[index], end, chunk_tokens):
            out, state = _chunk(tokens(start, min(start + chunk_tokens, end)), state)
            parts.append(out)
        states[slots[index]] = state
    return torch.cat(parts).flatten(1).to(qkv.dtype)


class _Tokens(NamedTuple):
    """Queries, keys and values ``[N, H, D]``, decays and strengths ``[N, H]`` of N tokens."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    b: torch.Tensor


def _tokens(
    qkv: torch.Tensor, gates: torch.Tensor, decay: torch.Tensor, bias: torch.Tensor, shape: torch.Size, tiled: bool
) -> _Tokens:
    _, num_heads, key_dim, value_dim = shape
    beta, alpha = gates.chunk(2, dim=1)
    keys, v = qkv.split((qkv.shape[1] - num_heads * value_dim, num_heads * value_dim), dim=1)
    keys = keys.view(len(keys), 2, -1, key_dim)
    keys = keys * torch.rsqrt(keys.square().sum(-1, keepdim=True) + NORM_EPS)
    group = num_heads // keys.shape[2]
    q, k = (keys.repeat(1, 1, group, 1) if tiled else keys.repeat_interleave(group, dim=2)).unbind(1)
    g = decay * functional.softplus(alpha + bias)
    return _Tokens(q * key_dim**-0.5, k, v.view(len(v), num_heads, value_dim), g, beta.sigmoid())


def _recurrence(tokens: _Tokens, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return o ``[B, H, Dv]`` of one token each of B sequences, and their new states."""
    q, k, v, g, b = tokens
    state = state * g.exp()[..., None, None]
    error = v - torch.einsum("bhkv,bhk->bhv", state, k)
    state = state + k.unsqueeze(-1) * (b.unsqueeze(-1) * error).unsqueeze(-2)
    return torch.einsum("bhkv,bhk->bhv", state, q), state


def _chunk(tokens: _Tokens, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return o ``[C, H, Dv]`` of the C tokens of a chunk, and the new state ``[H, Dk, Dv]``."""
    q, k, v, g, b = (tensor.transpose(0, 1) for tensor in tokens)
    sums, b = g.cumsum(1).unsqueeze(-1), b.unsqueeze(-1)
    later = torch.ones(len(tokens.g), len(tokens.g), dtype=torch.bool, device=g.device).triu(1)
    decays = (sums - sums.mT).masked_fill(later, -torch.inf).exp()
    products = b * (k @ k.mT) * decays
    # Of these only what is below the diagonal is read.
    right = torch.cat((b * v, b * sums.exp() * k), dim=-1)
    solved = torch.linalg.solve_triangular(products, right, upper=False, unitriangular=True)
    u, w = solved.split((v.shape[-1], k.shape[-1]), dim=-1)
    values = u - w @ state
    out = (q * sums.exp()) @ state + (q @ k.mT * decays) @ values
    last = sums[:, -1:]
    return out.transpose(0, 1), state * last.exp() + (k * (last - sums).exp()).mT @ values
