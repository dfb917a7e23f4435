"""Causal convolution of each channel over the tokens of a sequence, and SiLU: a recurrent layer's view of neighbours.

``y_t = silu(sum_j w_j x_(t - W + 1 + j))`` with a width of W tokens. A sequence's last W - 1 inputs are kept, zeros
before its first token. Of a sequence with draft tokens those of its first token are kept, and behind them the drafts':
with n of these accepted, the next step finds its last inputs n further. Sums and SiLU are in float32.

A kernel computes blocks of tokens, which read old inputs that the next kernel replaces. Of decodes alone, this kernel
does both.
"""

from typing import Final

import torch
from torch.nn import functional

from neuron.triton_kernels._triton import tl, triton
from neuron.triton_kernels.batch import Batch
from neuron.triton_kernels.launch import cdiv, launch
from neuron.triton_kernels.operation import Make, Operation, Run
from neuron.triton_kernels.prefill_attention import find_block
from neuron.triton_kernels.random_batch import steps_of_states, with_states

BLOCK_TOKENS: Final = 16
BLOCK_CHANNELS: Final = 128


@Operation
def causal_convolution(x: torch.Tensor, weight: torch.Tensor, inputs: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return ``y`` ``[T, C]`` of ``x`` ``[T, C]`` and ``weight`` ``[C, W]``.

    ``inputs`` ``[slots, W - 1 + drafts, C]`` keeps the last inputs of each sequence, oldest first, and is updated in
    place.
    """
    assert batch.state_slots is not None
    slots, kept = batch.state_slots.long(), weight.shape[1] - 1
    decodes, rows = batch.num_decodes, batch.cu_seqlens.tolist()
    skipped = torch.zeros_like(slots) if batch.replays is None else batch.replays.long()
    places = skipped[:, None] + torch.arange(kept, device=slots.device)
    before = inputs[slots[:, None], places]
    seen = torch.cat((before[:decodes], x[:decodes, None]), dim=1)
    inputs[slots[:decodes], :kept] = seen[:, 1:]
    parts = [convolved(seen, weight)[:, 0]]
    for index in range(decodes, len(slots)):
        seen = torch.cat((before[index], x[rows[index] : rows[index + 1]]))
        drafts = index < decodes + batch.num_drafting
        last = seen[1:] if drafts else seen[len(seen) - kept :]
        inputs[slots[index], : len(last)] = last
        parts.append(convolved(seen, weight))
    return torch.cat(parts)


def convolved(seen: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return ``[..., N, C]`` of ``[..., W - 1 + N, C]``."""
    width = weight.shape[1]
    count = seen.shape[-2] - width + 1
    total = sum(seen[..., j : j + count, :].float() * weight[:, j].float() for j in range(width))
    assert isinstance(total, torch.Tensor)
    return functional.silu(total).to(seen.dtype)


@triton.jit(do_not_specialize=["num_sequences"])
def _convolution_kernel(
    x, weight, inputs, out, cu_seqlens, state_slots, replays, num_sequences, x_stride, slot_stride,
    C: tl.constexpr, W: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    sequence, block = find_block(cu_seqlens, 0, num_sequences, tl.program_id(0), BLOCK_T)
    first = tl.load(cu_seqlens + sequence).to(tl.int64)
    count = tl.load(cu_seqlens + sequence + 1) - first
    kept = inputs + tl.load(state_slots + sequence).to(tl.int64) * slot_stride
    if replays is not None:
        kept += tl.load(replays + sequence) * C
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (t < count)[:, None] & (c < C)[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for j in tl.static_range(W):
        at = (t - (W - 1) + j)[:, None]
        old = tl.load(kept + (at + (W - 1)) * C + c[None, :], mask=inside & (at < 0), other=0.0)
        new = tl.load(x + (first + at) * x_stride + c[None, :], mask=inside & (at >= 0), other=0.0)
        factor = tl.load(weight + c * W + j, mask=c < C, other=0.0).to(tl.float32)
        total += tl.where(at < 0, old, new).to(tl.float32) * factor[None, :]
    result = total / (1.0 + tl.exp(-total))
    tl.store(out + (first + t)[:, None] * C + c[None, :], result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_decodes", "num_drafting"])
def _inputs_kernel(
    x, weight, inputs, out, cu_seqlens, state_slots, replays, num_decodes, num_drafting, x_stride, slot_stride,
    C: tl.constexpr, W: tl.constexpr, DECODES: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0)
    first = tl.load(cu_seqlens + sequence).to(tl.int64)
    count = tl.load(cu_seqlens + sequence + 1) - first
    kept = inputs + tl.load(state_slots + sequence).to(tl.int64) * slot_stride
    before = kept
    if replays is not None:
        before += tl.load(replays + sequence) * C
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    if DECODES:
        total = tl.load(x + first * x_stride + c, mask=inside, other=0.0).to(tl.float32)
        total *= tl.load(weight + c * W + (W - 1), mask=inside, other=0.0).to(tl.float32)
        for j in tl.static_range(W - 1):
            factor = tl.load(weight + c * W + j, mask=inside, other=0.0).to(tl.float32)
            total += tl.load(before + j * C + c, mask=inside, other=0.0).to(tl.float32) * factor
        result = total / (1.0 + tl.exp(-total))
        tl.store(out + first * C + c, result.to(out.dtype.element_ty), mask=inside)
    num_drafts = tl.where((sequence >= num_decodes) & (sequence < num_decodes + num_drafting), count - 1, 0)
    # In this order an old input is read before its place is written, by the same thread.
    for j in tl.static_range(W - 1):
        at = count - num_drafts - (W - 1) + j
        old = tl.load(before + (at + (W - 1)) * C + c, mask=inside & (at < 0), other=0.0)
        new = tl.load(x + (first + at) * x_stride + c, mask=inside & (at >= 0), other=0.0)
        tl.store(kept + j * C + c, tl.where(at < 0, old, new), mask=inside)
    if not DECODES:
        for j in range(num_drafts):
            draft = tl.load(x + (first + 1 + j) * x_stride + c, mask=inside, other=0.0)
            tl.store(kept + (W - 1 + j) * C + c, draft, mask=inside)


@causal_convolution.launcher
def _launch(x: torch.Tensor, weight: torch.Tensor, inputs: torch.Tensor, batch: Batch) -> torch.Tensor:
    (num_channels, width), num_sequences = weight.shape, len(batch.context_lens)
    out = torch.empty((len(x), num_channels), dtype=x.dtype, device=x.device)
    blocks, decodes = cdiv(num_channels, BLOCK_CHANNELS), batch.num_decodes == num_sequences
    if not decodes:
        launch(
            _convolution_kernel,
            (len(x) // BLOCK_TOKENS + num_sequences, blocks),
            batch,
            x=x, weight=weight, inputs=inputs, out=out, num_sequences=num_sequences, x_stride=x.stride(0),
            slot_stride=inputs.stride(0), C=num_channels, W=width, BLOCK_T=BLOCK_TOKENS, BLOCK_C=BLOCK_CHANNELS,
        )  # fmt: skip
    launch(
        _inputs_kernel,
        (num_sequences, blocks),
        batch,
        x=x, weight=weight, inputs=inputs, out=out, x_stride=x.stride(0), slot_stride=inputs.stride(0),
        C=num_channels, W=width, DECODES=decodes, BLOCK_C=BLOCK_CHANNELS, num_warps=2,
    )  # fmt: skip
    return out


@causal_convolution.cases()
def _cases(check: Run, make: Make) -> None:
    for lengths, num_drafting in (
        ([(1, 1), (1, 9)], 0),
        ([(1, 5), (2, 2), (17, 40)], 0),
        ([(33, 33)], 0),
        ([(1, 5), (3, 9), (2, 7), (17, 40)], 2),
    ):
        for num_channels, width in ((48, 4), (150, 3)):
            batch, num_slots = with_states(lengths, make, num_drafting=num_drafting)
            inputs = make(num_slots, width + 4, num_channels)[:, : width + 2]
            x = make(len(batch.positions), num_channels + 16)[:, :num_channels]
            check(x, make(num_channels, width), inputs, batch)


@causal_convolution.launches()
def _launches(run: Run, make: Make) -> None:
    for batch in steps_of_states(make):
        for num_channels in (8192, 10240):
            x = make(len(batch.positions), num_channels)
            run(x, make(num_channels, 4), make(8, 11, num_channels), batch)
