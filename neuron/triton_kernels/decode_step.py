"""Begin and end of a captured decode step, one program each, so that its graph can be launched again.

    begin:  token[b] = last[-1 - token[b]]  where token[b] < 0
    end:    published[place, b] = last[b] = ended[b] ? last[b] : ids[b];  ended[b] |= last[b] in stops[b];  place += 1
            where not ended[b]:  token[b] = last[b];  position, context and counter += 1;  slots of the position
            where ended[b]:  padding slots
            all_ended = all(ended)

Results go to pinned host memory, and the host waits for the words that it reads: each token is a word of its own, so
their order does not matter. These stores write through the device's cache (``.wt``): any other store is sure to be
visible only when all queued work is done. A page beyond the table is of a step that is never launched, and read as 0.
"""

import numpy as np
import torch

from neuron.triton_kernels import decode_state
from neuron.triton_kernels._triton import tl, triton
from neuron.triton_kernels.decode_state import MAX_STOPS, DecodeState
from neuron.triton_kernels.launch import launch, power_of_two
from neuron.triton_kernels.operation import Make, Operation, Run

MIN_BLOCK = 128
"""Least block of rows: one binary serves all batches up to it."""


@Operation
def begin_step(state: DecodeState) -> None:
    """Replace negative tokens, which name rows of the step before, by their sampled ids."""
    # A row that was not finite has no token; its sequence fails when it is settled.
    known = state.last[(-1 - state.token_ids).clamp(min=0)].clamp(min=0)
    state.token_ids.copy_(torch.where(state.token_ids < 0, known, state.token_ids))


@triton.jit(do_not_specialize=["B"])
def _begin_kernel(token_ids, last, B, BLOCK: tl.constexpr):
    row = tl.arange(0, BLOCK)
    inside = row < B
    token = tl.load(token_ids + row, mask=inside, other=0)
    unknown = inside & (token < 0)
    known = tl.load(last + tl.where(unknown, -1 - token, 0), mask=unknown, other=0)
    # A row that was not finite has no token; its sequence fails when it is settled.
    tl.store(token_ids + row, tl.maximum(known, 0), mask=unknown)


@begin_step.launcher
def _launch_begin(state: DecodeState) -> None:
    num_rows = len(state.token_ids)
    launch(_begin_kernel, (1,), state, B=num_rows, BLOCK=max(MIN_BLOCK, power_of_two(num_rows)))


@Operation
def end_step(state: DecodeState, ids: torch.Tensor, page_tokens: int) -> None:
    """Publish ``ids`` int32 ``[B]`` and advance each row that has not ended."""
    num_rows = len(ids)
    ended = state.ended != 0
    tokens = torch.where(ended, state.last[:num_rows], ids)
    state.last[:num_rows] = tokens
    place = int(state.place)
    state.published[place, :num_rows] = tokens.to(state.published.device)
    state.place.add_(1)
    ended = ended | (tokens[:, None] == state.stops).any(1)
    state.ended.copy_(ended)
    state.all_ended.fill_(int(ended.all()))
    state.token_ids.copy_(torch.where(ended, state.token_ids, tokens))
    for moved in (state.positions, state.context_lens, state.counters):
        moved += ~ended
    page = state.positions // page_tokens
    inside = page < state.page_tables.shape[2]
    first = state.page_tables[:, torch.arange(num_rows, device=page.device), torch.where(inside, page, 0).long()]
    slots = torch.where(inside, first, 0).long() * page_tokens + state.positions % page_tokens
    state.slot_mappings.copy_(torch.where(ended, state.padding_slots[:, None], slots))


@triton.jit(do_not_specialize=["B", "G", "columns", "row_stride", "table_stride", "mapping_stride", "published_stride"])
def _end_kernel(
    ids,
    token_ids,
    positions,
    slot_mappings,
    padding_slots,
    context_lens,
    counters,
    ended,
    page_tables,
    stops,
    last,
    place,
    published,
    all_ended,
    B,
    G,
    columns,
    row_stride,
    table_stride,
    mapping_stride,
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
    pages = page_tables + row.to(tl.int64) * row_stride + page
    slots = slot_mappings + row
    for table in tl.range(0, G):
        first = tl.load(pages, mask=on & (page < columns), other=0)
        slot = tl.where(on, first.to(tl.int64) * PAGE + position % PAGE, tl.load(padding_slots + table))
        tl.store(slots, slot, mask=inside)
        pages += table_stride
        slots += mapping_stride
    tl.store(token_ids + row, token, mask=on)
    tl.store(positions + row, position, mask=on)
    tl.store(context_lens + row, tl.load(context_lens + row, mask=on, other=0) + 1, mask=on)
    tl.store(counters + row, tl.load(counters + row, mask=on, other=0) + 1, mask=on)


@end_step.launcher
def _launch_end(state: DecodeState, ids: torch.Tensor, page_tokens: int) -> None:
    num_tables, num_rows, columns = state.page_tables.shape
    launch(
        _end_kernel,
        (1,),
        state,
        ids=ids,
        B=num_rows,
        G=num_tables,
        columns=columns,
        row_stride=state.page_tables.stride(1),
        table_stride=state.page_tables.stride(0),
        mapping_stride=state.slot_mappings.stride(0),
        published_stride=state.published.stride(0),
        BLOCK=max(MIN_BLOCK, power_of_two(num_rows)),
        NUM_STOPS=MAX_STOPS,
        PAGE=page_tokens,
    )


def _random_state(num_rows: int, device: torch.device, *, num_pages: int = 3, page_tokens: int = 4) -> DecodeState:
    """Return rows in the middle of a multi-step decode; their outputs hold junk."""
    generator = np.random.default_rng(num_rows)

    def whole(*shape: int, low: int = 0, high: int = 50, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.from_numpy(generator.integers(low, high, shape)).to(device, dtype)

    positions = whole(num_rows, high=num_pages * page_tokens)
    return DecodeState(
        token_ids=whole(num_rows, low=-num_rows, high=50),
        positions=positions,
        slot_mappings=whole(2, num_rows, dtype=torch.int64),
        padding_slots=whole(2, low=90, high=99, dtype=torch.int64),
        context_lens=positions + 1,
        counters=whole(num_rows),
        ended=whole(num_rows, high=4) // 3,
        page_tables=whole(2, num_rows, num_pages, high=99),
        stops=torch.where(whole(num_rows, MAX_STOPS, high=3) == 0, whole(num_rows, MAX_STOPS, high=9), -1),
        last=whole(num_rows + 3, low=-1, high=9),
        place=torch.ones(1, dtype=torch.int32, device=device),
        published=torch.full((7, num_rows + 3), -7, dtype=torch.int32, device=device),
        all_ended=torch.full((1,), -7, dtype=torch.int32, device=device),
    )


@begin_step.cases(dtypes=(torch.float32,))
def _begin_cases(check: Run, make: Make) -> None:
    for num_rows in (1, 5, 130):
        check(_random_state(num_rows, make.device))


@end_step.cases(dtypes=(torch.float32,))
def _end_cases(check: Run, make: Make) -> None:
    """Run steps until all rows have ended."""
    for num_rows in (1, 5, 130):
        state = _random_state(num_rows, make.device)
        for seed in range(5):
            ids = np.random.default_rng(seed).integers(-1 if seed > 2 else 0, 9, num_rows)
            if seed == 4:
                ids[:] = -1
            begin_step.eager(state)
            check(state, torch.from_numpy(ids).to(make.device, torch.int32), 4)


@begin_step.launches()
def _begin_launches(run: Run, make: Make) -> None:
    for num_rows in (64, 256):
        run(decode_state.like(num_rows, 128, num_rows, make.integers))


@end_step.launches()
def _end_launches(run: Run, make: Make) -> None:
    for num_rows in (64, 256):
        state = decode_state.like(num_rows, 128, num_rows, make.integers)
        run(state, state.last, 16)
