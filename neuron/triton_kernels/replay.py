"""Replay of accepted draft tokens: the gated delta rule's states, advanced by tokens whose inputs a step has kept.

A step that verifies draft tokens leaves each state behind the first token of its sequence, which is certain. It keeps
the inputs of the drafts: those of the convolution, and the gates. How many are accepted is known when the next step
begins; it advances the states by these first, token by token, as if they had never been drafts.
"""

import torch

from neuron.triton_kernels._triton import tl, triton
from neuron.triton_kernels.batch import Batch
from neuron.triton_kernels.causal_convolution import convolved
from neuron.triton_kernels.gated_delta import (
    DeltaRule,
    advanced,
    random_rule,
    read_gates,
    recurrence,
    state_tile,
    tokens_of,
)
from neuron.triton_kernels.launch import cdiv, launch
from neuron.triton_kernels.operation import Make, Operation, Run
from neuron.triton_kernels.random_batch import steps_of_states, with_states


@Operation
def replay_drafts(
    inputs: torch.Tensor,
    weight: torch.Tensor,
    drafted: torch.Tensor,
    rule: DeltaRule,
    states: torch.Tensor,
    batch: Batch,
) -> None:
    """Advance ``states`` by the first ``batch.replays`` draft tokens of each sequence, if there are any.

    ``inputs`` ``[slots, W - 1 + drafts, C]`` and ``weight`` ``[C, W]`` are those of
    :mod:`~neuron.triton_kernels.causal_convolution`, all others of :mod:`~neuron.triton_kernels.gated_delta`.
    """
    assert batch.state_slots is not None
    assert batch.replays is not None
    for slot, count in zip(batch.state_slots.tolist(), batch.replays.tolist(), strict=True):
        if not count:
            continue
        qkv = convolved(inputs[slot, : weight.shape[1] - 1 + count], weight)
        tokens = tokens_of(qkv.float(), drafted[slot, :count].float(), rule, states.shape)
        state = states[slot : slot + 1]
        for t in range(count):
            _, state = recurrence(tokens.part(t), state)
        states[slot] = state[0]


@triton.jit
def _convolved(at, weight, channel, inside, C: tl.constexpr, W: tl.constexpr):
    """Return the convolution of ``channel`` over W rows from ``at``, rounded as it is stored elsewhere."""
    total = tl.load(at + (W - 1) * C + channel, mask=inside, other=0.0).to(tl.float32)
    total *= tl.load(weight + channel * W + (W - 1), mask=inside, other=0.0).to(tl.float32)
    for j in tl.static_range(W - 1):
        factor = tl.load(weight + channel * W + j, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(at + j * C + channel, mask=inside, other=0.0).to(tl.float32) * factor
    return (total / (1.0 + tl.exp(-total))).to(at.dtype.element_ty).to(tl.float32)


@triton.jit
def _replay_kernel(
    inputs, weight, drafted, decay, bias, states, state_slots, replays, input_stride, drafted_stride, slot_stride,
    H: tl.constexpr, K: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, W: tl.constexpr, TILED: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    sequence, head = tl.program_id(0), tl.program_id(1)
    C: tl.constexpr = 2 * K * DK + H * DV
    key_head = head % K if TILED else head // (H // K)
    i, j = tl.arange(0, BLOCK_K), tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    slot = tl.load(state_slots + sequence).to(tl.int64)
    state_at = states + slot * slot_stride + head * (DK * DV) + i[:, None] * DV + j[None, :]
    inside = (i < DK)[:, None] & (j < DV)[None, :]
    rate, shift = tl.load(decay + head), tl.load(bias + head)
    count = tl.load(replays + sequence)
    state = tl.load(state_at, mask=inside & (count > 0), other=0.0)
    for t in range(count):
        at = inputs + slot * input_stride + t * C
        k = _convolved(at, weight, (K + key_head) * DK + i, i < DK, C, W)
        v = _convolved(at, weight, 2 * K * DK + head * DV + j, j < DV, C, W)
        g, b = read_gates(drafted + slot * drafted_stride + t * (2 * H) + head, rate, shift, True, H)
        state = advanced(state, k, v, g, b)
    tl.store(state_at, state, mask=inside & (count > 0))


@replay_drafts.launcher
def _launch(
    inputs: torch.Tensor,
    weight: torch.Tensor,
    drafted: torch.Tensor,
    rule: DeltaRule,
    states: torch.Tensor,
    batch: Batch,
) -> None:
    _, num_heads, key_dim, value_dim = states.shape
    num_channels, width = weight.shape
    block_k, block_v = state_tile(key_dim, value_dim)
    launch(
        _replay_kernel,
        (len(batch.context_lens), num_heads, cdiv(value_dim, block_v)),
        batch,
        rule,
        inputs=inputs, weight=weight, drafted=drafted, states=states,
        input_stride=inputs.stride(0), drafted_stride=drafted.stride(0), slot_stride=states.stride(0),
        H=num_heads, K=(num_channels - num_heads * value_dim) // (2 * key_dim), DK=key_dim, DV=value_dim, W=width,
        TILED=rule.tiled, BLOCK_K=block_k, BLOCK_V=block_v,
    )  # fmt: skip


@replay_drafts.cases("grouped", "tiled")
def _cases(check: Run, make: Make, order: str) -> None:
    for num_heads, num_key_heads, key_dim, value_dim, width in ((4, 2, 16, 8, 4), (1, 1, 24, 20, 3)):
        batch, num_slots = with_states([(1, 5), (1, 9), (3, 7), (2, 9), (21, 30)], make, num_drafting=2)
        num_channels = 2 * num_key_heads * key_dim + num_heads * value_dim
        check(
            make(num_slots, width + 3, num_channels),
            make(num_channels, width),
            make(num_slots, 4, 2 * num_heads),
            random_rule(make, num_heads, tiled=order == "tiled"),
            make(num_slots, num_heads, key_dim, value_dim, dtype=torch.float32),
            batch,
        )


@replay_drafts.launches()
def _launches(run: Run, make: Make) -> None:
    for batch in steps_of_states(make):
        if batch.replays is None:
            continue
        for num_heads in (16, 48):
            num_channels = 2 * 16 * 128 + num_heads * 128
            run(
                make(8, 11, num_channels),
                make(num_channels, 4),
                make(8, 8, 2 * num_heads),
                random_rule(make, num_heads),
                make(8, num_heads, 128, 128, dtype=torch.float32),
                batch,
            )
