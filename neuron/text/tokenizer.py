"""A model's tokenizer and chat template, from a GGUF file's metadata or a folder's ``tokenizer.json``.

Byte-level BPE is rebuilt from GGUF vocabularies; which pre-tokenizer goes with one is named in the file, and the table
below gives each its rules as the models' own ``tokenizer.json`` files have them. Loads no torch.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any, Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from neuron.errors import UnsupportedTokenizerError
from neuron.models.gguf import GgufHeader, read_header


@dataclasses.dataclass(frozen=True, slots=True)
class TextFiles:
    """What a model brings for text. ``special_tokens`` holds the texts templates ask for (``bos_token``, ...)."""

    tokenizer: Tokenizer
    chat_template: str | None
    special_tokens: Mapping[str, str]
    add_bos: bool


_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2: Final = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

# tokenizer.ggml.pre -> (split digits one by one, pattern)
_PRE_TOKENIZERS: Final[dict[str, tuple[bool, str]]] = {
    "default": (False, _GPT2),
    "gpt-2": (False, _GPT2),
    "smollm": (True, _GPT2),
    "llama-bpe": (False, _LLAMA3),
    "llama3": (False, _LLAMA3),
    "smaug-bpe": (False, _LLAMA3),
    "qwen2": (False, _QWEN2),
    "deepseek-r1-qwen": (False, _QWEN2),
}

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type


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
    """Rebuild a byte-level BPE tokenizer from GGUF metadata."""
    meta = header.metadata
    kind = meta.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise UnsupportedTokenizerError(f"The GGUF tokenizer model {kind!r} is not supported; 'gpt2' (BPE) is.")
    pre = meta.get("tokenizer.ggml.pre", "default")
    if pre not in _PRE_TOKENIZERS:
        known = ", ".join(sorted(_PRE_TOKENIZERS))
        raise UnsupportedTokenizerError(f"The GGUF pre-tokenizer {pre!r} is not supported; known: {known}.")
    tokens: list[str] = meta.get("tokenizer.ggml.tokens", [])
    merges = [tuple(merge.split(" ", 1)) for merge in meta.get("tokenizer.ggml.merges", [])]
    kinds: list[int] = meta.get("tokenizer.ggml.token_type", [])
    if not tokens or not merges:
        raise UnsupportedTokenizerError("The GGUF file has no vocabulary or no merges.")
    try:
        bpe = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    except Exception as error:
        raise UnsupportedTokenizerError(f"The GGUF vocabulary and merges do not fit together: {error}.") from error
    tokenizer = Tokenizer(bpe)
    splits_digits, pattern = _PRE_TOKENIZERS[pre]
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if splits_digits else []
    steps += [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
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
    return TextFiles(
        tokenizer, meta.get("tokenizer.chat_template"), found, bool(meta.get("tokenizer.ggml.add_bos_token", False))
    )


def _from_folder(folder: pathlib.Path) -> TextFiles:
    file = folder / "tokenizer.json"
    if not file.exists():
        raise UnsupportedTokenizerError(f"There is no tokenizer.json in {folder}.")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:
        raise UnsupportedTokenizerError(f"{file} cannot be read: {error}.") from error
    config = _read_json(folder / "tokenizer_config.json")
    template_file = folder / "chat_template.jinja"
    template = template_file.read_text() if template_file.exists() else _template(config.get("chat_template"))
    special = {name: _token_text(config.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    return TextFiles(tokenizer, template, {name: text for name, text in special.items() if text}, add_bos=False)


def _read_json(file: pathlib.Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise UnsupportedTokenizerError(f"{file} is not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise UnsupportedTokenizerError(f"{file} is not a JSON object.")
    return found


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
