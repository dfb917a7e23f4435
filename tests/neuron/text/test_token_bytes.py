"""The bytes of tokens, against what the tokenizers' own decoders make of whole texts."""

import json
import pathlib
from collections.abc import Callable

import hypothesis
import pytest
from hypothesis import strategies
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from cortex.wire.request import FormatKind, InferenceRequest, OutputFormat
from neuron.device.jobs import ConstraintSettings
from neuron.engine.constraint import Constraint
from neuron.text import tokenizer as tokenizers_of
from neuron.text.grammar import constraint_of
from neuron.text.matcher import Vocabulary
from neuron.text.token_bytes import special_ids, token_bytes

SPACE = "\u2581"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LETTERS = [*'abcdefghijklmnopqrstuvwxyz{}[]":,.0123456789', SPACE, "Ġ", "Ċ", "ä", "ġ"]
ENDS = ["<pad>", "<s>", "</s>"]


def sentencepiece(*, strips: bool) -> Tokenizer:
    """As Gemma's (which has pieces with letters of GPT-2's byte table), or as Llama 2's, which strips a first space."""
    pieces = [*ENDS, "<unk>", *BYTES, *LETTERS, SPACE + "a", "Ġa", '{"', "\n\n"]
    merges = [(SPACE, "a"), ("Ġ", "a"), ("{", '"')]
    ids = {piece: index for index, piece in enumerate(pieces)}
    found = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", SPACE)
    found.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if strips else replace
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    found.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strips else steps)
    found.add_tokens([AddedToken("\n\n", normalized=False), AddedToken(SPACE * 2, normalized=False)])
    return found


def byte_level(*, in_a_sequence: bool) -> Tokenizer:
    """As GPT-2's, or as those of the models that put the decoder into a sequence."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {piece: index for index, piece in enumerate([*ENDS, *letters, "Ġa", SPACE.join("ab")])}
    found = Tokenizer(models.BPE(ids, [("Ġ", "a")]))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    split = pre_tokenizers.Split(Regex(r"\p{N}| ?\p{L}+|\s+|[^\s\p{L}\p{N}]+"), "isolated")
    found.pre_tokenizer = pre_tokenizers.Sequence([split, level]) if in_a_sequence else level
    found.decoder = (
        decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()]) if in_a_sequence else decoders.ByteLevel()
    )
    found.add_tokens(["<tool_call>", "two words"])
    return found


def unigram() -> Tokenizer:
    """As those of T5 and XLM-R."""
    pieces = [(piece, -float(rank)) for rank, piece in enumerate([*ENDS, "<unk>", *LETTERS, SPACE + "a", "ab"])]
    found = Tokenizer(models.Unigram(pieces, unk_id=3))
    found.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    found.decoder = decoders.Metaspace(prepend_scheme="always")
    return found


def word_piece() -> Tokenizer:
    pieces = [*ENDS, "[UNK]", *"ab.,!'", "##a", "##b", "ab", "##ab", "n't"]
    found = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    found.decoder = decoders.WordPiece()
    return found


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "gemma": lambda: sentencepiece(strips=False),
    "llama 2": lambda: sentencepiece(strips=True),
    "gpt-2": lambda: byte_level(in_a_sequence=False),
    "qwen": lambda: byte_level(in_a_sequence=True),
    "t5": unigram,
    "bert": word_piece,
}


@pytest.fixture(params=KINDS, scope="module")
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    made: Tokenizer = KINDS[request.param]()
    made.add_special_tokens(ENDS)
    return made


@hypothesis.settings(max_examples=60)
@hypothesis.given(strategies.data())
def test_the_bytes_of_tokens_make_up_the_text_of_any(tokenizer: Tokenizer, data: strategies.DataObject) -> None:
    special = {*special_ids(tokenizer)}
    usable = [index for index in range(tokenizer.get_vocab_size()) if index not in special]
    ids = data.draw(strategies.lists(strategies.sampled_from(usable), max_size=12))
    table = token_bytes(tokenizer)
    # Behind a token that takes all that a decoder does at the beginning of a text.
    first = tokenizer.token_to_id("a")
    text = tokenizer.decode([first, *ids])
    joined = table[first] + b"".join(table[index] for index in ids)
    if isinstance(tokenizer.model, models.WordPiece):
        joined = joined.removeprefix(b" ")
    assert joined.decode(errors="replace") == text or "\ufffd" in text


def test_a_lone_byte_and_a_line_end_are_bytes_in_a_vocabulary_with_letters_of_gpt2s_table() -> None:
    found = sentencepiece(strips=False)
    table = token_bytes(found)
    assert table[found.token_to_id("<0x0A>")] == b"\n"
    assert table[found.token_to_id("Ġa")] == "Ġa".encode()
    assert table[found.token_to_id(SPACE + "a")] == b" a"
    assert table[found.token_to_id(SPACE * 2)] == b"  "


@pytest.mark.parametrize("kind", ["gemma", "llama 2", "gpt-2", "qwen"])
def test_a_schema_with_a_space_can_be_followed_and_no_raw_line_end_gets_into_a_string(kind: str) -> None:
    found = KINDS[kind]()
    found.add_special_tokens(ENDS)
    schema = {"type": "object", "properties": {"two words": {"type": "string"}}, "required": ["two words"]}
    asked = OutputFormat(FormatKind.JSON_SCHEMA, json.dumps(schema))
    grammar = constraint_of(InferenceRequest("m", prompt="x", output_format=asked))
    assert grammar is not None
    vocabulary = Vocabulary(found, found.get_vocab_size(), (found.token_to_id("</s>"),))
    constraint = Constraint(vocabulary.compile(grammar), ConstraintSettings(grammar), vocabulary.num_tokens)
    table = token_bytes(found)
    plain = [index for index in range(found.get_vocab_size()) if index not in special_ids(found)]

    def allowed() -> list[int]:
        mask = constraint.mask()
        assert mask is not None
        bits = mask.view("uint32")
        return [index for index in plain if int(bits[index // 32]) >> index % 32 & 1]

    rest = b'{"two words":"a'
    while rest:
        token = next(index for index in allowed() if table[index] and rest.startswith(table[index]))
        constraint.accept(token)
        rest = rest[len(table[token]) :]
    spelt = {table[index] for index in allowed()}
    assert b" " in spelt
    assert not {text for text in spelt if b"\n" in text}, "a raw line end is no JSON"


def test_the_real_gemma_is_no_byte_level_vocabulary(gemma3_gguf: pathlib.Path) -> None:
    found = tokenizers_of.load(gemma3_gguf).tokenizer
    table = token_bytes(found)
    assert any("Ġ" in piece for piece in found.get_vocab())
    text = "two words\n\n{\"a\": 'ä🦙'}  \t<b>x</b>"
    ids = found.encode(text, add_special_tokens=False).ids
    assert b"".join(table[index] for index in ids).decode() == text
