"""Grammar constraint of one sequence: a mask of the next tokens, and the end of the output.

llguidance computes the masks, 10 to 100 us a token, for a model's whole vocabulary. Reasoning before the answer
is unconstrained: the grammar begins after the token that ends it. No torch here; the sampler applies the masks.
"""

import time
from typing import Final

import numpy as np
from llguidance import LLMatcher

from neuron.device.jobs import ConstraintSettings
from neuron.engine.errors import EngineError
from neuron.engine.sequence import Int32Array
from neuron.text.matcher import BITS, problem_of

FIRST_ALLOWANCE_S: Final = 0.5
ALLOWANCE_S: Final = 0.002
"""CPU time of a sequence's grammar: at first, and added for each token. All sequences of the device wait for it, and a
grammar that passed the check of :mod:`neuron.text.matcher` may still become costly."""


class ConstraintError(EngineError):
    """The grammar's automaton gave up in the middle of an answer: the client's grammar, no fault of the device."""

    status = 400
    code = "constraint_failed"


class Constraint:
    """Position of one sequence in its grammar."""

    def __init__(self, matcher: LLMatcher, settings: ConstraintSettings, num_tokens: int) -> None:
        self._matcher = matcher
        self._opens = settings.opens
        self._closes = settings.closes
        self._reasons = settings.starts_inside
        self._num_tokens = num_tokens
        self._allowance_s = FIRST_ALLOWANCE_S

    @property
    def free_tokens(self) -> int:
        """Return that a mask may be needed behind the next token, which may end the reasoning."""
        return 0

    def mask(self) -> Int32Array | None:
        """Return a mask of the next tokens, a bit each, int32 ``[ceil(V / 32)]``; ``None`` for all.

        Raises :class:`ConstraintError`, also for a grammar over its allowance of time.
        """
        if self._reasons:
            return None
        mask: Int32Array = np.zeros(-(-self._num_tokens // BITS), np.int32)
        began_s = time.thread_time()
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        self._spend(time.thread_time() - began_s)
        if problem := problem_of(self._matcher):
            raise ConstraintError(f"the grammar cannot be followed: {problem}", param="response_format")
        if self._opens >= 0:
            mask.view(np.uint32)[self._opens // BITS] |= np.uint32(1 << self._opens % BITS)
        return mask

    def accept(self, token: int) -> bool:
        """Take the next token; return whether the answer is complete. Raises :class:`ConstraintError`."""
        if self._reasons:
            self._reasons = token != self._closes
            return False
        opens, self._opens = self._opens, -1
        if token == opens:
            self._reasons = True
            return False
        began_s = time.thread_time()
        follows = self._matcher.consume_token(token)
        self._spend(time.thread_time() - began_s)
        if not follows:
            problem = problem_of(self._matcher)
            raise ConstraintError(f"token {token} does not follow the grammar: {problem}", param="response_format")
        return self._matcher.is_stopped()

    def _spend(self, seconds: float) -> None:
        self._allowance_s += ALLOWANCE_S - seconds
        if self._allowance_s < 0:
            raise ConstraintError(
                "the grammar is too costly to follow: which token may come next takes too long to say",
                param="response_format",
            )
