"""State of a decode step on the device, such that launching the step again is the next step.

Rows that have ended do not change, and publish their last token again. They are computed again, with states of layers
that move on; what they write goes where rows without a sequence write.
"""

import dataclasses
from collections.abc import Callable
from typing import Final

import torch

MAX_STOPS: Final = 8
"""Most stop tokens of a row."""


@dataclasses.dataclass(frozen=True, slots=True)
class DecodeState:
    """State of B rows, on the device but for two arrays that the host reads. All int32 but for the slots."""

    token_ids: torch.Tensor
    """``[B]``; a negative id, -1 - i, stands for ``last[i]``."""
    positions: torch.Tensor
    """``[B]``"""
    slot_mappings: torch.Tensor
    """``[G, B]`` int64: slot of the token's key and value, in the pages of each table."""
    padding_slots: torch.Tensor
    """``[G]`` int64: slot in the pages of each table for rows that have ended."""
    context_lens: torch.Tensor
    """``[B]``: tokens in the cache, this step's included."""
    counters: torch.Tensor
    """``[B]``: number of tokens that the row has generated."""
    ended: torch.Tensor
    """``[B]``: not 0 where the row has ended."""
    page_tables: torch.Tensor
    """``[G, B, P]``"""
    stops: torch.Tensor
    """``[B, MAX_STOPS]``: padded with -1, which a row without finite logits samples."""
    last: torch.Tensor
    """``[R]``, R at least B: tokens of the previous step."""
    place: torch.Tensor
    """``[1]``: next row of ``published``."""
    published: torch.Tensor
    """``[N, R]`` in pinned memory: the tokens of each step. A row that has ended repeats its last token."""
    all_ended: torch.Tensor
    """``[1]`` in pinned memory: 1 once all rows have ended, else 0."""


def like(num_rows: int, num_pages: int, most: int, make: Callable[..., torch.Tensor]) -> DecodeState:
    """Return the state of rows of a step of up to ``most`` rows, in tensors by ``make(*shape, dtype=...)``."""
    i32 = torch.int32
    return DecodeState(
        token_ids=make(num_rows, dtype=i32),
        positions=make(num_rows, dtype=i32),
        slot_mappings=make(1, num_rows, dtype=torch.int64),
        padding_slots=make(1, dtype=torch.int64),
        context_lens=make(num_rows, dtype=i32),
        counters=make(num_rows, dtype=i32),
        ended=make(num_rows, dtype=i32),
        page_tables=make(1, num_rows, num_pages, dtype=i32),
        stops=make(num_rows, MAX_STOPS, dtype=i32),
        last=make(most, dtype=i32),
        place=make(1, dtype=i32),
        published=make(2, most, dtype=i32),
        all_ended=make(1, dtype=i32),
    )
