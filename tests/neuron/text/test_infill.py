"""Prompts for filling in: by the tokens that a vocabulary has for it, or not at all."""

import pathlib

import pytest
from tokenizers import Tokenizer, models

from cortex.wire.errors import UnsupportedParameterError
from cortex.wire.request import InferenceRequest
from neuron.text import tokenizer
from neuron.text.infill import infill_form
from neuron.text.prompt import PromptFormat


def with_tokens(*names: str) -> Tokenizer:
    found = Tokenizer(models.BPE({"a": 0}, []))
    found.add_special_tokens(list(names))
    return found


@pytest.mark.parametrize(
    ("names", "ids"),
    [
        (("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"), [1, 7, 2, 8, 3]),
        (("<fim_prefix>", "<fim_suffix>", "<fim_middle>"), [1, 7, 2, 8, 3]),
        (("▁<PRE>", "▁<SUF>", "▁<MID>"), [1, 7, 2, 8, 3]),
        (("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"), [1, 7, 2, 8, 3]),
        (("[PREFIX]", "[SUFFIX]"), [2, 8, 1, 7]),
    ],
)
def test_the_vocabulary_selects_the_form(names: tuple[str, ...], ids: list[int]) -> None:
    form = infill_form(with_tokens(*names))
    assert form is not None
    assert form.ids([7], [8]) == ids


@pytest.mark.parametrize(
    "names", [(), ("<fim_prefix>", "<fim_suffix>"), ("<|fim_prefix|>", "<fim_suffix>", "[SUFFIX]")]
)
def test_a_vocabulary_without_them_cannot(names: tuple[str, ...]) -> None:
    assert infill_form(with_tokens(*names)) is None


def test_a_model_that_cannot_fill_in_is_an_error(talking_llama: pathlib.Path) -> None:
    prompts = PromptFormat(tokenizer.load(talking_llama))
    with pytest.raises(UnsupportedParameterError) as caught:
        prompts.build(InferenceRequest("m", prompt="a", suffix="b"))
    assert caught.value.param == "suffix"


@pytest.mark.parametrize("prompt", ["ab", (3, 4)])
def test_the_suffix_is_in_the_prompt(
    talking_llama: pathlib.Path, tmp_path: pathlib.Path, prompt: str | tuple[int, ...]
) -> None:
    vocabulary = Tokenizer.from_file(str(talking_llama / "tokenizer.json"))
    vocabulary.add_special_tokens(["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"])
    vocabulary.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text((talking_llama / "config.json").read_text())
    names = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
    before, behind, between = (vocabulary.token_to_id(name) for name in names)
    ids = list(prompt) if isinstance(prompt, tuple) else vocabulary.encode(prompt).ids
    found = PromptFormat(tokenizer.load(tmp_path)).build(InferenceRequest("m", prompt=prompt, suffix="12"))
    assert found.ids == [before, *ids, behind, *vocabulary.encode("12").ids, between]
