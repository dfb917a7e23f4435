"""A model's tokenizer and chat template, from a GGUF file's metadata or a folder's tokenizer file.

BPE is rebuilt from GGUF vocabularies, byte-level or SentencePiece's; which rules go with a byte-level one is named in
the file (:mod:`neuron.text.gguf_rules`). Loads no torch.
"""

import dataclasses
import operator
import pathlib
from collections.abc import Mapping
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from cortex.wire.errors import ApiError
from neuron.errors import UnsupportedTokenizerError
from neuron.models.errors import CorruptWeightsError
from neuron.models.files import MAX_TOKENIZER_BYTES, quoted, read_bounded, read_json_object
from neuron.models.gguf import GgufHeader, read_header
from neuron.text.gguf_rules import RULES, Rules
from neuron.text.tekken import FILE, SPECIAL, load_tekken


@dataclasses.dataclass(frozen=True, slots=True)
class TextFiles:
    """Text files of a model. ``special_tokens`` holds the texts that templates refer to (``bos_token``, ...)."""

    tokenizer: Tokenizer
    chat_template: str | None
    special_tokens: Mapping[str, str]
    before: tuple[int, ...] = ()
    """The ids that a text of its own, which no template made, begins with."""
    behind: tuple[int, ...] = ()
    """The ids that such a text ends with where it is read as a whole, as for an embedding; a completion goes on."""


_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type
MAX_PIECE_CHARS: Final = 4096
"""Longest piece of a SentencePiece vocabulary: the time to read a piece is quadratic in its length."""
_SPACE: Final = "\u2581"
"""Character that stands for a space in SentencePiece."""


def load(path: pathlib.Path) -> TextFiles:
    """Load what belongs to the weights at ``path`` (a ``.gguf`` file or a folder).

    Raises:
        UnsupportedTokenizerError: there is no tokenizer, or one of a kind that is not known.
        CorruptWeightsError: the GGUF header is damaged.
    """
    if path.is_file():
        return from_gguf(read_header(path))
    return _from_folder(path)


def from_gguf(header: GgufHeader) -> TextFiles:
    """Rebuild a tokenizer from GGUF metadata: byte-level BPE (``gpt2``) or SentencePiece's (``llama``)."""
    meta = header.metadata
    kind = meta.get("tokenizer.ggml.model")
    build = {"gpt2": _byte_level, "llama": _sentencepiece}.get(str(kind))
    if build is None:
        raise UnsupportedTokenizerError(f"The GGUF tokenizer model {kind!r} is not supported; 'gpt2' and 'llama' are.")
    tokens: list[str] = meta.get("tokenizer.ggml.tokens", [])
    kinds: list[int] = meta.get("tokenizer.ggml.token_type", [])
    tokenizer = build(meta, tokens, kinds)
    special = [tokens[i] for i, token_kind in enumerate(kinds) if token_kind == _CONTROL]
    added = [tokens[i] for i, token_kind in enumerate(kinds) if token_kind == _USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in added])
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    found = {
        name: tokens[index]
        for name, key in names.items()
        if isinstance(index := meta.get(f"tokenizer.ggml.{key}_token_id"), int) and index < len(tokens)
    }
    # SentencePiece models begin a text with their first token unless their file says otherwise, others by their rules.
    adds = {"bos": kind == "llama" or _rules(meta).begins, "eos": False}
    before, behind = (
        _ids_of(tokenizer, found.get(f"{name}_token")) if meta.get(f"tokenizer.ggml.add_{name}_token", default) else ()
        for name, default in adds.items()
    )
    return TextFiles(tokenizer, meta.get("tokenizer.chat_template"), found, before, behind)


def _byte_level(meta: Mapping[str, Any], tokens: list[str], kinds: list[int]) -> Tokenizer:
    rules = _rules(meta)
    merges = [tuple(merge.split(" ", 1)) for merge in meta.get("tokenizer.ggml.merges", [])]
    tokenizer = Tokenizer(_bpe(tokens, merges, ignore_merges=rules.ignores_merges))
    if rules.composes:
        tokenizer.normalizer = rules.normalizer()
    tokenizer.pre_tokenizer = rules.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _rules(meta: Mapping[str, Any]) -> Rules:
    pre = meta.get("tokenizer.ggml.pre", "default")
    if not isinstance(pre, str) or pre not in RULES:
        known = ", ".join(sorted(RULES))
        raise UnsupportedTokenizerError(f"The GGUF pre-tokenizer {quoted(pre)} is not supported; known: {known}.")
    return RULES[pre]


def _sentencepiece(meta: Mapping[str, Any], tokens: list[str], kinds: list[int]) -> Tokenizer:
    """Rebuild SentencePiece's BPE: of two adjacent pieces those join first whose union has the best score.

    That is BPE with every split of every piece as a merge, best scores first; what the file leaves out can be counted
    from the vocabulary (1.3 s for the 262,144 pieces of Gemma 3). Unknown characters fall back to their bytes.
    """
    scores: list[float] = meta.get("tokenizer.ggml.scores", [])
    if len(scores) != len(tokens) or len(kinds) != len(tokens):
        raise UnsupportedTokenizerError(
            f"The GGUF vocabulary has {len(tokens)} pieces, {len(scores)} scores and {len(kinds)} kinds."
        )
    longest = max(map(len, tokens), default=0)
    if longest > MAX_PIECE_CHARS:
        raise UnsupportedTokenizerError(
            f"A piece of the GGUF vocabulary has {longest} characters; at most {MAX_PIECE_CHARS} are read."
        )
    pieces = {token for token, kind in zip(tokens, kinds, strict=True) if kind in {_NORMAL, _USER_DEFINED}}
    ranked: list[tuple[float, str, str]] = []
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        if kind == _NORMAL:
            for at in range(1, len(token)):
                if (left := token[:at]) in pieces and (right := token[at:]) in pieces:
                    ranked.append((score, left, right))
    ranked.sort(key=operator.itemgetter(0), reverse=True)
    unknown = meta.get("tokenizer.ggml.unknown_token_id")
    tokenizer = Tokenizer(
        _bpe(
            tokens,
            [(left, right) for _, left, right in ranked],
            unk_token=tokens[unknown] if isinstance(unknown, int) and unknown < len(tokens) else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    # Whether a text begins with a space is a key of the file; as in SentencePiece, it does by default.
    prefixed = bool(meta.get("tokenizer.ggml.add_space_prefix", True))
    replace = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if prefixed else replace
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefixed else []))
    return tokenizer


def _bpe(tokens: list[str], merges: list[Any], **options: Any) -> models.BPE:
    if not tokens or not merges:
        raise UnsupportedTokenizerError("The GGUF file has no vocabulary or no merges.")
    try:
        return models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, **options)
    except Exception as error:
        raise UnsupportedTokenizerError(f"The GGUF vocabulary and merges do not fit together: {error}.") from error


def _from_folder(folder: pathlib.Path) -> TextFiles:
    file = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_buffer(read_bounded(file, MAX_TOKENIZER_BYTES))
    except FileNotFoundError:
        return _from_tekken(folder)
    except ApiError:
        raise
    except Exception as error:
        raise UnsupportedTokenizerError(f"{file} cannot be read: {error}.") from error
    # They are saved with the last training's settings: a prompt is neither cut nor filled up.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if tokenizer.decoder is None and b'"ByteLevel"' in _state(tokenizer.pre_tokenizer):
        tokenizer.decoder = decoders.ByteLevel()
    config = read_json_object(folder / "tokenizer_config.json", MAX_TOKENIZER_BYTES) or {}
    _add_missing(tokenizer, config.get("added_tokens_decoder"))
    template = _read_text(folder / "chat_template.jinja") or _template(config.get("chat_template"))
    named = {**(read_json_object(folder / "special_tokens_map.json", MAX_TOKENIZER_BYTES) or {}), **config}
    special = {name: _token_text(named.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    special = {name: text for name, text in special.items() if text}
    before, behind = _framing(tokenizer)
    if config.get("add_bos_token") is True and not before:
        before = _ids_of(tokenizer, special.get("bos_token"))
    return TextFiles(tokenizer, template, special, before, behind)


def _from_tekken(folder: pathlib.Path) -> TextFiles:
    try:
        tokenizer = load_tekken(folder)
    except FileNotFoundError:
        raise UnsupportedTokenizerError(f"There is no tokenizer.json or {FILE} in {folder}.") from None
    special = {name: text for name, text in SPECIAL.items() if tokenizer.token_to_id(text) is not None}
    template = _read_text(folder / "chat_template.jinja") or None
    return TextFiles(tokenizer, template, special, _ids_of(tokenizer, special.get("bos_token")))


def _state(component: Any) -> bytes:
    return b"" if component is None else component.__getstate__()


def _add_missing(tokenizer: Tokenizer, listed: Any) -> None:
    """Add the tokens that ``tokenizer_config.json`` has beyond ``tokenizer.json``, in the order of their ids."""
    if not isinstance(listed, dict):
        return
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for _, entry in sorted((int(index), entry) for index, entry in listed.items() if index.isdecimal()):
        text = _token_text(entry)
        if text and text not in known:
            flags = {name: bool(entry.get(name, False)) for name in ("single_word", "lstrip", "rstrip", "normalized")}
            tokenizer.add_tokens([AddedToken(text, special=bool(entry.get("special", False)), **flags)])


def _framing(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that the tokenizer's post-processor puts before a text, and those it puts behind it."""
    bare, framed = (tokenizer.encode("a", add_special_tokens=adds).ids for adds in (False, True))
    added = len(framed) - len(bare)
    at = next((at for at in range(added + 1) if bare and framed[at : at + len(bare)] == bare), 0)
    return tuple(framed[:at]), tuple(framed[at + len(bare) :])


def _ids_of(tokenizer: Tokenizer, token: str | None) -> tuple[int, ...]:
    index = tokenizer.token_to_id(token) if token else None
    return () if index is None else (index,)


def _read_text(file: pathlib.Path) -> str:
    try:
        return read_bounded(file).decode()
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError as error:
        raise CorruptWeightsError(file, "not UTF-8") from error


def _template(value: Any) -> str | None:
    """``chat_template`` is a text, or a list of named ones of which ``default`` is meant."""
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _token_text(value: Any) -> str:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""
