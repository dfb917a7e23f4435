"""The decoder that the daemon receives: nothing in it runs without bounds."""

import pytest
from tokenizers import Regex, Tokenizer, decoders, models

from neuron.errors import UnsupportedTokenizerError
from neuron.text.model_text import decoder_of


def with_decoder(decoder: object) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.decoder = decoder
    return tokenizer


SPACES = decoders.Replace("\u2581", " ")


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.Sequence([SPACES, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
        decoders.Sequence([SPACES, decoders.ByteFallback(), decoders.Fuse()]),
        decoders.Metaspace(),
        decoders.ByteLevel(),
        decoders.WordPiece(),
    ],
)
def test_decoders_of_models_in_use_pass(decoder: object) -> None:
    assert Tokenizer.from_buffer(decoder_of(with_decoder(decoder))).decode([0]) == "a"


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.Sequence([decoders.Fuse(), *[decoders.Replace("a", "aaaaaaaa")] * 8]),
        decoders.Sequence([decoders.Sequence([decoders.Fuse()]), SPACES]),
        decoders.Replace("a", "aaaaa"),
        decoders.Sequence([decoders.Replace("a", "aaa")] * 2),
        decoders.Replace("", "a"),
        decoders.Replace(Regex("(a+)+b"), ""),
        decoders.Sequence([decoders.ByteFallback()] * 9),
    ],
)
def test_a_decoder_that_makes_much_of_little_is_refused(decoder: object) -> None:
    with pytest.raises(UnsupportedTokenizerError) as caught:
        decoder_of(with_decoder(decoder))
    assert caught.value.status == 422
