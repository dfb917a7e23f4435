"""Bound on the reasoning of one sequence: behind so many tokens its end is forced, token by token.

Wraps the grammar, where there is one. Until the bound is near no mask is needed, so steps may overlap and be verified
or run several at a time, as those of a sequence without a constraint.
"""

from typing import Final

import numpy as np

from neuron.device.jobs import ThinkingSettings
from neuron.engine.sequence import Constrained, Int32Array
from neuron.text.matcher import BITS

MANY: Final = 1 << 30


class ThinkingBudget:
    """Position of one sequence in its reasoning."""

    def __init__(self, inner: Constrained | None, settings: ThinkingSettings, vocab_size: int) -> None:
        self._inner = inner
        self._opens = settings.opens
        self._forced = settings.forced
        self._left = settings.num_tokens
        self._reasons = settings.starts_inside
        self._is_over = False
        self._num_forced = 0
        self._num_words = -(-vocab_size // BITS)

    @property
    def free_tokens(self) -> int:
        """Return for how many tokens no mask is needed, see :class:`neuron.engine.sequence.Constrained`."""
        if self._inner is not None:
            return 0
        return MANY if self._is_over else max(0, self._left - 1)

    def mask(self) -> Int32Array | None:
        """Return a mask of the next tokens, see :class:`neuron.engine.sequence.Constrained`."""
        if not self._reasons or self._left > 0:
            return None if self._inner is None else self._inner.mask()
        token = self._forced[self._num_forced]
        alone: Int32Array = np.zeros(self._num_words, np.int32)
        alone.view(np.uint32)[token // BITS] = np.uint32(1 << token % BITS)
        return alone

    def accept(self, token: int) -> bool:
        """Take the next token; return whether the output is complete."""
        if self._reasons:
            self._num_forced += self._left <= 0
            self._left -= 1
            if token == self._forced[-1]:
                self._reasons, self._is_over = False, True
        elif token == self._opens and not self._is_over:
            self._reasons = True
        return self._inner is not None and self._inner.accept(token)
