"""GGUF vocabularies tokenise as the ``tokenizer.json`` they were made from: the same vocabulary, read both ways."""

import json
import random
import unicodedata
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

from cortex.wire.request import InferenceRequest
from neuron.errors import UnsupportedTokenizerError
from neuron.models.gguf import GgufHeader
from neuron.text.gguf_rules import RULES
from neuron.text.prompt import PromptFormat
from neuron.text.tokenizer import TextFiles, from_gguf

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
WORDS = [
    "hello", "world", "it's", "IT'S", "1234567", "3.14", "caf\u00e9", "cafe\u0301", "\u0905\u093f", "新しい", "don't",
    "x=1;", "//a", "\r\n", "\n\n", "   ", "\t", "🦙", "\u212a", "\ufb01", "Ünïcode", "HTTPServer", "a/b", "!?",
]  # fmt: skip
TEXTS = strategies.lists(strategies.sampled_from([*WORDS, " "]) | strategies.text(max_size=4), max_size=12).map("".join)


def trained() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return a vocabulary and merges of such words, with whole words that no merge makes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    pick = random.Random(3)
    tokenizer.train_from_iterator([" ".join(pick.choices(WORDS, k=20)) for _ in range(200)], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    # As Llama 3's vocabulary has them: pieces that are looked up whole, and that merging does not reach.
    kept = [merge for merge in merges if "".join(merge) not in {"Ġworld", "hello"}]
    return model["vocab"], kept


VOCABULARY, MERGES = trained()
SPECIAL = ["<|begin|>", "<|end|>"]


def gguf(pre: str, **changes: Any) -> TextFiles:
    tokens = [*sorted(VOCABULARY, key=VOCABULARY.__getitem__), *SPECIAL]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * len(VOCABULARY) + [3] * len(SPECIAL),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in MERGES],
        "tokenizer.ggml.bos_token_id": len(VOCABULARY),
        "tokenizer.ggml.eos_token_id": len(VOCABULARY) + 1,
        **{f"tokenizer.ggml.{name}": value for name, value in changes.items()},
    }
    return from_gguf(GgufHeader(3, metadata, (), 0))


def llama3() -> Tokenizer:
    """As the published ``tokenizer.json`` of Llama 3 builds it."""
    found = Tokenizer(models.BPE(VOCABULARY, MERGES, ignore_merges=True))
    found.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    found.decoder = decoders.ByteLevel()
    return found


def smollm() -> Tokenizer:
    """As that of SmolLM 2, which cuts by the library's own pattern."""
    found = Tokenizer(models.BPE(VOCABULARY, MERGES))
    found.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return found


def gpt2() -> Tokenizer:
    found = Tokenizer(models.BPE(VOCABULARY, MERGES))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return found


PUBLISHED: dict[str, Tokenizer] = {
    "llama-bpe": llama3(),
    "qwen2": Qwen2Tokenizer(vocab=VOCABULARY, merges=MERGES).backend_tokenizer,
    "qwen35": Qwen3_5Tokenizer(vocab=VOCABULARY, merges=MERGES).backend_tokenizer,
    "smollm": smollm(),
    "gpt-2": gpt2(),
}


@pytest.mark.parametrize("pre", PUBLISHED)
@hypothesis.given(text=TEXTS)
def test_a_gguf_file_tokenises_as_the_tokenizer_it_was_made_from(pre: str, text: str) -> None:
    expected = PUBLISHED[pre].encode(text, add_special_tokens=False).ids
    found = FILES[pre].tokenizer.encode(text, add_special_tokens=False).ids
    assert found == expected


FILES = {pre: gguf(pre) for pre in RULES}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\u0915\u093f\u0924\u093e\u092c", ["\u0915\u093f\u0924\u093e\u092c"]),  # letters and vowel signs of Hindi
        ("\u0e17\u0e35\u0e48", ["\u0e17\u0e35\u0e48"]),  # a tone above a vowel above a letter
        ("x\u0301\u0323y", ["x\u0301\u0323y"]),
        ("!\u0301a", ["!\u0301a"]),  # a mark is no punctuation, and joins what follows it
        ("a\u20e3 12", ["a\u20e3", " ", "1", "2"]),
    ],
)
def test_marks_join_letters_in_qwen35_alone(text: str, words: list[str]) -> None:
    def cut(pre: str) -> list[str]:
        spans = FILES[pre].tokenizer.pre_tokenizer.pre_tokenize_str(text)
        return [text[start:end] for _, (start, end) in spans]

    assert cut("qwen35") == words != cut("qwen2")
    published = PUBLISHED["qwen35"].pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in published] == words


@pytest.mark.parametrize("pre", RULES)
@hypothesis.given(text=TEXTS)
def test_pieces_of_any_rules_join_to_the_text(pre: str, text: str) -> None:
    tokenizer = FILES[pre].tokenizer
    whole = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids)
    assert whole == (unicodedata.normalize("NFC", text) if RULES[pre].composes else text)


def test_a_word_that_is_a_piece_is_looked_up_before_anything_is_merged() -> None:
    for pre, looked_up in (("llama-bpe", True), ("tekken", True), ("qwen2", False), ("glm4", False)):
        tokens = FILES[pre].tokenizer.encode("hello", add_special_tokens=False).tokens
        assert (tokens == ["hello"]) is looked_up, pre


def test_the_first_token_of_a_completion_is_the_files_or_else_the_rules_matter() -> None:
    begin = len(VOCABULARY)
    for pre, begins in (("llama-bpe", True), ("tekken", True), ("qwen2", False), ("smollm", False), ("gpt-4o", False)):
        for value, expected in ((None, begins), (True, True), (False, False)):
            files = gguf(pre, **({} if value is None else {"add_bos_token": value}))
            ids = PromptFormat(files).build(InferenceRequest("m", prompt="hello")).ids
            assert (ids[0] == begin) is expected, (pre, value)


@pytest.mark.parametrize("pre", ["superbpe", "", 7, ["qwen2"]])
def test_unknown_rules_are_refused(pre: Any) -> None:
    with pytest.raises(UnsupportedTokenizerError, match=r"pre-tokenizer .* is not supported; known: .*qwen2"):
        gguf(pre)


def test_letters_are_normalised_for_whom_it_is_so() -> None:
    assert isinstance(FILES["qwen2"].tokenizer.normalizer, normalizers.NFC)
    assert FILES["llama-bpe"].tokenizer.normalizer is None
