"""Pre-tokenisation rules of GGUF's byte-level vocabularies, by the name in ``tokenizer.ggml.pre``.

A GGUF file has the vocabulary and the merges of a ``tokenizer.json`` and one name for all else: what is normalised,
what patterns cut, whether a word that is a piece is looked up before anything is merged, whether a text begins with a
first token. The rules are those of the models' published ``tokenizer.json`` files (Qwen's also in transformers); which
name means which, and the defaults of the first token, are llama.cpp's (src/llama-vocab.cpp). Names that are not here
are refused: a wrong rule would tokenise otherwise without an error.
"""

import dataclasses
from typing import Any, Final

from tokenizers import Regex, normalizers, pre_tokenizers


@dataclasses.dataclass(frozen=True, slots=True)
class Rules:
    """The rules of one name. ``patterns`` cut in turn, each what the ones before it have left."""

    patterns: tuple[str, ...]
    splits_digits: bool = False
    """Whether digits are cut off first, one by one."""
    composes: bool = False
    """Whether a text is brought into Unicode's form NFC."""
    ignores_merges: bool = False
    """Whether a word that is a piece is that piece, whatever the merges make of it."""
    begins: bool = False
    """Whether a text begins with the first token where the file has no key for it."""

    def normalizer(self) -> Any:
        """Return the normalizer, if there is one."""
        return normalizers.NFC() if self.composes else None

    def pre_tokenizer(self) -> Any:
        """Return the pre-tokenizer, which ends in bytes."""
        steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if self.splits_digits else []
        steps += [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in self.patterns]
        return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2: Final = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35: Final = _QWEN2.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]+", r"[^\s\p{L}\p{M}\p{N}]+")
_UPPER: Final = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SUFFIX: Final = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_REST: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_O200K: Final = rf"{_UPPER}*{_LOWER}+{_SUFFIX}|{_UPPER}+{_LOWER}*{_SUFFIX}|\p{{N}}{{1,3}}{_REST}"
_TEKKEN: Final = rf"{_UPPER}*{_LOWER}+|{_UPPER}+{_LOWER}*|\p{{N}}{_REST}"
_DEEPSEEK3_WORDS: Final = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK3: Final = (r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3_WORDS)

_LLAMA3_RULES: Final = Rules((_LLAMA3,), ignores_merges=True, begins=True)
_QWEN2_RULES: Final = Rules((_QWEN2,), composes=True)
_DIGITS: Final = Rules((_GPT2,), splits_digits=True)

RULES: Final[dict[str, Rules]] = {
    "default": Rules((_GPT2,)),
    "gpt-2": Rules((_GPT2,)),
    "phi-2": Rules((_GPT2,)),
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": dataclasses.replace(_DIGITS, composes=True),
    "llama-bpe": _LLAMA3_RULES,
    "llama3": _LLAMA3_RULES,
    "llama-v3": _LLAMA3_RULES,
    "lfm2": _LLAMA3_RULES,
    "pixtral": _LLAMA3_RULES,
    "falcon3": _LLAMA3_RULES,
    "smaug-bpe": Rules((_LLAMA3,)),
    "dbrx": Rules((_LLAMA3,)),
    "glm4": Rules((_LLAMA3,)),
    "chatglm-bpe": Rules((_LLAMA3,)),
    "qwen2": _QWEN2_RULES,
    "deepseek-r1-qwen": dataclasses.replace(_QWEN2_RULES, composes=False),
    "qwen35": Rules((_QWEN35,), composes=True),
    "gpt-4o": Rules((_O200K,)),
    "llama4": Rules((_O200K,)),
    "tekken": Rules((_TEKKEN,), ignores_merges=True, begins=True),
    "deepseek-v3": Rules(_DEEPSEEK3),
}
"""Rules by ``tokenizer.ggml.pre``."""
