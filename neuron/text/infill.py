"""Filling in the middle: the prompt of a model from the text before and the text after.

Models trained for it have tokens for it; the tokens in a vocabulary determine the form of the prompt.
Knows the forms that are published, and no model by name.
"""

import dataclasses
from collections.abc import Callable

from tokenizers import Tokenizer

Encode = Callable[[str], list[int]]


@dataclasses.dataclass(frozen=True, slots=True)
class InfillForm:
    """The tokens of a form. With ``suffix_first`` the text after comes before the text before."""

    prefix: int
    suffix: int
    middle: int | None
    suffix_first: bool = False

    def ids(self, before: list[int], behind: list[int]) -> list[int]:
        """Return the prompt that asks for what is between two texts."""
        if self.suffix_first:
            found = [self.suffix, *behind, self.prefix, *before]
        else:
            found = [self.prefix, *before, self.suffix, *behind]
        return found if self.middle is None else [*found, self.middle]


_FORMS: tuple[tuple[str, str, str | None, bool], ...] = (
    # Qwen2.5-Coder and CodeGemma, by their model cards
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", False),
    # StarCoder, Granite (arXiv:2305.06161, 2405.04324)
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>", False),
    # SantaCoder (arXiv:2301.03988)
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>", False),
    # DeepSeek-Coder (arXiv:2401.14196): begin, hole, end
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", False),
    # Code Llama (arXiv:2308.12950)
    ("▁<PRE>", "▁<SUF>", "▁<MID>", False),
    # Codestral, by mistral-common: behind first, and no third token
    ("[PREFIX]", "[SUFFIX]", None, True),
)


def infill_form(tokenizer: Tokenizer) -> InfillForm | None:
    """Return how a model wants to be asked to fill in; ``None`` if its vocabulary has no tokens for it."""
    for prefix, suffix, middle, suffix_first in _FORMS:
        before, behind = tokenizer.token_to_id(prefix), tokenizer.token_to_id(suffix)
        between = None if middle is None else tokenizer.token_to_id(middle)
        if before is not None and behind is not None and (middle is None or between is not None):
            return InfillForm(before, behind, between, suffix_first)
    return None
