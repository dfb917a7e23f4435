"""Minimum length of an output: its end tokens are masked until it is reached.

Wraps the grammar, where there is one. Where the grammar's output is complete, so that it allows nothing but an end, the
grammar decides.
"""

import numpy as np

from neuron.engine.sequence import Constrained, Int32Array
from neuron.text.matcher import BITS


class Minimum:
    """Mask of the end tokens of one sequence, over its grammar's."""

    def __init__(self, inner: Constrained | None, min_tokens: int, ends: frozenset[int], vocab_size: int) -> None:
        self._inner = inner
        self._left = min_tokens
        self._allowed: Int32Array = np.full(-(-vocab_size // BITS), -1, np.int32)
        for token in ends:
            if 0 <= token < vocab_size:
                self._allowed.view(np.uint32)[token // BITS] &= np.uint32(0xFFFF_FFFF ^ (1 << token % BITS))

    @property
    def free_tokens(self) -> int:
        """Return for how many tokens no mask is needed, see :class:`neuron.engine.sequence.Constrained`."""
        return 0

    def mask(self) -> Int32Array | None:
        """Return a mask of the next tokens, see :class:`neuron.engine.sequence.Constrained`."""
        inner = None if self._inner is None else self._inner.mask()
        if self._left <= 0:
            return inner
        if inner is None:
            return self._allowed
        both: Int32Array = inner & self._allowed
        return both if both.any() else inner

    def accept(self, token: int) -> bool:
        """Take the next token; return whether the output is complete."""
        self._left -= 1
        return self._inner is not None and self._inner.accept(token)
