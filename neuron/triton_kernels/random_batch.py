"""Random steps of sequences on scattered pages, for checks and benches; needs no Triton."""

import dataclasses
from collections.abc import Iterator
from typing import Final

import numpy as np
import torch

from neuron.triton_kernels.batch import Batch
from neuron.triton_kernels.operation import Make

PAGE: Final = 16


def random_batch(lengths: list[tuple[int, int]], device: torch.device) -> tuple[Batch, int]:
    """Return a step of sequences of (query, context) tokens on scattered pages, and the number of its pages."""
    num_pages = [-(-context // PAGE) for _, context in lengths]
    order = np.random.default_rng(len(lengths)).permutation(np.arange(1, sum(num_pages) + 1)).astype(np.int32)
    table = np.zeros((len(lengths), max(num_pages)), np.int32)
    positions, slot_mapping = [], []
    for index, end in enumerate(np.cumsum(num_pages)):
        table[index, : num_pages[index]] = order[end - num_pages[index] : end]
        query, context = lengths[index]
        own = np.arange(context - query, context)
        positions.append(own)
        slot_mapping.append(table[index, own // PAGE].astype(np.int64) * PAGE + own % PAGE)
    batch = Batch(
        positions=torch.from_numpy(np.concatenate(positions).astype(np.int32)).to(device),
        slot_mapping=torch.from_numpy(np.concatenate(slot_mapping)).to(device),
        cu_seqlens=torch.tensor([0, *np.cumsum([query for query, _ in lengths])], dtype=torch.int32, device=device),
        page_table=torch.from_numpy(table).to(device),
        context_lens=torch.tensor([context for _, context in lengths], dtype=torch.int32, device=device),
    )
    return batch, sum(num_pages) + 1


def with_states(lengths: list[tuple[int, int]], make: Make, *, num_drafting: int = 0) -> tuple[Batch, int]:
    """Return a step as of :func:`random_batch`, decodes first, in scattered slots, and the number of its slots.

    With draft tokens behind the decodes, 0, 1 or 2 of earlier steps were accepted of each sequence but prompts.
    """
    batch, _ = random_batch(lengths, make.device)
    num_slots = 2 * len(lengths) + 1
    slots = np.random.default_rng(len(lengths)).permutation(np.arange(1, num_slots))[: len(lengths)]
    num_decodes = sum(query == 1 for query, _ in lengths)
    on_device = torch.from_numpy(slots.astype(np.int32)).to(make.device)
    batch = dataclasses.replace(batch, num_decodes=num_decodes, state_slots=on_device)
    if num_drafting:
        replays = [(index + 1) % 3 if index < num_decodes + num_drafting else 0 for index in range(len(lengths))]
        on_device = torch.tensor(replays, dtype=torch.int32, device=make.device)
        batch = dataclasses.replace(batch, num_drafting=num_drafting, replays=on_device)
    return batch, num_slots


def steps_of_states(make: Make) -> Iterator[Batch]:
    """Yield shapes of steps of decodes alone, of a prompt beside them, and of draft tokens beside both."""
    for num_tokens, num_decodes, sequences, num_drafting in ((64, 64, 64, 0), (512, 4, 5, 0), (512, 4, 7, 2)):
        yield Batch(
            positions=make.integers(num_tokens),
            slot_mapping=make.integers(num_tokens, dtype=torch.int64),
            cu_seqlens=make.integers(sequences + 1),
            page_table=make.integers(sequences, 128),
            context_lens=make.integers(sequences),
            num_decodes=num_decodes,
            num_drafting=num_drafting,
            state_slots=make.integers(sequences),
            replays=make.integers(sequences) if num_drafting else None,
        )
