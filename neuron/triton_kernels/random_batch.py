"""Random steps of sequences on scattered pages, for checks and benches; needs no Triton."""

from typing import Final

import numpy as np
import torch

from neuron.triton_kernels.batch import Batch

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
