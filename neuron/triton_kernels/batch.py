"""How the rows of one step lie in memory: what every attention kernel is told.

Made once a step and read by all layers. It knows KV slots and pages, not requests.
"""

import dataclasses

import torch


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionPart:
    """A run of rows that one call of scaled_dot_product_attention serves."""

    start: int
    stop: int
    num_sequences: int
    pages: torch.Tensor
    """``[num_sequences * P]`` int32: what to gather."""
    num_tokens: int
    """S: how much of each sequence's gathered pages to use."""
    mask: torch.Tensor | None
    """What a row may see: ``[B, 1, 1, S]`` for decodes, ``[T, S]`` for a prompt's chunk; ``None`` is all, or causal."""
    decodes: bool
    window_mask: torch.Tensor | None = None
    """The same in layers with a window, where the sequences are longer than it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """One step of B sequences with T query tokens, sequences with one query token (decodes) first, longest first."""

    positions: torch.Tensor
    """``[T]`` int32: each token's position in its sequence."""
    slot_mapping: torch.Tensor
    """``[T]`` int64: where each token's key and value go, ``page * page_size + offset``."""
    cu_seqlens: torch.Tensor
    """``[B + 1]`` int32: sequence b owns the rows from ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``."""
    page_table: torch.Tensor
    """``[B, P]`` int32: the pages of each sequence in order, padded with page 0, which is always zero."""
    context_lens: torch.Tensor
    """``[B]`` int32: tokens in the cache once this step's are written."""
    parts: tuple[AttentionPart, ...] = ()
    """The same as views, for the eager reference only."""
    num_decodes: int = 0
    """How many of the first sequences have one query token; all may be treated as prompts."""
