"""Grammars over a model's vocabulary: compiled here, for the check of a request and for the device that follows it.

Both sides compile the same text with the same limits, so what has passed the check cannot stop a device worker. The
limits are those of llguidance's own machinery; what time and memory a compile takes is bounded from outside
(:mod:`neuron.text.limits`). No torch here.
"""

import collections
import random
import time
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from tokenizers import Tokenizer

from cortex.wire.errors import InvalidSchemaError
from neuron.text.plain import Place, PlainText
from neuron.text.token_bytes import special_ids, token_bytes

BITS: Final = 32
Mask = npt.NDArray[np.int32]

MAX_MASK_S: Final = 0.1
"""CPU time of one mask. They take 10-100 us; a step of all other sequences waits for it."""
TRIED_TOKENS: Final = 8
"""Number of tokens for which a grammar is followed before its request is admitted: some only become costly behind
their first token (``(a{1000}){1000}`` takes 0.9 s and 220 MiB there)."""
KEPT_GRAMMARS: Final = 8
"""Compiled grammars kept for each model: the choices of one request share one, and so do a client's calls in turn."""
KEPT_SOURCE_BYTES: Final = 64 << 10
"""A longer grammar is not kept: what it is compiled to may be large."""

_LIMITS: Final[dict[str, Any]] = {
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
"""Limits of llguidance. With its defaults (200,000, 50,000, 250,000, 500,000) a mask can take 0.7 s and a sequence
500 MB."""


class Vocabulary:
    """A model's tokens as grammars see them: made once a model, in 0.1 s for 50,000 tokens."""

    def __init__(self, tokenizer: Tokenizer, num_tokens: int, eos: tuple[int, ...]) -> None:
        """``num_tokens`` is the width of the model's logits, which may exceed the tokenizer's vocabulary."""
        self.num_tokens = num_tokens
        self._tokens = LLTokenizer(TokenizerWrapper(_Tokens(tokenizer, num_tokens, eos)), eos_token=[*eos])
        self._kept: collections.OrderedDict[str, LLMatcher] = collections.OrderedDict()

    def compile(self, grammar: str) -> LLMatcher:
        """Return an automaton at the beginning of ``grammar``. Raises :class:`InvalidSchemaError`."""
        kept = self._kept.get(grammar)
        if kept is None:
            kept = LLMatcher(self._tokens, grammar, log_level=0, limits=LLParserLimits(**_LIMITS))
            if problem := problem_of(kept):
                raise InvalidSchemaError(problem, param="response_format")
            if len(grammar) > KEPT_SOURCE_BYTES:
                return kept
            self._kept[grammar] = kept
            if len(self._kept) > KEPT_GRAMMARS:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(grammar)
        return kept.deep_copy()

    def problem_with(self, grammar: str) -> str:
        """Compile ``grammar`` and follow it for some tokens; return what is wrong with it, nothing if it is right."""
        try:
            matcher = self.compile(grammar)
        except InvalidSchemaError as error:
            return error.message.removeprefix("Invalid schema: ").removesuffix(".")
        mask: Mask = np.zeros(-(-self.num_tokens // BITS), np.int32)
        chance = random.Random(0)
        for _ in range(TRIED_TOKENS):
            started_s = time.thread_time()
            matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            if time.thread_time() - started_s > MAX_MASK_S:
                return "it is too costly to follow: which token may come next takes too long to say"
            if problem := problem_of(matcher):
                return f"it cannot be followed: {problem}"
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
            if not len(allowed) or not matcher.consume_token(int(chance.choice(allowed))) or matcher.is_stopped():
                break
        return f"it cannot be followed: {problem}" if (problem := problem_of(matcher)) else ""


def problem_of(matcher: LLMatcher) -> str:
    """Return what stopped an automaton in a few words, nothing if it goes on."""
    return matcher.get_error().split("\n<")[0][:500] if matcher.is_error() else ""


class _Tokens:
    """The interface that llguidance asks of a foreign tokenizer."""

    def __init__(self, tokenizer: Tokenizer, num_tokens: int, eos: tuple[int, ...]) -> None:
        # The grammar's own text is a continuation of what is there: a space before it would not follow the grammar.
        special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
        self._plain = PlainText(tokenizer, special, Place.CONTINUED)
        known = token_bytes(tokenizer)[:num_tokens]
        # A token of no bytes is in no mask, which is what the padding of the logits needs.
        self.tokens = known + [b""] * (num_tokens - len(known))
        # An end token is no text either, even if its tokenizer has text for it: it would end an answer within a string.
        self.special_token_ids = sorted({*special_ids(tokenizer), *eos})
        self.eos_token_id = eos[0]
        self.bos_token_id = None

    def __call__(self, text: str | bytes) -> list[int]:
        return self._plain.encode(text.decode() if isinstance(text, bytes) else text)
