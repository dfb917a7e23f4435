"""The plan of a step: flat int32 arrays that describe the work of every row.

They are all that an executor needs of the requests: eager torch, a captured graph and a C loop read the same
arrays. They are built with a few numpy calls a step, whatever the context's length.
"""

import dataclasses
import operator
from collections.abc import Collection
from typing import Final

import numpy as np

from neuron.device.jobs import Pooling
from neuron.engine.cache import Cache
from neuron.engine.scheduler import Step
from neuron.engine.sequence import NO_TOKENS, Int32Array, Sequence

NO_STOPS: Final[Int32Array] = np.empty((0, 0), np.int32)
NO_COPIES: Final[Int32Array] = np.empty((2, 0), np.int32)


@dataclasses.dataclass(frozen=True, slots=True)
class StepPlan:
    """B sequences with T query tokens, of which R rows get a next token. All arrays are int32."""

    num_decodes: int
    """The first sequences, with one query token each, longest context first."""
    token_ids: Int32Array
    """``[T]``. A negative id, -1 - i, is the i-th token of the step before, which may still be on the device."""
    positions: Int32Array
    """``[T]``"""
    slot_mappings: Int32Array
    """``[G, T]``: the KV slot of each token's key and value, in the pages of each table."""
    cu_seqlens: Int32Array
    """``[B + 1]``: first row of each sequence, and T."""
    page_tables: Int32Array
    """``[G, B, P]``: each sequence's pages in each table, 0 where it has none: at the end, and behind a window."""
    context_lens: Int32Array
    """``[B]``: tokens in the cache after this step."""
    sampled: Int32Array
    """``[R]``: the rows with logits, ascending: a prompt's last and its scored ones, and all of a decoding
    sequence."""
    slots: Int32Array
    """``[R]``: the batch slot of each row's sequence."""
    num_output: Int32Array
    """``[R]``: the number of tokens generated before it."""
    hidden_rows: Int32Array
    """``[E]``: the rows whose last hidden states are returned, ascending."""
    num_steps: int = 1
    """Number of decode steps. In each after the first, every row's token is its last sampled one, one position further;
    the page tables have room for them."""
    stops: Int32Array = dataclasses.field(default_factory=lambda: NO_STOPS)
    """``[B, X]``: the tokens that end each row, -1 where there are fewer; X is 0 for a single step."""
    targets: Int32Array = dataclasses.field(default_factory=lambda: NO_TOKENS)
    """``[R]``, or empty where there are none: the next token of a prompt's row, to be scored instead of drawn; -1
    for a row that is drawn."""
    num_drafting: int = 0
    """Number of sequences behind the decodes that have draft tokens."""
    state_slots: Int32Array = dataclasses.field(default_factory=lambda: NO_TOKENS)
    """``[B]``, or empty where no layer keeps a state: the state slot of each sequence."""
    state_loads: Int32Array = dataclasses.field(default_factory=lambda: NO_COPIES)
    """``[2, N]``: copies of states before the step, from and to; from 0 stands for zeros."""
    state_saves: Int32Array = dataclasses.field(default_factory=lambda: NO_COPIES)
    """``[2, N]``: copies of states behind the step, from and to."""
    replays: Int32Array = dataclasses.field(default_factory=lambda: NO_TOKENS)
    """``[B]``, or empty where there are none: the accepted draft tokens that each sequence's state is still without."""
    hidden_saves: Int32Array = dataclasses.field(default_factory=lambda: NO_COPIES)
    """``[2, N]``: copies of last hidden states behind the step, from a row to a place, for a draft head."""
    hidden_loads: Int32Array = dataclasses.field(default_factory=lambda: NO_TOKENS)
    """``[T]``, or empty: the place of the hidden state that each row of a draft head reads, whose step this is."""


FIELDS = operator.attrgetter("num_computed", "num_prompt", "num_fill", "slot", "num_replays")


def build_plan(step: Step, cache: Cache) -> StepPlan:
    """Return the plan of ``step``, whose sequences are in ``cache``."""
    sequences, page_tokens = step.sequences, cache.page_tokens
    num_decodes = step.num_decodes
    counts = np.array(step.num_tokens, np.int32)
    starts, num_prompt, num_fill, slots, replays = np.array([FIELDS(sequence) for sequence in sequences], np.int32).T
    cu_seqlens = np.zeros(len(sequences) + 1, np.int32)
    np.cumsum(counts, out=cu_seqlens[1:])
    context_lens = starts + counts
    own_pages = cache.page_tables[:, slots, : -(-(int(context_lens.max()) + step.num_steps - 1) // page_tokens)]
    hidden_rows = targets = NO_TOKENS
    if num_decodes == len(sequences):
        rows = sampled = sampled_of = np.arange(num_decodes, dtype=np.int32)
        positions = starts
    else:
        rows = np.repeat(np.arange(len(sequences), dtype=np.int32), counts)
        positions = np.arange(cu_seqlens[-1], dtype=np.int32) - cu_seqlens[rows] + starts[rows]
        # A prompt has its last row sampled; a decoding sequence the row of its last token and those of its drafts.
        is_sampled = positions >= num_fill[rows] - 1
        if any(sequence.pooling is not None for sequence in sequences):
            pooling = [sequence.pooling for sequence in sequences]
            is_sampled &= np.array([kind is None for kind in pooling])[rows]
            wanted = np.array([kind is Pooling.MEAN for kind in pooling])[rows]
            wanted |= np.array([kind is Pooling.LAST for kind in pooling])[rows] & (positions == num_fill[rows] - 1)
            hidden_rows = np.flatnonzero(wanted).astype(np.int32)
        following = _following(sequences, num_decodes, cu_seqlens) if _scores(sequences) else NO_TOKENS
        if len(following):
            is_sampled |= following >= 0
        sampled = np.flatnonzero(is_sampled).astype(np.int32)
        sampled_of = rows[sampled]
        targets = following[sampled] if len(following) else NO_TOKENS
    token_ids = np.empty(len(rows), np.int32)
    token_ids[:num_decodes] = [sequence.tokens[sequence.num_computed] for sequence in sequences[:num_decodes]]
    for index in range(num_decodes, len(sequences)):
        sequence, first, end = sequences[index], cu_seqlens[index], cu_seqlens[index + 1]
        if sequence.prefills:
            token_ids[first:end] = sequence.tokens[starts[index] : context_lens[index]]
        else:
            token_ids[first] = sequence.tokens[sequence.num_computed]
            token_ids[first + 1 : end] = sequence.drafts[: end - first - 1]
    states = cache.states
    return StepPlan(
        num_decodes=num_decodes,
        token_ids=token_ids,
        positions=positions,
        slot_mappings=own_pages[:, rows, positions // page_tokens] * np.int32(page_tokens) + positions % page_tokens,
        cu_seqlens=cu_seqlens,
        page_tables=own_pages,
        context_lens=context_lens,
        sampled=sampled,
        slots=slots[sampled_of],
        num_output=positions[sampled] + 1 - num_prompt[sampled_of],
        hidden_rows=hidden_rows,
        num_steps=step.num_steps,
        stops=_stops(sequences) if step.num_steps > 1 else np.empty((len(sequences), 0), np.int32),
        targets=targets,
        num_drafting=step.num_drafting,
        state_slots=NO_TOKENS if states is None else states.slots[slots],
        state_loads=NO_COPIES if states is None else states.loads(slots.tolist()),
        state_saves=NO_COPIES if states is None else states.saves(slots.tolist(), context_lens.tolist()),
        replays=NO_TOKENS if states is None or not replays.any() else replays,
    )


def _scores(sequences: Collection[Sequence]) -> bool:
    return any(sequence.scores_prompt for sequence in sequences)


def _following(sequences: tuple[Sequence, ...], num_decodes: int, cu_seqlens: Int32Array) -> Int32Array:
    """Return ``[T]`` the prompt's token behind each row to be scored, -1 for all others."""
    following: Int32Array = np.full(int(cu_seqlens[-1]), -1, np.int32)
    for index in range(num_decodes, len(sequences)):
        sequence, first, end = sequences[index], int(cu_seqlens[index]), int(cu_seqlens[index + 1])
        count = sequence.num_to_score(end - first) if sequence.prefills else 0
        if count:
            start = max(sequence.num_computed, sequence.num_scored)
            at = first + start - sequence.num_computed
            following[at : at + count] = sequence.tokens[start + 1 : start + 1 + count]
    return following


def _stops(sequences: Collection[Sequence]) -> Int32Array:
    stops: Int32Array = np.full((len(sequences), max(len(sequence.eos) for sequence in sequences)), -1, np.int32)
    for row, sequence in enumerate(sequences):
        stops[row, : len(sequence.eos)] = sorted(sequence.eos)
    return stops
