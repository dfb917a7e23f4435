"""The bytes that each token of a vocabulary stands for, for log probabilities and grammars.

The meaning of a piece is defined by the tokenizer's decoder alone: letters in the pieces prove nothing, since a
SentencePiece vocabulary has pieces with the letters of GPT-2's byte table too. The decoder's steps are applied to
each piece as in the middle of a text: the effect of a step on the ends of a whole text belongs to no token. Special
tokens stand for no bytes of text. Loads no torch.
"""

import functools
import json
import re
from collections.abc import Callable
from typing import Any, Final

from tokenizers import Regex, Tokenizer, decoders

_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")

Step = Callable[[str], "str | bytes"]
"""Step of a decoder on a single piece; bytes are final."""


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """Return the bytes of each id of ``tokenizer``; of a special token, its name."""
    special = {index: token.content for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    steps = _steps(_state(tokenizer.decoder))
    found = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for piece, index in vocabulary.items():
        found[index] = special[index].encode() if index in special else _decoded(piece, steps)
    return found


def special_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that stand for no text."""
    return [index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special]


def _state(decoder: Any) -> dict[str, Any]:
    """Return a decoder as ``tokenizer.json`` has it."""
    return {} if decoder is None else json.loads(decoder.__getstate__())


def _decoded(piece: str, steps: list[Step]) -> bytes:
    for step in steps:
        found = step(piece)
        if isinstance(found, bytes):
            return found
        piece = found
    return piece.encode()


def _steps(state: dict[str, Any]) -> list[Step]:
    """Return what a decoder does to each piece. After ``Fuse`` there are no pieces any more, only a text."""
    steps: list[Step] = []
    for part in _flat(state):
        match part.get("type"):
            case "Fuse":
                break
            case "ByteLevel":
                steps.append(_byte_level)
            case "ByteFallback":
                steps.append(_byte_fallback)
            case "Metaspace":
                steps.append(functools.partial(_replaced, part["replacement"], " "))
            case "Replace":
                steps.append(_replacement(part["pattern"], part["content"]))
            case "BPEDecoder":
                steps.append(functools.partial(_replaced, part["suffix"], " "))
            case "WordPiece":
                steps.append(functools.partial(_word_piece, part["prefix"], part["cleanup"]))
            case "Strip":
                steps.append(functools.partial(_stripped, part["content"], part["start"], part["stop"]))
            case "CTC":
                steps.append(functools.partial(_replaced, part["word_delimiter_token"], " "))
    return steps


def _flat(state: dict[str, Any]) -> list[dict[str, Any]]:
    if state.get("type") == "Sequence":
        return [part for inner in state["decoders"] for part in _flat(inner)]
    return [state]


def _byte_level(piece: str) -> bytes:
    table = byte_of_character()
    try:
        return bytes(map(table.__getitem__, piece))
    except KeyError:
        return piece.encode()  # a token that was added to the vocabulary is written as it is


def _byte_fallback(piece: str) -> str | bytes:
    found = _BYTE_TOKEN.fullmatch(piece)
    return bytes([int(found[1], 16)]) if found else piece


def _replaced(old: str, new: str, piece: str) -> str:
    return piece.replace(old, new)


def _replacement(pattern: dict[str, str], content: str) -> Step:
    if "String" in pattern:
        return functools.partial(_replaced, pattern["String"], content)
    # The regular expressions of the library are not Python's: it does this itself.
    decoder = decoders.Replace(Regex(pattern["Regex"]), content)
    return lambda piece: str(decoder.decode([piece]))


def _word_piece(prefix: str, cleanup: bool, piece: str) -> str:
    piece = piece.removeprefix(prefix) if piece.startswith(prefix) else " " + piece
    if cleanup:
        for old, new in _CLEANED:
            piece = piece.replace(old, new)
    return piece


_CLEANED: Final = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
    (" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip
"""Replacements of WordPiece's decoder in each piece, as in the ``tokenizers`` library."""


def _stripped(content: str, start: int, stop: int, piece: str) -> str:
    for _ in range(start):
        piece = piece.removeprefix(content)
    for _ in range(stop):
        piece = piece.removesuffix(content)
    return piece


@functools.cache
def byte_of_character() -> dict[str, int]:
    """Return GPT-2's table: printable Latin-1 stands for itself, the other bytes for what follows U+0100 in turn."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
