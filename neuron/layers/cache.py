"""Memory that a layer keeps of earlier tokens, as declared, and its division into page tables.

All layers without a window share page table 0: its pages hold every token of a sequence. Layers with the same window
share a table of their own, in which a sequence has only the pages that its next tokens can see, unless that saves
nothing: then they share table 0 as well. (The groups of vLLM's hybrid KV cache manager.) No torch, and no sequences:
:mod:`neuron.engine.cache` owns pages and slots.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Final

AHEAD_TOKENS: Final = 64
"""Most tokens behind its next one for which a sequence has pages: of a multi-step decode, or draft tokens."""
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


Cache = PagedKV | Latent


@dataclasses.dataclass(frozen=True, slots=True)
class WindowTable:
    """Page table of the layers with one window."""

    window_tokens: int
    num_pages: int
    page_bytes: int
    """Bytes of a page in all these layers."""


def window_pages(window_tokens: int, page_tokens: int) -> int:
    """Return the most pages that a sequence holds in a windowed table, but for those of a prompt's chunks.

    They hold the window of the first unsettled token, and unsettled and reserved tokens, from anywhere in a page.
    """
    num_tokens = window_tokens - 1 + UNSETTLED_STEPS + AHEAD_TOKENS
    return (num_tokens + page_tokens - 2) // page_tokens + 1


def chunk_pages(step_tokens: int, page_tokens: int) -> int:
    """Return the most pages of a windowed table that hold unsettled chunks of prompts, over all sequences."""
    return UNSETTLED_STEPS * step_tokens // page_tokens


def windows_of(caches: Sequence[Cache | None]) -> tuple[int, ...]:
    """Return the different windows of layers, in tokens, shortest first."""
    return tuple(sorted({cache.window_tokens for cache in caches if cache is not None and cache.window_tokens}))


def table_of(window_tokens: int, tables: Sequence[WindowTable]) -> int:
    """Return the number of the page table of layers with this window, or with none; ``tables`` are numbered from 1."""
    windows = [table.window_tokens for table in tables]
    return 1 + windows.index(window_tokens) if window_tokens in windows else 0
