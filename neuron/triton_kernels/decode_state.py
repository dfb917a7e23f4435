"""A step of decodes as it lies on the device, so that launching it again is the next step.

It knows numbers and places, not requests. Of rows that have ended nothing changes any more: they compute the same
again, and write it to the same place.
"""

import dataclasses
from collections.abc import Callable
from typing import Final

import torch

MAX_STOPS: Final = 8
"""Tokens of a row that end it."""


@dataclasses.dataclass(frozen=True, slots=True)
class DecodeState:
    """B rows, on the device but for the two that the host reads. All int32 but for ``slot_mapping``."""

    token_ids: torch.Tensor
    """``[B]``. A negative one, -1 - i, is ``last[i]``."""
    positions: torch.Tensor
    """``[B]``"""
    slot_mapping: torch.Tensor
    """``[B]`` int64: where the token's key and value go."""
    context_lens: torch.Tensor
    """``[B]``: tokens in the cache once this step's are written."""
    counters: torch.Tensor
    """``[B]``: tokens the row has generated."""
    ended: torch.Tensor
    """``[B]``: not 0 where nothing more is wanted."""
    page_table: torch.Tensor
    """``[B, P]``"""
    stops: torch.Tensor
    """``[B, MAX_STOPS]``: -1 where there are fewer, which is also what a row without finite logits samples."""
    last: torch.Tensor
    """``[R]``, R at least B: what the step before sampled."""
    place: torch.Tensor
    """``[1]``: the row of ``published`` that is next."""
    published: torch.Tensor
    """``[N, R]`` in pinned memory: the tokens of each step. A row that has ended repeats its last token."""
    all_ended: torch.Tensor
    """``[1]`` in pinned memory: 1 once no row is left, else 0."""


def like(num_rows: int, num_pages: int, most: int, make: Callable[..., torch.Tensor]) -> DecodeState:
    """Return rows of what ``make(*shape, dtype=...)`` returns, of a step that may have ``most``."""
    i32 = torch.int32
    return DecodeState(
        token_ids=make(num_rows, dtype=i32),
        positions=make(num_rows, dtype=i32),
        slot_mapping=make(num_rows, dtype=torch.int64),
        context_lens=make(num_rows, dtype=i32),
        counters=make(num_rows, dtype=i32),
        ended=make(num_rows, dtype=i32),
        page_table=make(num_rows, num_pages, dtype=i32),
        stops=make(num_rows, MAX_STOPS, dtype=i32),
        last=make(most, dtype=i32),
        place=make(1, dtype=i32),
        published=make(2, most, dtype=i32),
        all_ended=make(1, dtype=i32),
    )
