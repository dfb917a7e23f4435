"""A sequence whose tokens must follow a grammar: which may come next, and when it is complete.

llguidance computes the masks, 10 to 100 us a token, for a model's whole vocabulary. Reasoning that comes before the
answer is free: the grammar begins after the token that ends it. No torch here; the sampler applies the masks.
"""

from typing import Final

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from tokenizers import Tokenizer

from cortex.wire.errors import InvalidSchemaError
from neuron.device.jobs import ConstraintSettings
from neuron.engine.errors import EngineError
from neuron.engine.sequence import Int32Array
from neuron.text.plain import Place, PlainText
from neuron.text.token_bytes import special_ids, token_bytes

BITS: Final = 32


class ConstraintError(EngineError):
    """The grammar's automaton gave up in the middle of an answer."""

    code = "constraint_failed"


class Vocabulary:
    """A model's tokens as grammars see them: made once a model, in 0.1 s for 50,000 tokens."""

    def __init__(self, tokenizer: Tokenizer, num_tokens: int, eos: tuple[int, ...]) -> None:
        """``num_tokens`` is the width of the model's logits, which may exceed the tokenizer's vocabulary."""
        self.num_tokens = num_tokens
        self._tokens = LLTokenizer(TokenizerWrapper(_Tokens(tokenizer, num_tokens, eos)), eos_token=[*eos])

    def start(self, settings: ConstraintSettings) -> "Constraint":
        """Return the state of a new sequence. Raises :class:`InvalidSchemaError`."""
        matcher = LLMatcher(self._tokens, settings.grammar, log_level=0)
        if matcher.is_error():
            raise InvalidSchemaError(matcher.get_error().split("\n<state>")[0][:500], param="response_format")
        return Constraint(matcher, settings, self.num_tokens)


class _Tokens:
    """The interface that llguidance asks of a foreign tokenizer."""

    def __init__(self, tokenizer: Tokenizer, num_tokens: int, eos: tuple[int, ...]) -> None:
        # The grammar's own text is a continuation of what is there: a space before it would not follow the grammar.
        special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
        self._plain = PlainText(tokenizer, special, Place.CONTINUED)
        known = token_bytes(tokenizer)[:num_tokens]
        # A token of no bytes is in no mask, which is what the padding of the logits needs.
        self.tokens = known + [b""] * (num_tokens - len(known))
        # An end is no text either, whatever its tokenizer says: it would end an answer within a string.
        self.special_token_ids = sorted({*special_ids(tokenizer), *eos})
        self.eos_token_id = eos[0]
        self.bos_token_id = None

    def __call__(self, text: str | bytes) -> list[int]:
        return self._plain.encode(text.decode() if isinstance(text, bytes) else text)


class Constraint:
    """Where one sequence is in its grammar."""

    def __init__(self, matcher: LLMatcher, settings: ConstraintSettings, num_tokens: int) -> None:
        self._matcher = matcher
        self._opens = settings.opens
        self._closes = settings.closes
        self._reasons = settings.starts_inside
        self._num_tokens = num_tokens

    def mask(self) -> Int32Array | None:
        """Return which tokens may come next, a bit each, int32 ``[ceil(V / 32)]``; ``None`` if all may.

        Raises :class:`ConstraintError`.
        """
        if self._reasons:
            return None
        mask: Int32Array = np.zeros(-(-self._num_tokens // BITS), np.int32)
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._matcher.is_error():
            raise ConstraintError(f"the grammar cannot be followed: {self._matcher.get_error()[:300]}")
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
        if not self._matcher.consume_token(token):
            raise ConstraintError(f"token {token} does not follow the grammar: {self._matcher.get_error()[:300]}")
        return self._matcher.is_stopped()
