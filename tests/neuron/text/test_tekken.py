"""Mistral's tokenizer file against the definition of its BPE, and files that contradict themselves."""

import base64
import itertools
import json
import pathlib
from typing import Any

import pytest
from tokenizers import Regex, pre_tokenizers

from neuron.errors import UnsupportedTokenizerError
from neuron.text.gguf_rules import RULES
from neuron.text.tokenizer import load

PATTERN = RULES["tekken"].patterns[0]
TEXTS = (
    "The quick brown fox jumps over the lazy dog, 12345 times.\r\n\n  It doesn't mind at all: the other dogs do!",
    "\u00dcn\u00efcode \u4f60\u597d \uc548\ub155 e\u0301 \U0001f3f3\ufe0f\u200d\U0001f308", "\t\t  ", "aaaaaaaaa", "",
)  # fmt: skip


def pieces() -> list[bytes]:
    """Return the bytes, and unions of pieces as a training would find them."""
    found = [bytes([i]) for i in range(256)]
    words = [word.encode() for word, _ in pre_tokenizers.Split(Regex(PATTERN), "isolated").pre_tokenize_str(TEXTS[0])]
    for _ in range(60):
        joined = sorted({a + b for word in words for a, b in pairs(word, found)} - set(found))
        found += joined[:: max(1, len(joined) // 3)][:3]
    return found


def parts(word: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Join the adjacent pieces whose union has the lowest rank, the first of equal ones, until there are none."""
    cut = [bytes([byte]) for byte in word]
    while len(cut) > 1:
        rank, at = min((ranks.get(a + b, 1 << 30), i) for i, (a, b) in enumerate(itertools.pairwise(cut)))
        if rank == 1 << 30:
            break
        cut[at : at + 2] = [cut[at] + cut[at + 1]]
    return cut


def pairs(word: bytes, known: list[bytes]) -> list[tuple[bytes, bytes]]:
    cut = parts(word, {piece: rank for rank, piece in enumerate(known)})
    return list(itertools.pairwise(cut))


def file(**changes: Any) -> dict[str, Any]:
    listed = pieces()
    return {
        "config": {
            "pattern": PATTERN, "num_vocab_tokens": len(listed), "default_vocab_size": len(listed) + 30 - 5,
            "default_num_special_tokens": 30, "version": "v3",
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(piece).decode(), "token_str": None}
            for rank, piece in enumerate(listed)
        ],
        **changes,
    }  # fmt: skip


def test_words_are_joined_by_rank(tmp_path: pathlib.Path) -> None:
    (tmp_path / "tekken.json").write_text(json.dumps(file()))
    found = load(tmp_path)
    ranks = {piece: rank for rank, piece in enumerate(pieces()[:-5])}
    splitter = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    for text in TEXTS:
        words = [word.encode() for word, _ in splitter.pre_tokenize_str(text)]
        expected = [30 + ranks[part] for word in words for part in ([word] if word in ranks else parts(word, ranks))]
        ids = found.tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == expected
        assert found.tokenizer.decode(ids) == text
    assert len(found.tokenizer.encode(TEXTS[0]).ids) < len(TEXTS[0]) * 0.7


def test_control_tokens_come_first(tmp_path: pathlib.Path) -> None:
    (tmp_path / "tekken.json").write_text(json.dumps(file()))
    found = load(tmp_path)
    assert found.tokenizer.encode("<s>[INST]a[/INST]").ids == [1, 3, 30 + ord("a"), 4]
    assert found.before == (1,)
    assert found.special_tokens["eos_token"] == "</s>"
    assert found.tokenizer.token_to_id("<SPECIAL_29>") == 29
    named = [{"rank": 0, "token_str": "<s>", "is_control": True}, {"rank": 7, "token_str": "[A]", "is_control": False}]
    (tmp_path / "tekken.json").write_text(json.dumps(file(special_tokens=named)))
    found = load(tmp_path)
    assert found.tokenizer.encode("<s>[A]").ids == [0, 7]
    assert found.tokenizer.decode([0, 7]) == "[A]"


@pytest.mark.parametrize(
    "changes",
    [
        {"config": {}},
        {"vocab": []},
        {"vocab": [{"rank": 0, "token_bytes": "*", "token_str": None}] * 300},
        {"vocab": [{"rank": 0, "token_bytes": "AA==", "token_str": None}] * 500},
        {"special_tokens": [{"rank": 30, "token_str": "[A]", "is_control": True}]},
        {"special_tokens": [{"rank": i, "token_str": "[A]", "is_control": True} for i in range(2)]},
        {"config": {"pattern": "(", "default_vocab_size": 300, "default_num_special_tokens": 30}},
        {"config": {"pattern": "a", "default_vocab_size": 1 << 40, "default_num_special_tokens": 30}},
        {"config": {"pattern": "a", "default_vocab_size": 300, "default_num_special_tokens": -5}},
    ],
)
def test_a_file_that_contradicts_itself_is_refused(tmp_path: pathlib.Path, changes: dict[str, Any]) -> None:
    (tmp_path / "tekken.json").write_text(json.dumps(file(**changes)))
    with pytest.raises(UnsupportedTokenizerError, match=r"tekken\.json cannot be read"):
        load(tmp_path)
