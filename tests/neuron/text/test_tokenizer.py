"""Tokenizers rebuilt from GGUF metadata, against the algorithm they stand for, and those of folders."""

import itertools
import json
import pathlib
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from cortex.wire.request import InferenceRequest
from neuron.errors import UnsupportedTokenizerError
from neuron.models.gguf import GgufHeader
from neuron.text.prompt import PromptFormat
from neuron.text.tokenizer import TextFiles, from_gguf, load

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
    assert files.before == (1,)
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


def folder_of(tmp_path: pathlib.Path, tokenizer: Tokenizer, **config: Any) -> pathlib.Path:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    if config:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def letters(*added: str) -> Tokenizer:
    """A byte-level tokenizer without merges, and with ``added`` as special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    found = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens(list(added))
    return found


@pytest.mark.parametrize("direction", ["left", "right"])
def test_lengths_that_were_saved_with_a_tokenizer_do_not_hold_for_prompts(
    tmp_path: pathlib.Path, direction: Any
) -> None:
    saved = letters("<s>", "<pad>")
    saved.enable_truncation(64, direction=direction)
    saved.enable_padding(length=4096, pad_token="<pad>", pad_id=257, direction=direction)
    prompts = PromptFormat(load(folder_of(tmp_path, saved)))
    assert len(prompts.build(InferenceRequest("m", prompt="x" * 3000)).ids) == 3000
    assert len(prompts.build(InferenceRequest("m", prompt="x")).ids) == 1
    assert len(prompts.build(InferenceRequest("m", prompt="x" * 100), whole=True).ids) == 100


def test_a_completion_begins_as_its_tokenizer_begins_texts_and_does_not_end(tmp_path: pathlib.Path) -> None:
    saved = letters("<s>", "</s>")
    saved.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    files = load(folder_of(tmp_path, saved))
    prompts, x = PromptFormat(files), files.tokenizer.token_to_id("x")
    assert prompts.build(InferenceRequest("m", prompt="x")).ids == [256, x]
    assert prompts.build(InferenceRequest("m", prompt="<s>x")).ids == [256, x], "not twice"
    assert prompts.build(InferenceRequest("m", prompt="x"), whole=True).ids == [256, x, 257]


def test_tokens_added_by_a_tokenizers_configuration(tmp_path: pathlib.Path) -> None:
    """The first token, tokens that ``tokenizer.json`` lacks, and a decoder where the file has none."""
    saved = letters("<s>")
    saved.decoder = None
    added = {"257": {"content": "<|end|>", "special": True}, "256": {"content": "<s>", "special": True}}
    files = load(folder_of(tmp_path, saved, add_bos_token=True, bos_token="<s>", added_tokens_decoder=added))
    assert PromptFormat(files).build(InferenceRequest("m", prompt="ä<|end|>")).ids[0] == 256
    ids = files.tokenizer.encode("ä b<|end|>", add_special_tokens=False).ids
    assert ids[-1] == 257
    assert files.tokenizer.decode(ids) == "ä b"
