"""Memory that a layer keeps of earlier tokens, as declared, and its division into page tables and state slots.

All layers without a window share page table 0: its pages hold every token of a sequence. Layers with the same window
share a table of their own, in which a sequence has only the pages that its next tokens can see, unless that saves
nothing: then they share table 0 as well. (The groups of vLLM's hybrid KV cache manager.) The states of all recurrent
layers lie side by side in a slot. No torch, and no sequences: :mod:`neuron.engine.cache` owns pages and slots.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar, Final

AHEAD_TOKENS: Final = 64
"""Most tokens behind its next one for which a sequence has pages: of a multi-step decode, or draft tokens."""
MAX_DRAFTS: Final = 8
"""Most draft tokens of a sequence in a step: a state has room for the inputs of so many."""
CHUNK_TOKENS: Final = 64
"""Tokens that chunked forms of recurrences compute at a time: however a prompt is cut, states agree to the bit if it is
cut at multiples of them."""
STATE_ALIGNMENT: Final = 64
"""Alignment of each tensor of a state in bytes: a stride between slots is then a multiple of 16 elements."""
ROUNDED: Final = ("int8", "fp8")
"""Formats of one byte that keys and values can be rounded to, with a float32 scale for each token and head."""
UNSETTLED_STEPS: Final = 2
"""Steps whose tokens may still be unsettled when pages behind the window are given back: one in flight, one begun."""


@dataclasses.dataclass(frozen=True, slots=True)
class PagedKV:
    """Keys and values of each token, or of the last ``window_tokens`` that a token attends to, itself included."""

    num_kv_heads: int
    head_dim: int
    window_tokens: int = 0

    @property
    def elements_per_token(self) -> int:
        """Number of elements of a token."""
        return 2 * self.num_kv_heads * self.head_dim

    def rounded_bytes_per_token(self) -> int:
        """Return the bytes of a token in one of the ROUNDED formats."""
        return self.elements_per_token + 2 * self.num_kv_heads * 4


@dataclasses.dataclass(frozen=True, slots=True)
class Latent:
    """Vector of each token, from which all heads make their keys and values (arXiv:2405.04434).

    Each rank has all of it.
    """

    width: int
    window_tokens: ClassVar[int] = 0

    @property
    def elements_per_token(self) -> int:
        """Number of elements of a token."""
        return self.width


@dataclasses.dataclass(frozen=True, slots=True)
class StateTensor:
    """Tensor of a state: ``shape`` for each sequence, in the model's dtype or in float32."""

    shape: tuple[int, ...]
    in_float32: bool = False

    def num_bytes(self, element_bytes: int) -> int:
        """Return its bytes in a slot, where an element of the model's dtype has ``element_bytes``."""
        num_bytes = math.prod(self.shape) * (4 if self.in_float32 else element_bytes)
        return -(-num_bytes // STATE_ALIGNMENT) * STATE_ALIGNMENT


@dataclasses.dataclass(frozen=True, slots=True)
class SequenceState:
    """Tensors of fixed size that stand for all tokens of a sequence: a recurrence's state, a convolution's inputs.

    It is of an exact number of tokens and cannot be cut back; zeros before the first. So a step does not advance it by
    draft tokens, whose inputs it keeps: a later step replays those that were accepted.
    """

    tensors: tuple[StateTensor, ...]
    window_tokens: ClassVar[int] = 0
    elements_per_token: ClassVar[int] = 0

    def num_bytes(self, element_bytes: int) -> int:
        """Return its bytes in a slot, where an element of the model's dtype has ``element_bytes``."""
        return sum(tensor.num_bytes(element_bytes) for tensor in self.tensors)


Cache = PagedKV | Latent | SequenceState


@dataclasses.dataclass(frozen=True, slots=True)
class WindowTable:
    """Page table of the layers with one window."""

    window_tokens: int
    num_pages: int
    page_bytes: int
    """Bytes of a page in all these layers."""


@dataclasses.dataclass(frozen=True, slots=True)
class StateSlots:
    """Slots for the states of running sequences, and for checkpoints: states to resume from.

    There is one more, slot 0, which rows without a sequence write.
    """

    num_slots: int
    slot_bytes: int
    """Bytes of a slot: the states of all layers."""
    checkpoint_pages: int = 0
    """Number of pages of a prompt between checkpoints; 0: there are none."""

    @property
    def total_bytes(self) -> int:
        """Return the bytes of all slots."""
        return (1 + self.num_slots) * self.slot_bytes


def window_pages(window_tokens: int, page_tokens: int) -> int:
    """Return the most pages that a sequence holds in a windowed table, but for those of a prompt's chunks.

    They hold the window of the first unsettled token, and unsettled and reserved tokens, from anywhere in a page.
    """
    num_tokens = window_tokens - 1 + UNSETTLED_STEPS + AHEAD_TOKENS
    return (num_tokens + page_tokens - 2) // page_tokens + 1


def chunk_pages(step_tokens: int, page_tokens: int) -> int:
    """Return the most pages of a windowed table that hold unsettled chunks of prompts, over all sequences."""
    return UNSETTLED_STEPS * step_tokens // page_tokens


def forgets(caches: Sequence[Cache | None]) -> bool:
    """Return whether a layer keeps less than all tokens, so that a sequence cannot be resumed from any of them."""
    return any(isinstance(cache, SequenceState) or cache.window_tokens for cache in caches if cache is not None)


def windows_of(caches: Sequence[Cache | None]) -> tuple[int, ...]:
    """Return the different windows of layers, in tokens, shortest first."""
    return tuple(sorted({cache.window_tokens for cache in caches if cache is not None and cache.window_tokens}))


def table_of(window_tokens: int, tables: Sequence[WindowTable]) -> int:
    """Return the number of the page table of layers with this window, or with none; ``tables`` are numbered from 1."""
    windows = [table.window_tokens for table in tables]
    return 1 + windows.index(window_tokens) if window_tokens in windows else 0
