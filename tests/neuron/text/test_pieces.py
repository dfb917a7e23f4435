"""A long text becomes the ids that it would become as a whole, a piece at a time."""

import itertools
import pathlib
import random
import resource

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from neuron.text import pieces, tokenizer

WORDS = [
    *["the", " quick", " brown", "  fox", "\n\n", "\t", " 3.14", "1234567", " don't", " WE'LL", "x" * 40, " " * 33],
    *[
        "你好，世界。",
        "Привет",
        " мир!",
        " 😀👍🏽",
        " e\u0301té",
        "\r\n",
        "<|im_end|>",
        "</s>",
        "(a)[b]{c}",
        " == ",
        "---" * 9,
    ],
]
CHARACTERS = sorted(set("".join(WORDS)) | {"\u2581"})


def byte_level() -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*letters, "th", "the", "\u0120q"])}
    found = Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e"), ("\u0120", "q")]))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.add_special_tokens(["<|im_end|>"])
    return found


def sentence_piece(prefix: bool, metaspace: bool) -> Tokenizer:
    vocabulary = {letter: index for index, letter in enumerate([*CHARACTERS, "\u2581t", "th", "\u2581q", "qu"])}
    merges = [("\u2581", "t"), ("t", "h"), ("\u2581", "q"), ("q", "u")]
    found = Tokenizer(models.BPE(vocabulary, merges, unk_token="x", fuse_unk=True))
    if metaspace:
        found.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if prefix else "never")
    else:
        replace = normalizers.Replace(" ", "\u2581")
        found.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace]) if prefix else replace
    found.add_special_tokens(["</s>"])
    return found


def text(seed: int, length: int = 60_000) -> str:
    chance = random.Random(seed)
    found = "".join(chance.choices(WORDS, k=length // 3))
    return found[:length]


KINDS = {
    "byte level": byte_level,
    **{
        f"sentence piece, prefix={prefix}, metaspace={metaspace}": lambda p=prefix, m=metaspace: sentence_piece(p, m)
        for prefix, metaspace in itertools.product((True, False), repeat=2)
    },
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_pieces_make_no_difference(kind: str, seed: int) -> None:
    found = KINDS[kind]()
    whole = found.encode(text(seed), add_special_tokens=False).ids
    assert pieces.encode(found, text(seed)) == whole


def test_pieces_make_no_difference_to_a_real_vocabulary(smollm2_gguf: pathlib.Path) -> None:
    found = tokenizer.load(smollm2_gguf).tokenizer
    for seed in range(4):
        whole = found.encode(text(seed), add_special_tokens=False).ids
        assert pieces.encode(found, text(seed)) == whole


@pytest.mark.parametrize("kind", KINDS)
def test_counting_ends_where_there_are_too_many(kind: str) -> None:
    found = KINDS[kind]()
    with pytest.raises(pieces.TooManyTokensError) as caught, pieces.at_most(1000):
        pieces.encode(found, "the quick brown fox " * 400_000)
    assert 1000 < caught.value.num_tokens < 40_000
    with pieces.at_most(1000):
        pieces.encode(found, "the")
    pieces.encode(found, text(0))


@pytest.mark.parametrize("unit", ["1", "a", " ", "\n", "😀", "a ", "\u0301", "<|im_end|>"])
def test_a_text_of_one_thing_takes_little_memory(smollm2_gguf: pathlib.Path, unit: str) -> None:
    found = tokenizer.load(smollm2_gguf).tokenizer
    pieces.encode(found, unit * 20_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(pieces.TooManyTokensError), pieces.at_most(4096):
        pieces.encode(found, unit * (2_000_000 // len(unit)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "KiB"
