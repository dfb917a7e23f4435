"""Sampling parameters of a step's rows, as tensors, for the sampling kernel and its reference."""

import dataclasses
from collections.abc import Callable

import torch


@dataclasses.dataclass(frozen=True, slots=True)
class SamplingRows:
    """Sampling parameters of R rows, on the device; V is the vocabulary. ``None`` is off for all rows."""

    temperature: torch.Tensor
    """``[R]`` float32; 0 is greedy."""
    top_k: torch.Tensor
    """``[R]`` int32; 0 is off."""
    top_p: torch.Tensor
    """``[R]`` float32; 1 is off."""
    min_p: torch.Tensor
    """``[R]`` float32; 0 is off."""
    seeds: torch.Tensor
    """``[R]`` int64"""
    counters: torch.Tensor
    """``[R]`` int32: number of tokens that the row has generated."""
    slots: torch.Tensor | None = None
    """``[R]`` int32: the row's place in the two tables below."""
    penalties: torch.Tensor | None = None
    """``[R, 3]`` float32: repetition, presence, frequency."""
    counts: torch.Tensor | None = None
    """``[slots, V]`` int32: count of each token among the generated; the drawn token is counted."""
    in_prompt: torch.Tensor | None = None
    """``[slots, V]`` bool"""
    bias_tokens: torch.Tensor | None = None
    """``[R, X]`` int32, padded with -1; no token twice."""
    bias_values: torch.Tensor | None = None
    """``[R, X]`` float32"""
    allowed: torch.Tensor | None = None
    """``[R, ceil(V / 32)]`` int32: bit ``v % 32`` of word ``v // 32`` is set where token v is allowed."""


def like(
    num_rows: int, vocab_size: int, num_slots: int, changes: bool, make: Callable[..., torch.Tensor]
) -> SamplingRows:
    """Return rows of tensors by ``make(*shape, dtype=...)``; with ``changes`` also the tables that change logits."""
    f32, i32 = torch.float32, torch.int32
    rows = SamplingRows(
        temperature=make(num_rows, dtype=f32),
        top_k=make(num_rows, dtype=i32),
        top_p=make(num_rows, dtype=f32),
        min_p=make(num_rows, dtype=f32),
        seeds=make(num_rows, dtype=torch.int64),
        counters=make(num_rows, dtype=i32),
    )
    if not changes:
        return rows
    return dataclasses.replace(
        rows,
        slots=make(num_rows, dtype=i32),
        penalties=make(num_rows, 3, dtype=f32),
        counts=make(num_slots, vocab_size, dtype=i32),
        in_prompt=make(num_slots, vocab_size, dtype=torch.bool),
        bias_tokens=make(num_rows, 300, dtype=i32),
        bias_values=make(num_rows, 300, dtype=f32),
        allowed=make(num_rows, -(-vocab_size // 32), dtype=i32),
    )
