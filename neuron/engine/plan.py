"""The plan of one step: flat int32 arrays that say what every row computes.

An executor needs nothing else of the requests behind it: the eager runner, a captured graph and a C loop read the same
arrays. They are built with a few numpy calls a step, whatever the context's length.
"""

import dataclasses
import operator

import numpy as np

from neuron.engine.scheduler import Step
from neuron.engine.sequence import Int32Array, Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class StepPlan:
    """B sequences with T query tokens, of which R sequences get a next token. All arrays are int32."""

    sequences: tuple[Sequence, ...]
    num_decodes: int
    """The first sequences, with one query token each, longest context first."""
    token_ids: Int32Array
    """``[T]``"""
    positions: Int32Array
    """``[T]``"""
    slots: Int32Array
    """``[T]``: where in the cache each token's key and value go."""
    cu_seqlens: Int32Array
    """``[B + 1]``: first row of each sequence, and T."""
    page_table: Int32Array
    """``[B, P]``: each sequence's pages, padded with 0."""
    context_lens: Int32Array
    """``[B]``: tokens in the cache after this step."""
    sampled: Int32Array
    """``[R]``: the sequences, as indices into the above, whose last row is sampled."""
    seats: Int32Array
    """``[B]``: each sequence's row in the tables that outlive a step."""
    num_output: Int32Array
    """``[B]``: tokens generated before this step."""


FIELDS = operator.attrgetter("num_computed", "num_prompt", "num_fill", "seat", "num_tokens")


def build_plan(step: Step, page_table: Int32Array, page_tokens: int) -> StepPlan:
    """Return the plan of ``step``; ``page_table`` ``[seats, P]`` is the scheduler's."""
    sequences = step.sequences
    num_decodes = step.num_decodes
    counts = np.array(step.num_tokens, np.int32)
    starts, num_prompt, num_fill, seats, num_tokens = np.array([FIELDS(sequence) for sequence in sequences], np.int32).T
    cu_seqlens = np.zeros(len(sequences) + 1, np.int32)
    np.cumsum(counts, out=cu_seqlens[1:])
    context_lens = starts + counts
    own_pages = page_table[seats, : -(-int(context_lens.max()) // page_tokens)]
    if num_decodes == len(sequences):
        rows = np.arange(num_decodes, dtype=np.int32)
        positions = starts
    else:
        rows = np.repeat(np.arange(len(sequences), dtype=np.int32), counts)
        positions = np.arange(cu_seqlens[-1], dtype=np.int32) - cu_seqlens[rows] + starts[rows]
    token_ids = np.empty(len(rows), np.int32)
    token_ids[:num_decodes] = [sequence.tokens[sequence.num_computed] for sequence in sequences[:num_decodes]]
    for index in range(num_decodes, len(sequences)):
        token_ids[cu_seqlens[index] : cu_seqlens[index + 1]] = sequences[index].tokens[
            starts[index] : context_lens[index]
        ]
    return StepPlan(
        sequences=sequences,
        num_decodes=num_decodes,
        token_ids=token_ids,
        positions=positions,
        slots=own_pages[rows, positions // page_tokens] * np.int32(page_tokens) + positions % page_tokens,
        cu_seqlens=cu_seqlens,
        page_table=own_pages,
        context_lens=context_lens,
        sampled=np.flatnonzero(context_lens >= num_fill).astype(np.int32),
        seats=seats,
        num_output=num_tokens - num_prompt,
    )
