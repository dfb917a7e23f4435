"""Gated delta rule (arXiv:2412.06464): a recurrence whose state forgets, and is corrected towards each new value.

With a head's state S ``[Dk, Dv]``, decay ``g = a softplus(alpha + bias)``, ``a < 0``, strength ``b = sigmoid(beta)``,
and q and k of length 1, q times ``Dk^-0.5``:

    S <- e^g S;  S <- S + k (b (v - S^T k))^T;  o = S^T q

Prompts are computed in chunks of C tokens, with G the running sum of g in a chunk, ``D_ij = e^(G_i - G_j)`` for j <= i,
and A the part of ``b_i (k_i k_j) D_ij`` with j < i:

    (I + A) U = b V;  (I + A) W = b e^G K;  V' = U - W S
    O = e^G Q S + (Q K^T * D) V';  S <- e^(G_C) S + (e^(G_C - G) K)^T V'

The triangular systems are solved by forward substitution: powers of A overflow where keys are alike. Differences of G
are taken, and masked, before e^x, which overflows otherwise. All in float32; the kernel multiplies in several
passes of shorter numbers, which come to nearly as much, and each program has a part of the state in its registers.

A sequence with draft tokens is computed token by token, as it would be without them. The state that is kept is the one
behind its first token; the gates of the drafts are kept too, for :mod:`neuron.triton_kernels.replay`.
"""

from typing import Any, Final, NamedTuple

import torch
from torch.nn import functional

from neuron.triton_kernels._triton import tl, triton
from neuron.triton_kernels.batch import Batch
from neuron.triton_kernels.launch import cdiv, launch, power_of_two
from neuron.triton_kernels.operation import Make, Operation, Run
from neuron.triton_kernels.random_batch import steps_of_states, with_states

NORM_EPS: Final = 1e-6
"""Epsilon under the root of a key's or query's length."""
KERNEL_TOKENS: Final = 16
"""Tokens of a chunk in the kernel, which a chunk of :mod:`neuron.layers.cache` is a multiple of."""


class DeltaRule(NamedTuple):
    """Constants of a layer's rule."""

    decay: torch.Tensor
    """``[H]`` float32: a."""
    bias: torch.Tensor
    """``[H]`` float32."""
    tiled: bool
    """Whether value head h has key head ``h % K``, not ``h // (H / K)``."""
    chunk_tokens: int
    """Tokens of a chunk."""


@Operation
def gated_delta(
    qkv: torch.Tensor, gates: torch.Tensor, rule: DeltaRule, states: torch.Tensor, drafted: torch.Tensor, batch: Batch
) -> torch.Tensor:
    """Return ``o`` ``[T, H Dv]`` of ``qkv`` ``[T, 2 K Dk + H Dv]`` and ``gates`` ``[T, 2 H]``: beta, then alpha.

    ``states`` ``[slots, H, Dk, Dv]`` float32 are updated in place, and ``drafted`` ``[slots, drafts, 2 H]`` gets the
    gates of draft tokens.
    """
    assert batch.state_slots is not None
    slots, rows, decodes = batch.state_slots.long(), batch.cu_seqlens.tolist(), batch.num_decodes

    def tokens(start: int, stop: int) -> Tokens:
        return tokens_of(qkv[start:stop].float(), gates[start:stop].float(), rule, states.shape)

    parts = []
    if decodes:
        out, states[slots[:decodes]] = recurrence(tokens(0, decodes), states[slots[:decodes]])
        parts.append(out)
    prompts = decodes + batch.num_drafting
    for index in range(decodes, prompts):
        start, end, slot = rows[index], rows[index + 1], slots[index : index + 1]
        state, own = states[slot], tokens(start, end)
        for t in range(end - start):
            out, state = recurrence(own.part(t), state)
            parts.append(out)
            if t == 0:
                states[slot] = state
        drafted[slot, : end - start - 1] = gates[start + 1 : end]
    for index in range(prompts, len(slots)):
        state, end = states[slots[index]], rows[index + 1]
        for start in range(rows[index], end, rule.chunk_tokens):
            out, state = _chunk(tokens(start, min(start + rule.chunk_tokens, end)), state)
            parts.append(out)
        states[slots[index]] = state
    return torch.cat(parts).flatten(1).to(qkv.dtype)


class Tokens(NamedTuple):
    """Queries, keys and values ``[N, H, D]``, decays and strengths ``[N, H]`` of N tokens."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    b: torch.Tensor

    def part(self, index: int) -> "Tokens":
        """Return one of them."""
        return Tokens(*(tensor[index : index + 1] for tensor in self))


def tokens_of(qkv: torch.Tensor, gates: torch.Tensor, rule: DeltaRule, shape: torch.Size) -> Tokens:
    """Return the tokens of float32 ``qkv`` and ``gates``, for states of ``shape``."""
    _, num_heads, key_dim, value_dim = shape
    beta, alpha = gates.chunk(2, dim=1)
    keys, v = qkv.split((qkv.shape[1] - num_heads * value_dim, num_heads * value_dim), dim=1)
    keys = keys.view(len(keys), 2, -1, key_dim)
    keys = keys * torch.rsqrt(keys.square().sum(-1, keepdim=True) + NORM_EPS)
    group = num_heads // keys.shape[2]
    q, k = (keys.repeat(1, 1, group, 1) if rule.tiled else keys.repeat_interleave(group, dim=2)).unbind(1)
    g = rule.decay * functional.softplus(alpha + rule.bias)
    return Tokens(q * key_dim**-0.5, k, v.view(len(v), num_heads, value_dim), g, beta.sigmoid())


def recurrence(tokens: Tokens, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return o ``[B, H, Dv]`` of one token each of B sequences, and their new states."""
    q, k, v, g, b = tokens
    state = state * g.exp()[..., None, None]
    error = v - torch.einsum("bhkv,bhk->bhv", state, k)
    state = state + k.unsqueeze(-1) * (b.unsqueeze(-1) * error).unsqueeze(-2)
    return torch.einsum("bhkv,bhk->bhv", state, q), state


def _chunk(tokens: Tokens, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
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


def state_tile(key_dim: int, value_dim: int) -> tuple[int, int]:
    """Return BLOCK_K and BLOCK_V of a program's part of a state: twice as many values spill on sm_80."""
    block_k = max(power_of_two(key_dim), 16)
    return block_k, max(min(power_of_two(value_dim), 2048 // block_k), 16)


@triton.jit
def read_gates(at, rate, shift, inside, H: tl.constexpr):
    """Return decays and strengths, 0 where not ``inside``."""
    beta = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    alpha = tl.load(at + H, mask=inside, other=0.0).to(tl.float32) + shift
    # log(1 + e^alpha), of any size.
    softplus = tl.maximum(alpha, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(alpha)))
    return tl.where(inside, rate * softplus, 0.0), tl.where(inside, 1.0 / (1.0 + tl.exp(-beta)), 0.0)


@triton.jit
def _twice(a, b):
    """Return ``a b`` in two passes of the dtype of ``a``: with float32 ``b`` rounded, and with what that leaves."""
    high = b.to(a.dtype)
    low = (b - high.to(tl.float32)).to(a.dtype)
    return tl.dot(a, low, tl.dot(a, high, input_precision="ieee"), input_precision="ieee")


@triton.jit
def advanced(state, k, v, g, b):
    """Return a part of a state behind one more token, whose key is not of length 1 yet."""
    k *= tl.rsqrt(tl.sum(k * k, 0) + 1e-6)
    state *= tl.exp(g)
    return state + k[:, None] * (b * (v - tl.sum(state * k[:, None], 0)))[None, :]


@triton.jit
def _recurrence_kernel(
    qkv, gates, decay, bias, states, drafted, out, cu_seqlens, state_slots, stride, gate_stride, slot_stride,
    drafted_stride, scale,
    H: tl.constexpr, K: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, TILED: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, DRAFTS: tl.constexpr,
):  # fmt: skip
    sequence, head = tl.program_id(0), tl.program_id(1)
    key_head = head % K if TILED else head // (H // K)
    i, j = tl.arange(0, BLOCK_K), tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    slot = tl.load(state_slots + sequence).to(tl.int64)
    state_at = states + slot * slot_stride + head * (DK * DV) + i[:, None] * DV + j[None, :]
    inside = (i < DK)[:, None] & (j < DV)[None, :]
    state = tl.load(state_at, mask=inside, other=0.0)
    rate, shift = tl.load(decay + head), tl.load(bias + head)
    first = tl.load(cu_seqlens + sequence).to(tl.int64)
    count = tl.load(cu_seqlens + sequence + 1) - first if DRAFTS else 1
    for t in range(count):
        token = first + t
        row = qkv + token * stride
        q = tl.load(row + key_head * DK + i, mask=i < DK, other=0.0).to(tl.float32)
        k = tl.load(row + (K + key_head) * DK + i, mask=i < DK, other=0.0).to(tl.float32)
        v = tl.load(row + 2 * K * DK + head * DV + j, mask=j < DV, other=0.0).to(tl.float32)
        gates_at = gates + token * gate_stride + head
        g, b = read_gates(gates_at, rate, shift, True, H)
        state = advanced(state, k, v, g, b)
        q *= tl.rsqrt(tl.sum(q * q, 0) + 1e-6) * scale
        value = tl.sum(state * q[:, None], 0)
        tl.store(out + token * (H * DV) + head * DV + j, value.to(out.dtype.element_ty), mask=j < DV)
        if t == 0:
            tl.store(state_at, state, mask=inside)
        else:
            kept = drafted + slot * drafted_stride + (t - 1) * (2 * H) + head
            tl.store(kept, tl.load(gates_at))
            tl.store(kept + H, tl.load(gates_at + H))


@triton.jit(do_not_specialize=["first_sequence"])
def _chunk_kernel(
    qkv, gates, decay, bias, states, out, cu_seqlens, state_slots, first_sequence, stride, gate_stride, slot_stride,
    scale,
    H: tl.constexpr, K: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, TILED: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    sequence, head = first_sequence + tl.program_id(0), tl.program_id(1)
    key_head = head % K if TILED else head // (H // K)
    i, j = tl.arange(0, BLOCK_K), tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    t = tl.arange(0, C)
    slot = tl.load(state_slots + sequence).to(tl.int64)
    state_at = states + slot * slot_stride + head * (DK * DV) + i[:, None] * DV + j[None, :]
    inside = (i < DK)[:, None] & (j < DV)[None, :]
    state = tl.load(state_at, mask=inside, other=0.0)
    rate, shift = tl.load(decay + head), tl.load(bias + head)
    first = tl.load(cu_seqlens + sequence).to(tl.int64)
    count = tl.load(cu_seqlens + sequence + 1) - first
    for start in range(0, count, C):
        # Beyond the end, keys, decays and strengths are 0: the state is left as it is.
        is_token = start + t < count
        token = first + start + t
        has_key = is_token[:, None] & (i < DK)[None, :]
        has_value = is_token[:, None] & (j < DV)[None, :]
        keys_at = qkv + token[:, None] * stride + key_head * DK + i[None, :]
        # As they are stored: products of these are exact, and the lengths are divided by behind them.
        k = tl.load(keys_at + K * DK, mask=has_key, other=0.0)
        values_at = qkv + token[:, None] * stride + 2 * K * DK + head * DV + j[None, :]
        v = tl.load(values_at, mask=has_value, other=0.0).to(tl.float32)
        g, b = read_gates(gates + token * gate_stride + head, rate, shift, is_token, H)
        per_k = tl.rsqrt(tl.sum(k.to(tl.float32) * k.to(tl.float32), 1) + 1e-6)
        sums = tl.cumsum(g, 0)
        # D and A transposed, so that a row of A is a column.
        decays = tl.exp(tl.where(t[:, None] <= t[None, :], sums[None, :] - sums[:, None], float("-inf")))
        decays *= per_k[:, None]
        products = tl.dot(k, tl.trans(k), input_precision="ieee") * decays * (b * per_k)[None, :]
        products = tl.where(t[:, None] < t[None, :], products, 0.0)
        inverse = tl.where(t[:, None] == t[None, :], 1.0, 0.0)
        for r in range(1, C):
            row = tl.sum(tl.where((t == r)[None, :], products, 0.0), 1)
            inverse -= tl.where((t == r)[:, None], tl.sum(row[:, None] * inverse, 0)[None, :], 0.0)
        grown = tl.exp(sums)
        errors = b[:, None] * (v - (grown * per_k)[:, None] * _twice(k, state))
        values = tl.dot(inverse, errors, input_precision="tf32x3")
        # Only here: the registers are full.
        q = tl.load(keys_at, mask=has_key, other=0.0)
        per_q = tl.rsqrt(tl.sum(q.to(tl.float32) * q.to(tl.float32), 1) + 1e-6) * scale
        scores = tl.dot(k, tl.trans(q), input_precision="ieee") * decays * per_q[None, :]
        result = (grown * per_q)[:, None] * _twice(q, state)
        result += tl.dot(tl.trans(scores), values, input_precision="tf32x3")
        out_at = out + token[:, None] * (H * DV) + head * DV + j[None, :]
        tl.store(out_at, result.to(out.dtype.element_ty), mask=has_value)
        last = tl.sum(g, 0)
        values *= (tl.exp(last - sums) * per_k)[:, None]
        state = tl.exp(last) * state + _twice(tl.trans(k), values)
    tl.store(state_at, state, mask=inside)


@gated_delta.launcher
def _launch(
    qkv: torch.Tensor, gates: torch.Tensor, rule: DeltaRule, states: torch.Tensor, drafted: torch.Tensor, batch: Batch
) -> torch.Tensor:
    _, num_heads, key_dim, value_dim = states.shape
    num_key_heads = (qkv.shape[1] - num_heads * value_dim) // (2 * key_dim)
    out = torch.empty((len(qkv), num_heads * value_dim), dtype=qkv.dtype, device=qkv.device)
    block_k, block_v = state_tile(key_dim, value_dim)
    grid = num_heads, cdiv(value_dim, block_v)
    shared: dict[str, Any] = {
        "qkv": qkv, "gates": gates, "states": states, "out": out,
        "stride": qkv.stride(0), "gate_stride": gates.stride(0), "slot_stride": states.stride(0),
        "scale": key_dim**-0.5, "H": num_heads, "K": num_key_heads, "DK": key_dim, "DV": value_dim, "TILED": rule.tiled,
        "BLOCK_K": block_k, "BLOCK_V": block_v,
    }  # fmt: skip
    generating = batch.num_decodes + batch.num_drafting
    prompts = len(batch.context_lens) - generating
    if generating:
        kept: dict[str, Any] = {"drafted": drafted, "drafted_stride": drafted.stride(0)}
        launch(_recurrence_kernel, (generating, *grid), batch, rule, DRAFTS=batch.num_drafting > 0, **kept, **shared)
    if prompts:
        chunk = min(rule.chunk_tokens, KERNEL_TOKENS)
        launch(_chunk_kernel, (prompts, *grid), batch, rule, first_sequence=generating, C=chunk, **shared)
    return out


@gated_delta.cases("grouped", "tiled")
def _cases(check: Run, make: Make, order: str) -> None:
    for num_heads, num_key_heads, key_dim, value_dim in ((4, 2, 16, 8), (1, 1, 24, 20)):
        batch, num_slots = with_states([(1, 5), (1, 1), (3, 7), (2, 9), (21, 30)], make, num_drafting=2)
        num_tokens = len(batch.positions)
        check(
            make(num_tokens, 2 * num_key_heads * key_dim + num_heads * value_dim),
            make(num_tokens, 2 * num_heads),
            random_rule(make, num_heads, tiled=order == "tiled"),
            make(num_slots, num_heads, key_dim, value_dim, dtype=torch.float32),
            make(num_slots, 4, 2 * num_heads),
            batch,
        )


def random_rule(make: Make, num_heads: int, *, tiled: bool = False) -> DeltaRule:
    """Return the constants of a layer at random."""
    decay = -make(num_heads, dtype=torch.float32).exp() / 8
    return DeltaRule(decay, make(num_heads, dtype=torch.float32), tiled, KERNEL_TOKENS)


@gated_delta.launches()
def _launches(run: Run, make: Make) -> None:
    for batch in steps_of_states(make):
        for num_heads in (16, 48):
            run(
                make(len(batch.positions), 2 * 16 * 128 + num_heads * 128),
                make(len(batch.positions), 2 * num_heads),
                random_rule(make, num_heads),
                make(8, num_heads, 128, 128, dtype=torch.float32),
                make(8, 8, 2 * num_heads),
                batch,
            )
