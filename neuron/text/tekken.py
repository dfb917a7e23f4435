"""Mistral's own tokenizer file, ``tekken.json``, which some of its repositories have in place of ``tokenizer.json``.

It lists the pieces of a byte-level BPE by rank, as tiktoken has them: of two adjacent pieces those join first whose
union has the lowest rank. Ids begin with control tokens, of which older files name none. Format:
https://github.com/mistralai/mistral-common (``tokens/tokenizers/tekken.py``). Loads no torch.
"""

import base64
import binascii
import pathlib
from collections.abc import Iterator
from typing import Final

import msgspec
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from neuron.errors import UnsupportedTokenizerError
from neuron.models.files import MAX_TOKENIZER_BYTES, read_bounded
from neuron.text.token_bytes import byte_of_character

FILE: Final = "tekken.json"
MAX_TOKENS: Final = 1 << 20
MAX_PIECE_BYTES: Final = 1024
"""Longest piece: the time to find a piece's parts is quadratic in its length."""
CONTROL: Final = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
"""Control tokens of files that name none."""
SPECIAL: Final = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
"""Texts of the tokens that templates refer to."""


class _Config(msgspec.Struct):
    pattern: str
    default_vocab_size: int
    default_num_special_tokens: int


class _Piece(msgspec.Struct):
    token_bytes: str


class _Control(msgspec.Struct):
    rank: int
    token_str: str
    is_control: bool = True


class _File(msgspec.Struct):
    config: _Config
    vocab: list[_Piece]
    special_tokens: list[_Control] | None = None


def load_tekken(folder: pathlib.Path) -> Tokenizer:
    """Return the tokenizer in ``folder``.

    Raises ``FileNotFoundError`` if there is none, :class:`UnsupportedTokenizerError` if it contradicts itself.
    """
    path = folder / FILE
    try:
        file = msgspec.json.decode(read_bounded(path, MAX_TOKENIZER_BYTES), type=_File)
        return _built(file)
    except (msgspec.DecodeError, UnicodeError, RecursionError, binascii.Error, ValueError) as error:
        raise UnsupportedTokenizerError(f"{path} cannot be read: {error}.") from error


def _built(file: _File) -> Tokenizer:
    config = file.config
    num_control, num_pieces = config.default_num_special_tokens, config.default_vocab_size
    num_pieces -= num_control
    if not 0 <= num_control <= MAX_TOKENS or not 256 <= num_pieces <= min(len(file.vocab), MAX_TOKENS):
        raise ValueError(f"{config.default_vocab_size} tokens, {num_control} of them control tokens, are impossible")
    control = {i: _Control(i, f"<SPECIAL_{i}>") for i in range(num_control)}
    named = file.special_tokens
    control |= {each.rank: each for each in named} if named is not None else {
        i: _Control(i, text) for i, text in enumerate(CONTROL[:num_control])
    }  # fmt: skip
    pieces = [base64.b64decode(piece.token_bytes, validate=True) for piece in file.vocab[:num_pieces]]
    if len(control) != num_control or pieces[:256] != [bytes([i]) for i in range(256)]:
        raise ValueError("control tokens beyond their number, or bytes that do not come first")
    letters = {byte: character for character, byte in byte_of_character().items()}
    written = ["".join(letters[byte] for byte in piece) for piece in pieces]
    ids = {each.token_str: rank for rank, each in control.items()}
    ids |= {piece: num_control + rank for rank, piece in enumerate(written)}
    if len(ids) != config.default_vocab_size:
        raise ValueError("a token is listed twice")
    try:
        tokenizer = Tokenizer(models.BPE(vocab=ids, merges=list(_merges(written)), ignore_merges=True))
        split = pre_tokenizers.Split(Regex(config.pattern), behavior="isolated")
    except Exception as error:
        raise ValueError(str(error)) from error
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for special in (True, False):
        added = [control[rank].token_str for rank in sorted(control) if control[rank].is_control is special]
        tokenizer.add_tokens([AddedToken(text, normalized=False, special=special) for text in added])
    return tokenizer


def _merges(pieces: list[str]) -> Iterator[tuple[str, str]]:
    """Yield every split of every piece into two pieces, by rank."""
    known = set(pieces)
    for piece in pieces:
        if len(piece) > MAX_PIECE_BYTES:
            raise ValueError(f"a piece has {len(piece)} bytes; at most {MAX_PIECE_BYTES} are read")
        for at in range(1, len(piece)):
            if (left := piece[:at]) in known and (right := piece[at:]) in known:
                yield left, right
