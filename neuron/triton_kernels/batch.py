"""Arguments of attention: a step's rows, built once and read by all layers; a layer's cache and its parameters.

KV slots and pages, no requests.
"""

import dataclasses
from typing import NamedTuple

import torch


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionPart:
    """Run of rows for one call of scaled_dot_product_attention."""

    start: int
    stop: int
    num_sequences: int
    pages: torch.Tensor
    """``[num_sequences * P]`` int32: pages to gather."""
    num_tokens: int
    """S: number of tokens of each sequence's gathered pages to use."""
    mask: torch.Tensor | None
    """Mask of attended tokens: ``[B, 1, 1, S]`` for decodes, ``[T, S]`` for a prompt's chunk; None: all, or causal."""
    decodes: bool
    window_mask: torch.Tensor | None = None
    """Mask of layers with a window, where the sequences are longer than the window."""


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """Step of B sequences with T query tokens, sequences with one query token (decodes) first, longest first.

    Behind them are sequences with draft tokens, then prompts. Of the layers with one page table.
    """

    positions: torch.Tensor
    """``[T]`` int32: each token's position in its sequence."""
    slot_mapping: torch.Tensor
    """``[T]`` int64: slot of each token's key and value, ``page * page_size + offset``."""
    cu_seqlens: torch.Tensor
    """``[B + 1]`` int32: sequence b owns the rows from ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``."""
    page_table: torch.Tensor
    """``[B, P]`` int32: the pages of each sequence in order; page 0, which is always zero, where it has none: at the
    end, and behind a window."""
    context_lens: torch.Tensor
    """``[B]`` int32: tokens in the cache, this step's included."""
    parts: tuple[AttentionPart, ...] = ()
    """Parts of the step, for the eager reference only."""
    num_decodes: int = 0
    """Number of leading sequences with one query token; all may be treated as prompts."""
    num_drafting: int = 0
    """Number of sequences with draft tokens behind their first one: no state advances by these."""
    state_slots: torch.Tensor | None = None
    """``[B]`` int32: slot of each sequence's state, where layers keep one. Rows without a sequence share slot 0."""
    replays: torch.Tensor | None = None
    """``[B]`` int32: number of draft tokens of the step before, accepted since, by which to advance each state first.
    None: there are none."""


class PagedCache(NamedTuple):
    """Paged keys and values of a layer, ``[P, page_size, K, D]`` each: as they are, or codes of one byte."""

    keys: torch.Tensor
    values: torch.Tensor
    key_scales: torch.Tensor | None = None
    """Float32 scales ``[P, K, page_size]`` of codes."""
    value_scales: torch.Tensor | None = None


class AttentionParameters(NamedTuple):
    """Parameters of a layer's attention."""

    scale: float
    """Factor of ``q . k``."""
    window: int = 0
    """Number of last tokens that a token attends to, itself the last; 0: all."""
    soft_cap: float = 0.0
    """c where scores are ``c tanh(score / c)``; 0: not so."""
    qk_norm: torch.Tensor | None = None
    """``[H + K, D]``: weights by which each query and key head is normalised before it is rotated, if it is."""
    eps: float = 0.0
    """Epsilon of that norm."""
