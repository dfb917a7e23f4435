"""Begin and end of a captured decode step, one program each, so that its graph can be launched again.

    begin:  token[b] = last[-1 - token[b]]  where token[b] < 0
    end:    published[place, b] = last[b] = ended[b] ? last[b] : ids[b];  ended[b] |= last[b] in stops[b];  place += 1
            where not ended[b]:  token[b] = last[b];  position, context and counter += 1;  slot_mapping of the position
            all_ended = all(ended)

Results go to pinned host memory, and the host waits for the words that it reads: each token is a word of its own, so
their order does not matter. These stores write through the device's cache (``.wt``): any other store is sure to be
visible only when all queued work is done. A page beyond the table is of a step that is never launched, and read as 0.
"""

import torch
import triton
import triton.language as tl

from neuron.triton_kernels.decode_state import MAX_STOPS, DecodeState
from neuron.triton_kernels.launch import Argument, launch, power_of_two

MIN_BLOCK = 128
"""Least block of rows: one binary serves all batches up to it."""


@triton.jit(do_not_specialize=["B"])
def _begin_kernel(token_ids, last, B, BLOCK: tl.constexpr):
    row = tl.arange(0, BLOCK)
    inside = row < B
    token = tl.load(token_ids + row, mask=inside, other=0)
    unknown = inside & (token < 0)
    known = tl.load(last + tl.where(unknown, -1 - token, 0), mask=unknown, other=0)
    # A row that was not finite has no token; its sequence fails when it is settled.
    tl.store(token_ids + row, tl.maximum(known, 0), mask=unknown)


@triton.jit(do_not_specialize=["B", "columns", "table_stride", "published_stride"])
def _end_kernel(
    ids,
    token_ids,
    positions,
    slot_mapping,
    context_lens,
    counters,
    ended,
    page_table,
    stops,
    last,
    place,
    published,
    all_ended,
    B,
    columns,
    table_stride,
    published_stride,
    BLOCK: tl.constexpr,
    NUM_STOPS: tl.constexpr,
    PAGE: tl.constexpr,
):
    row = tl.arange(0, BLOCK)
    inside = row < B
    over = tl.load(ended + row, mask=inside, other=1) != 0
    token = tl.load(ids + row, mask=inside, other=0)
    token = tl.where(over, tl.load(last + row, mask=inside, other=0), token)
    at = tl.load(place)
    tl.store(last + row, token, mask=inside)
    tl.store(published + at.to(tl.int64) * published_stride + row, token, mask=inside, cache_modifier=".wt")
    # One thread advances the place, after every thread has read it: a slower warp would read the next.
    tl.debug_barrier()
    tl.store(place, at + 1)
    for i in range(NUM_STOPS):
        over = over | (token == tl.load(stops + row * NUM_STOPS + i, mask=inside, other=-1))
    tl.store(ended + row, over.to(tl.int32), mask=inside)
    left = tl.sum(tl.where(inside & (over == 0), 1, 0), 0)
    tl.store(all_ended, tl.where(left == 0, 1, 0), cache_modifier=".wt")
    on = inside & (over == 0)
    position = tl.load(positions + row, mask=on, other=0) + 1
    page = position // PAGE
    first = tl.load(page_table + row.to(tl.int64) * table_stride + page, mask=on & (page < columns), other=0)
    tl.store(token_ids + row, token, mask=on)
    tl.store(positions + row, position, mask=on)
    tl.store(slot_mapping + row, first.to(tl.int64) * PAGE + position % PAGE, mask=on)
    tl.store(context_lens + row, tl.load(context_lens + row, mask=on, other=0) + 1, mask=on)
    tl.store(counters + row, tl.load(counters + row, mask=on, other=0) + 1, mask=on)


def begin_step(state: DecodeState) -> None:
    """Replace negative tokens, which name rows of the step before, by their sampled ids."""
    num_rows = len(state.token_ids)
    arguments: dict[str, Argument] = {"token_ids": state.token_ids, "last": state.last, "B": num_rows}
    launch(_begin_kernel, (1,), arguments, {"BLOCK": max(MIN_BLOCK, power_of_two(num_rows))})


def end_step(state: DecodeState, ids: torch.Tensor, page_tokens: int) -> None:
    """Publish ``ids`` int32 ``[B]`` and advance each row that has not ended."""
    num_rows, columns = state.page_table.shape
    arguments: dict[str, Argument] = {
        "ids": ids,
        "token_ids": state.token_ids,
        "positions": state.positions,
        "slot_mapping": state.slot_mapping,
        "context_lens": state.context_lens,
        "counters": state.counters,
        "ended": state.ended,
        "page_table": state.page_table,
        "stops": state.stops,
        "last": state.last,
        "place": state.place,
        "published": state.published,
        "all_ended": state.all_ended,
        "B": num_rows,
        "columns": columns,
        "table_stride": state.page_table.stride(0),
        "published_stride": state.published.stride(0),
    }
    constants = {"BLOCK": max(MIN_BLOCK, power_of_two(num_rows)), "NUM_STOPS": MAX_STOPS, "PAGE": page_tokens}
    launch(_end_kernel, (1,), arguments, constants)
