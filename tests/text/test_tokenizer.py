"""Tokenizers rebuilt from GGUF metadata, against the algorithm they stand for."""

import itertools
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies

from neuron.errors import UnsupportedTokenizerError
from neuron.models.gguf import GgufHeader
from neuron.text.tokenizer import TextFiles, from_gguf

SPACE = "\u2581"
LETTERS = [*"abc", SPACE, "ä"]
LONGER = ["ab", "bc", "abc", SPACE + "a", "aa", "aaaa", "cab", "ca", SPACE + SPACE, "bcab"]
# Equal scores never decide: SentencePiece's are all different.
TOKENS = ["<unk>", "<s>", "</s>", "\n\n", "\n", *(f"<0x{byte:02X}>" for byte in range(256)), *LONGER, *LETTERS]
KINDS = [2, 3, 3, 4, 4] + [6] * 256 + [1] * (len(LONGER) + len(LETTERS))
SCORES = [0.0] * (5 + 256) + [-float(rank) for rank in range(len(LONGER) + len(LETTERS))]


def sentencepiece(**changes: object) -> TextFiles:
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.scores": SCORES,
        "tokenizer.ggml.token_type": KINDS,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": False,
        **{f"tokenizer.ggml.{name}": value for name, value in changes.items()},
    }
    return from_gguf(GgufHeader(3, metadata, (), 0))


def joined(text: str) -> list[int]:
    """Join the best-scored pair, the leftmost of equals, until none is a piece; then bytes for what is none."""
    ids = {token: index for index, token in enumerate(TOKENS)}
    symbols = list(text.replace(" ", SPACE))
    while True:
        pairs = [
            (-SCORES[ids[left + right]], at)
            for at, (left, right) in enumerate(itertools.pairwise(symbols))
            if ids.get(left + right, 0) >= 5 + 256
        ]
        if not pairs:
            break
        _, at = min(pairs)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    return [
        index
        for symbol in symbols
        for index in ([ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()])
    ]


@hypothesis.given(strategies.text("abc äß🦙", max_size=30))
def test_sentencepiece_joins_the_best_pair_first(text: str) -> None:
    tokenizer = sentencepiece().tokenizer
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == joined(text)
    assert tokenizer.decode(ids) == text


def test_sentencepiece_keeps_tokens_of_the_user_and_of_control_whole() -> None:
    files = sentencepiece()
    ids = files.tokenizer.encode("a\n\n\nb</s>", add_special_tokens=False).ids
    assert [TOKENS[index] for index in ids] == ["a", "\n\n", "\n", "b", "</s>"]
    assert files.add_bos
    assert files.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def test_sentencepiece_may_put_a_space_before_the_text() -> None:
    tokenizer = sentencepiece(add_space_prefix=True).tokenizer
    ids = tokenizer.encode("ab", add_special_tokens=False).ids
    assert ids == joined(" ab")
    assert tokenizer.decode(ids) == "ab"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": "t5"}, "'t5' is not supported"),
        ({"scores": [0.0]}, "1 scores"),
        ({"token_type": []}, "0 kinds"),
        ({"tokens": [], "scores": [], "token_type": []}, "no vocabulary"),
    ],
)
def test_a_vocabulary_that_is_none(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(UnsupportedTokenizerError, match=reason):
        sentencepiece(**changes)
