"""Tokens that end an answer, from all of a model's files.

Files disagree: ``generation_config.json`` names the end of a message, ``config.json`` the end of a text, and a GGUF
file often lists only one of them. All of these count, and also the tokens that end a message by their text in the known
model families, where the vocabulary has them as tokens: a template ends messages with them, so a model that generates
one has ended its own.
"""

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, Final, TypeVar

import msgspec

from neuron.models.errors import CorruptWeightsError
from neuron.models.files import MAX_TOKENIZER_BYTES, quoted, read_bounded

TURN_ENDS: Final = frozenset(
    {
        "<|im_end|>",  # ChatML: Qwen, SmolLM, Hermes
        "<|eot_id|>",  # Llama 3
        "<|eom_id|>",  # Llama 3, before the result of a built-in tool
        "<|eot|>",  # Llama 4
        "<|eom|>",
        "<end_of_turn>",  # Gemma 2 and 3
        "<turn|>",  # Gemma 4
        "<|end|>",  # Phi 3 and 4
        "<|endoftext|>",
        "<|end_of_text|>",  # Llama 3, Granite
        "<|end_of_turn|>",
        "<end_of_utterance>",  # SmolVLM
        "<|return|>",  # gpt-oss
        "<|call|>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",  # DeepSeek
        "<|END_OF_TURN_TOKEN|>",  # Command R
        "[EOT]",  # Kimi
        "[EOS]",
        "<EOT>",
        "< EOT >",
        "_<EOT>",  # CodeLlama
    }
)
"""Tokens that end a message or a text in chat templates, from models' files and llama.cpp's list."""

MISTRAL_END: Final = "</s>"
"""Token that ends a text in Mistral's models."""
MAX_NAMED: Final = 256
"""Most tokens in one field of a file."""
_HARMONY: Final = frozenset({"<|return|>", "<|call|>"})
"""Tokens of gpt-oss, where ``<|end|>`` ends one message of several in an answer."""
_GLM: Final = frozenset({"<|user|>", "<|observation|>"})
"""Tokens of GLM, which ends a message with the role of the next one."""
_FILES: Final = frozenset({"<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"})
"""Tokens of Qwen, which goes on with another file where the one that it fills in has ended."""
_GEMMA_4: Final = frozenset({"<turn|>", "<|tool_response>"})
"""Tokens of Gemma 4, which ends a tool call where the result would begin."""


def ends_by_text(special: Mapping[str, int]) -> tuple[int, ...]:
    """Return the ids of the ``special`` tokens, by text, that end a message."""
    ends = set(TURN_ENDS)
    if special.keys() >= _HARMONY:
        ends.discard("<|end|>")
    for together in (_GLM, _GEMMA_4, _FILES):
        if special.keys() >= together:
            ends |= together
    return tuple(index for text, index in special.items() if text in ends)


def token_ids(values: Mapping[str, Any], key: str, path: pathlib.Path) -> tuple[int, ...]:
    """Return the ids that ``values`` have by ``key``: a single id, a list, or none.

    Raises :class:`CorruptWeightsError`.
    """
    value = values.get(key)
    found = tuple(value) if isinstance(value, list) else () if value is None else (value,)
    if len(found) > MAX_NAMED:
        raise CorruptWeightsError(path, f"{key} lists {len(found)} tokens where at most {MAX_NAMED} are taken")
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in found):
        raise CorruptWeightsError(path, f"{key} is {quoted(value)}, not token ids")
    return tuple(token for token in found if 0 <= token < 1 << 31)


def folder_ends(folder: pathlib.Path, configs: Iterable[Mapping[str, Any]]) -> tuple[int, ...]:
    """Return the end tokens of a model in ``folder``: first the ones that its ``configs`` name, in order."""
    path = folder / "config.json"
    named = [token for config in configs for token in token_ids(config, "eos_token_id", path)]
    tokenizer = _read(folder / "tokenizer.json", _TokenizerFile)
    added = {token.content: token.id for token in tokenizer.added_tokens}
    if not (folder / "tokenizer.json").exists() and (folder / "tekken.json").exists():
        # Mistral's own file, which has a name for the end of a text only in its later versions.
        control = _read(folder / "tekken.json", _TekkenFile).special_tokens or [_Control(2, MISTRAL_END)]
        added |= {token.token_str: token.rank for token in control}
        named += [added[MISTRAL_END]] if MISTRAL_END in added else []
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        config = _read(folder / file, _TokenizerConfig)
        added |= {
            text: int(index)
            for index, token in config.added_tokens_decoder.items()
            if index.isdecimal() and (text := _text(token)) and text not in added
        }
        text = _text(config.eos_token)
        if text in added:
            named.append(added[text])
        elif text:
            named += _in_vocabulary(folder / "tokenizer.json", text)
    return tuple(dict.fromkeys(token for token in (*named, *ends_by_text(added)) if 0 <= token < 1 << 31))


GGUF_ENDS: Final = ("eos", "eot", "eom")
_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type


def gguf_ends(metadata: Mapping[str, Any], path: pathlib.Path) -> tuple[int, ...]:
    """Return the end tokens of a GGUF file."""
    named = [token for kind in GGUF_ENDS for token in token_ids(metadata, f"tokenizer.ggml.{kind}_token_id", path)]
    tokens, kinds = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    special = {}
    if isinstance(tokens, list) and isinstance(kinds, list):
        special = {
            text: index
            for index, (text, kind) in enumerate(zip(tokens, kinds, strict=False))
            if kind in {_CONTROL, _USER_DEFINED} and isinstance(text, str)
        }
    return tuple(dict.fromkeys([*named, *ends_by_text(special)]))


class _AddedToken(msgspec.Struct):
    id: int
    content: str


class _TokenizerFile(msgspec.Struct):
    """Fields that are read of a tokenizer file."""

    added_tokens: list[_AddedToken] = []


class _Control(msgspec.Struct):
    rank: int
    token_str: str


class _TekkenFile(msgspec.Struct):
    """Fields that are read of Mistral's own tokenizer file."""

    special_tokens: list[_Control] | None = None


class _TokenizerConfig(msgspec.Struct):
    eos_token: Any = None
    added_tokens_decoder: dict[str, Any] = {}


class _Model(msgspec.Struct):
    vocab: dict[str, int] | list[tuple[str, float]] = {}


class _WholeTokenizerFile(msgspec.Struct):
    model: _Model = msgspec.field(default_factory=_Model)


T = TypeVar("T")


def _read(file: pathlib.Path, kind: type[T]) -> T:
    """Return the ``kind`` in ``file``; an empty one where it is unreadable, which the tokenizer's reader reports."""
    try:
        return msgspec.json.decode(read_bounded(file, MAX_TOKENIZER_BYTES), type=kind)
    except (FileNotFoundError, CorruptWeightsError, msgspec.DecodeError, UnicodeError, RecursionError):
        return kind()


def _text(token: object) -> str:
    """Return the text of a token that is a string or an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _in_vocabulary(file: pathlib.Path, token: str) -> list[int]:
    """Return the id of a token that is not an added one, as a list of one or none."""
    vocabulary = _read(file, _WholeTokenizerFile).model.vocab
    if isinstance(vocabulary, dict):
        return [vocabulary[token]] if token in vocabulary else []
    return [index for index, (piece, _) in enumerate(vocabulary) if piece == token][:1]
