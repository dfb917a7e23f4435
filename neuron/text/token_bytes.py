"""The bytes that each token of a vocabulary stands for: what log probabilities and grammars speak of.

Byte-level vocabularies write each byte as one printable character (GPT-2's table); those of SentencePiece write a space
as U+2581 and a lone byte as ``<0x0A>``. Special tokens stand for no bytes of text. Loads no torch.
"""

import functools
import re
from typing import Final

from tokenizers import Tokenizer

_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE: Final = "\u2581"


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """Return the bytes of each id of ``tokenizer``; of a special token, its name."""
    added = {index: token.content for index, token in tokenizer.get_added_tokens_decoder().items()}
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    pieces = [""] * (max(vocabulary.values()) + 1)
    for piece, index in vocabulary.items():
        pieces[index] = piece
    table = byte_of_character()
    byte_level = any("Ġ" in piece for piece in pieces)
    found = []
    for index, piece in enumerate(pieces):
        if index in added:
            found.append(added[index].encode())
        elif byte_level:
            found.append(bytes(table[c] for c in piece) if all(c in table for c in piece) else piece.encode())
        elif match := _BYTE_TOKEN.fullmatch(piece):
            found.append(bytes([int(match[1], 16)]))
        else:
            found.append(piece.replace(_SPACE, " ").encode())
    return found


def special_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that stand for no text."""
    return [index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special]


@functools.cache
def byte_of_character() -> dict[str, int]:
    """Return GPT-2's table: printable Latin-1 stands for itself, the other bytes for what follows U+0100 in turn."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
