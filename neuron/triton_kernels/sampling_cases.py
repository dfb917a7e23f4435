"""Cases for the kernels after a step's logits: see :mod:`neuron.triton_kernels.cases`."""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch

from neuron.triton_kernels import decode_state, decode_step, sampling, sampling_reference, sampling_rows
from neuron.triton_kernels.decode_state import MAX_STOPS, DecodeState
from neuron.triton_kernels.sampling_rows import SamplingRows

Results = list[tuple[torch.Tensor, torch.Tensor]]


def random_rows(num_rows: int, vocab_size: int, device: torch.device, *, everything: bool) -> SamplingRows:
    """Return rows of different settings; with ``everything`` also penalties, bias and a mask."""
    generator = np.random.default_rng(num_rows)

    def pick(*choices: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor([choices[i % len(choices)] for i in range(num_rows)], dtype=dtype, device=device)

    rows = SamplingRows(
        temperature=pick(0.0, 1.0, 0.7, 1.3, 5.0),
        top_k=pick(0, 0, 5, 1, 40, 0, 3, 300, dtype=torch.int32),
        top_p=pick(1.0, 0.9, 1.0, 0.3, 0.95, 0.0),
        min_p=pick(0.0, 0.0, 0.2, 0.0, 0.05),
        seeds=torch.from_numpy(generator.integers(0, 1 << 62, num_rows)).to(device),
        counters=torch.arange(num_rows, dtype=torch.int32, device=device),
    )
    if not everything:
        return rows
    bias = np.full((num_rows, 7), -1, np.int32)
    for row in range(num_rows):
        bias[row, : row % 8] = generator.choice(vocab_size, row % 8, replace=False)
    words = generator.integers(-(1 << 31), 1 << 31, (num_rows, -(-vocab_size // 32)), dtype=np.int64).astype(np.int32)
    words[::2] = -1
    words[-1] = 0
    return dataclasses.replace(
        rows,
        slots=torch.from_numpy(generator.permutation(num_rows).astype(np.int32)).to(device),
        penalties=torch.from_numpy(generator.uniform((0.5, -1, -1), (2, 1, 1), (num_rows, 3)).astype(np.float32)).to(
            device
        ),
        counts=torch.from_numpy(generator.poisson(0.3, (num_rows, vocab_size)).astype(np.int32)).to(device),
        in_prompt=torch.from_numpy(generator.random((num_rows, vocab_size)) < 0.2).to(device),
        bias_tokens=torch.from_numpy(bias).to(device),
        bias_values=torch.from_numpy(generator.normal(0, 3, bias.shape).astype(np.float32)).to(device),
        allowed=torch.from_numpy(words).to(device),
    )


def sampling_results(device: torch.device) -> Results:
    """Sample rows of all kinds; return the results and the expected ones."""
    results: Results = []
    for num_rows, vocab_size, everything in ((11, 131, False), (13, 131, True), (10, 5000, False), (9, 4999, True)):
        logits = torch.randn(num_rows, vocab_size, device=device) * 3
        logits[num_rows // 2, vocab_size // 2] = torch.nan
        rows = random_rows(num_rows, vocab_size, device, everything=everything)
        twin = dataclasses.replace(rows, counts=None if rows.counts is None else rows.counts.clone())
        before = logits.clone()
        results += zip(sampling.sample_rows(logits, rows), sampling_reference.sample_rows(logits, twin), strict=True)
        results.append((logits, before))
        if rows.counts is not None and twin.counts is not None:
            results.append((rows.counts, twin.counts))
    return results


def random_state(num_rows: int, device: torch.device, *, num_pages: int = 3, page_tokens: int = 4) -> DecodeState:
    """Return rows in the middle of a multi-step decode; their outputs hold junk."""
    generator = np.random.default_rng(num_rows)

    def whole(*shape: int, low: int = 0, high: int = 50, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.from_numpy(generator.integers(low, high, shape)).to(device, dtype)

    positions = whole(num_rows, high=num_pages * page_tokens)
    return DecodeState(
        token_ids=whole(num_rows, low=-num_rows, high=50),
        positions=positions,
        slot_mapping=whole(num_rows, dtype=torch.int64),
        context_lens=positions + 1,
        counters=whole(num_rows),
        ended=whole(num_rows, high=4) // 3,
        page_table=whole(num_rows, num_pages, high=99),
        stops=torch.where(whole(num_rows, MAX_STOPS, high=3) == 0, whole(num_rows, MAX_STOPS, high=9), -1),
        last=whole(num_rows + 3, low=-1, high=9),
        place=torch.ones(1, dtype=torch.int32, device=device),
        published=torch.full((7, num_rows + 3), -7, dtype=torch.int32, device=device),
        all_ended=torch.full((1,), -7, dtype=torch.int32, device=device),
    )


def decode_step_results(device: torch.device) -> Results:
    """Run steps until all rows have ended, and return their results beside the expected ones."""
    results: Results = []
    for num_rows in (1, 5, 130):
        state = random_state(num_rows, device)
        twin = DecodeState(*(getattr(state, field.name).clone() for field in dataclasses.fields(state)))
        for seed in range(5):
            generator = np.random.default_rng(seed)
            ids = torch.from_numpy(generator.integers(-1 if seed > 2 else 0, 9, num_rows)).to(device, torch.int32)
            if seed == 4:
                ids.fill_(-1)
            decode_step.begin_step(state)
            sampling_reference.begin_step(twin)
            results.append((state.token_ids.clone(), twin.token_ids.clone()))
            decode_step.end_step(state, ids, 4)
            sampling_reference.end_step(twin, ids, 4)
            for field in dataclasses.fields(state):
                results.append((getattr(state, field.name).clone(), getattr(twin, field.name).clone()))
    return results


def launch_all(meta: Callable[..., torch.Tensor]) -> None:
    """Make the launches of a real model's shapes; ``meta`` makes tensors without memory."""
    for changes in (False, True):
        sampling.sample_rows(meta(8, 151936, dtype=torch.float32), sampling_rows.like(8, 151936, 64, changes, meta))
    for num_rows in (64, 256):
        state = decode_state.like(num_rows, 128, num_rows, meta)
        decode_step.begin_step(state)
        decode_step.end_step(state, state.last, 16)
