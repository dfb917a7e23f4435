"""Text to ids in pieces: what is taken for it at a time is bounded, and it ends where there are too many.

The ``tokenizers`` library holds some 1,000 bytes for each word of a text and 100 for each character, 7 GB for 8 MB of
digits. A long text is cut where the whole of it is cut too: between two words of the pre-tokenizer, whose patterns look
ahead but never back, or, of a vocabulary that has none, before a space. Only within a run of thousands of characters
that is one word does a cut make a difference. No torch here.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, Final

from tokenizers import Tokenizer

PIECE_CHARS: Final = 16 << 10
SPACES: Final = ("\u2581", "\u0120")
"""Characters that stand for a space in vocabularies."""
MARGIN_CHARS: Final = 256
"""Characters at the end of a piece whose tokens may change with the text that follows."""


class TooManyTokensError(Exception):
    """A text has more tokens than were allowed: ``num_tokens`` at least."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__(f"at least {num_tokens} tokens")
        self.num_tokens = num_tokens


class _Allowance:
    def __init__(self, most: int) -> None:
        self.most = most
        self.num_tokens = 0


_allowed: contextvars.ContextVar[_Allowance | None] = contextvars.ContextVar("allowed", default=None)


@contextlib.contextmanager
def at_most(num_tokens: int) -> Iterator[None]:
    """Have :func:`encode` raise :class:`TooManyTokensError` when all calls in the block have made more than these."""
    token = _allowed.set(_Allowance(num_tokens))
    try:
        yield
    finally:
        _allowed.reset(token)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of ``text``, without those that a post-processor adds."""
    if len(text) <= PIECE_CHARS:
        return _counted(tokenizer.encode(text, add_special_tokens=False).ids)
    ids: list[int] = []
    at = 0
    begins_with_space = _adds_space(tokenizer)
    while True:
        piece = text[at : at + PIECE_CHARS]
        encoding = tokenizer.encode(piece, add_special_tokens=False)
        if at + len(piece) == len(text):
            return ids + _counted(encoding.ids)
        num_tokens, num_chars = _cut(encoding, piece, begins_with_space)
        ids += _counted(encoding.ids[:num_tokens])
        at += num_chars


def _cut(encoding: Any, piece: str, begins_with_space: bool) -> tuple[int, int]:
    """Return how many tokens and characters of a piece stand, whatever follows it."""
    words, offsets = encoding.word_ids, encoding.offsets
    last = 0
    for index in range(len(words) - 1, 0, -1):
        start = offsets[index][0]
        if start > len(piece) - MARGIN_CHARS or start < offsets[index - 1][1]:
            continue
        last = last or index
        is_space = piece[start] == " " and piece[start - 1] != " " and piece[start + 1] != " "
        if begins_with_space:
            if is_space:
                return index, start + 1
        elif words[index] != words[index - 1] or (is_space and words[0] == words[-1]):
            return index, start
        if start < len(piece) // 2 and last:
            break
    if last:
        return last, offsets[last][0]
    return len(words), len(piece)


def _adds_space(tokenizer: Tokenizer) -> bool:
    """Return whether a text begins with a space that is not its own: a piece is given none where it has one."""
    tokens = tokenizer.encode("a", add_special_tokens=False).tokens
    return bool(tokens) and tokens[0].startswith(SPACES)


def _counted(ids: list[int]) -> list[int]:
    allowance = _allowed.get()
    if allowance is not None:
        allowance.num_tokens += len(ids)
        if allowance.num_tokens > allowance.most:
            raise TooManyTokensError(allowance.num_tokens)
    return ids
