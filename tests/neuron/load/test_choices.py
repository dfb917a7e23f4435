"""Choices of a repository, by the names of files that publishers use."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuron.errors import SourceNotFoundError
from neuron.load.choices import SAFETENSORS, Choice, RepositoryFile, choose, find_choices, tag_of


def choices_of(*paths: str) -> tuple[Choice, ...]:
    return find_choices([RepositoryFile(path, 1000 + len(path)) for path in paths])


@pytest.mark.parametrize(
    ("path", "tag"),
    [
        ("Llama-3.2-3B-Instruct-Q4_K_M", "Q4_K_M"),
        ("qwen2.5-0.5b-instruct-q4_k_m", "Q4_K_M"),
        ("Qwen3-30B-A3B-Instruct-2507-UD-Q4_K_XL", "UD-Q4_K_XL"),
        ("BF16/Qwen3-30B-A3B-BF16", "BF16"),
        ("UD-IQ1_S/DeepSeek-R1", "UD-IQ1_S"),
        ("DeepSeek-R1-UD-TQ1_0", "UD-TQ1_0"),
        ("mistral-7b-instruct-v0.2.Q4_0", "Q4_0"),
        ("Model.i1-IQ4_XS", "IQ4_XS"),
        ("gemma-3-270m-it-qat-Q4_0", "Q4_0"),
        ("Phi-3-mini-4k-instruct-q4", "Q4"),
        ("Phi-3-mini-4k-instruct-fp16", "FP16"),
        ("Model-Q4_0_4_4", "Q4_0_4_4"),
        ("gpt-oss-20b-mxfp4", "MXFP4"),
        ("Model-Q8_0-v2", "Q8_0"),
        ("Model_Q6_K", "Q6_K"),
        ("ggml-model", ""),
        ("Qwen2-7B", ""),
    ],
)
def test_the_tag_in_a_name(path: str, tag: str) -> None:
    assert tag_of(path) == tag


def test_a_split_file_is_one_choice_and_an_incomplete_one_is_none() -> None:
    parts = [f"Q8_0/m-Q8_0-{number:05d}-of-00003.gguf" for number in (3, 1, 2)]
    (choice,) = choices_of(*parts, "Q4_0/m-Q4_0-00001-of-00002.gguf")
    assert choice.tag == "Q8_0"
    assert [file.path for file in choice.files] == sorted(parts)
    assert choose([choice], parts[0], "o/n") is choice


def test_what_is_no_choice() -> None:
    paths = ("mmproj-F16.gguf", "m-Q4_K_M.gguf", "imatrix_unsloth.gguf", "m.imatrix", "README.md", "x/mmproj-BF16.gguf")
    assert [choice.name for choice in choices_of(*paths)] == ["Q4_K_M"]


def test_safetensors_with_what_belongs_to_them() -> None:
    wanted = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "1_Pooling/config.json"]
    wanted += ["chat_template.jinja", "model.safetensors.index.json", "tokenizer.model", "config.json"]
    unwanted = [
        "consolidated.safetensors",
        "original/params.json",
        "README.md",
        "onnx/model.safetensors",
        "pytorch_model.bin",
    ]
    (choice,) = choices_of(*unwanted, *reversed(wanted))
    assert choice.tag == SAFETENSORS
    assert {file.path for file in choice.files} == set(wanted)
    assert choice.files[-1].path == "config.json", "the last to come, so that a folder with it is whole"
    assert not choices_of(*wanted[1:]), "a part is missing"


@pytest.mark.parametrize(
    ("there", "default"),
    [
        (["Q8_0", "Q4_K_M", "UD-Q4_K_XL", "F16"], "Q4_K_M"),
        (["Q8_0", "UD-Q4_K_XL", "Q4_0"], "UD-Q4_K_XL"),
        (["Q8_0", "Q5_K_M", "Q2_K"], "Q5_K_M"),
        (["IQ1_S"], "IQ1_S"),
    ],
)
def test_the_default_tag(there: list[str], default: str) -> None:
    assert choose(choices_of(*(f"m-{tag}.gguf" for tag in there)), None, "o/n").tag == default


def test_safetensors_are_the_default_where_there_are_any() -> None:
    found = choices_of("m-Q4_K_M.gguf", "model.safetensors", "config.json")
    assert choose(found, None, "o/n").tag == SAFETENSORS
    assert choose(found, "q4_k_m", "o/n").tag == "Q4_K_M"


def test_tags_in_any_case_and_without_the_prefix_of_dynamic_files() -> None:
    found = choices_of("m-UD-Q4_K_XL.gguf", "m-Q4_K_M.gguf", "m-UD-Q2_K.gguf", "m-Q2_K.gguf")
    for wanted, tag in (("ud-q4_k_xl", "UD-Q4_K_XL"), ("Q4_k_XL", "UD-Q4_K_XL"), ("q2_k", "Q2_K")):
        assert choose(found, wanted, "o/n").tag == tag


def test_a_tag_that_does_not_exist_answers_with_those_that_do() -> None:
    found = choices_of("m-Q4_K_M.gguf", "m-Q8_0.gguf", "model.safetensors", "config.json")
    with pytest.raises(SourceNotFoundError) as caught:
        choose(found, "Q3_K_S", "o/n")
    for part in ("o/n", "'Q3_K_S'", "Q4_K_M", "Q8_0", "safetensors"):
        assert part in caught.value.message
    with pytest.raises(SourceNotFoundError, match="no weights"):
        choose((), None, "o/n")
    with pytest.raises(SourceNotFoundError, match=r"a-Q8_0\.gguf, b-Q8_0\.gguf"):
        choose(choices_of("a-Q8_0.gguf", "b-Q8_0.gguf"), "q8_0", "o/n")
    assert choose(choices_of("a-Q8_0.gguf", "b-Q8_0.gguf"), "b-Q8_0.gguf", "o/n").files[0].path == "b-Q8_0.gguf"


@given(st.lists(st.text(st.sampled_from("abQ4_K-./0125of"), max_size=20).map(lambda text: text + ".gguf"), unique=True))
def test_any_names_make_disjoint_choices(paths: list[str]) -> None:
    found = [file.path for choice in choices_of(*paths) for file in choice.files]
    assert len(found) == len(set(found))
    assert set(found) <= set(paths)
