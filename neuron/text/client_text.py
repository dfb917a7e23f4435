"""Keep a client's text from becoming special tokens: only the text of a template itself becomes such tokens.

A text that spells a control token is marked before the template sees it, with a code point that is nowhere in the
request, behind each of the token's characters. A template trims, cuts and joins as it likes; what it makes of the
spelling is no token's any more. Then the stretch of the prompt around it is tokenised without its marks by a tokenizer
that knows no control tokens. Prompts without such a text are tokenised as ever.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Final

from tokenizers import Tokenizer

from cortex.wire.errors import InvalidRequestError
from neuron.errors import UnsupportedTokenizerError
from neuron.text import pieces
from neuron.text.chat_template import NONCHARACTERS
from neuron.text.plain import Place, PlainText


class ControlTokens:
    """The tokens that no text of a client's may become: the special ones, and those that the template writes.

    ``literals`` is what the template writes. Of tokens that are not special its own count, as DeepSeek's ``<｜User｜>``
    or Qwen's ``<tool_call>``, but for white space, which is text.
    """

    def __init__(self, tokenizer: Tokenizer, literals: str) -> None:
        self._tokenizer = tokenizer
        self._tokens = {
            token.content: (index, token)
            for index, token in tokenizer.get_added_tokens_decoder().items()
            if token.content and (token.special or (token.content in literals and not token.content.isspace()))
        }
        self._ids = frozenset(index for index, _ in self._tokens.values())
        try:
            self._pattern = re.compile(spelling(self._tokens))
        except (RecursionError, OverflowError, re.error):
            raise UnsupportedTokenizerError("The names of its special tokens cannot be told apart.") from None
        self._beginnings = frozenset(text[:at] for text in self._tokens for at in range(1, len(text)))
        self._endings = frozenset(text[at:] for text in self._tokens for at in range(1, len(text)))
        self._longest = max(map(len, self._tokens), default=0)
        self._plain: dict[Place, PlainText] = {}

    def marking(self, texts: Iterable[str]) -> "Marking":
        """Return how to mark the texts of a request, all of which are ``texts``."""
        unused = list(NONCHARACTERS)
        for text in texts:
            if not text.isascii():
                unused = [mark for mark in unused if mark not in text]
        if not unused:
            raise InvalidRequestError("Invalid 'messages': they hold all of Unicode's noncharacters U+FDD0 to U+FDEF.")
        return Marking(self, unused[0])

    def marked(self, text: str, mark: str, kept: Collection[str]) -> str:
        """Return ``text`` with the spellings in it marked, and what may become one together with what stands beside it.

        Those ``kept`` stay what they are.
        """

        def broken(found: re.Match[str]) -> str:
            return found[0] if found[0] in kept else "".join(letter + mark for letter in found[0])

        if self._tokens and text:
            text = self._pattern.sub(broken, text)
            text = self._with_ends_marked(text, mark, kept)
        return text

    def _with_ends_marked(self, text: str, mark: str, kept: Collection[str]) -> str:
        """Mark the beginning of a token at the end of a text, and the end of one at its beginning."""
        stripped = text.strip()
        for size in range(min(self._longest - 1, len(stripped)), 0, -1):
            if stripped[:size] in self._endings and not stripped.startswith(tuple(kept)):
                at = len(text) - len(text.lstrip())
                text = text[:at] + "".join(c + mark for c in text[at : at + size]) + text[at + size :]
                break
        for size in range(min(self._longest - 1, len(stripped)), 0, -1):
            if stripped[-size:] in self._beginnings and not stripped.endswith(tuple(kept)):
                at = len(text.rstrip())
                text = text[: at - size] + "".join(mark + c for c in text[at - size : at]) + text[at:]
                break
        return text

    def encode(self, prompt: str, mark: str) -> list[int]:
        """Return the ids of a rendered prompt."""
        if mark not in prompt:
            return self._whole(prompt)
        ids: list[int] = []
        done = 0
        for start, end in self._marked_stretches(prompt, mark):
            if done < start:
                ids += self._whole(prompt[done:start])
            place = Place.BEHIND_A_TOKEN if start else Place.BEGINNING
            ids += self._as_text(prompt[start:end], mark, place)
            done = end
        return ids + self._whole(prompt[done:]) if done < len(prompt) else ids

    def count_before(self, prompt: str, mark: str, ids: list[int], end: int) -> int:
        """Return how many of the ``ids`` of a rendered prompt are sure to be of its first ``end`` characters.

        They are counted from the last control token on; the last one before ``end`` does not count, nor the beginning
        of a control token there, as they may be others where other text follows.
        """
        begin = count = 0
        spelled = list(self._pattern.finditer(prompt, 0, end))
        control = [index for index, token in enumerate(ids) if token in self._ids]
        if 0 < len(spelled) <= len(control):
            last, index = spelled[-1], control[len(spelled) - 1]
            if ids[index] == self._tokens[last[0]][0]:
                begin, count = last.end(), index + 1
        rest = prompt[begin:end].replace(mark, "")
        for size in range(min(self._longest - 1, len(rest)), 0, -1):
            if rest[-size:] in self._beginnings:
                rest = rest[:-size]
                break
        return count + max(0, len(self._whole(rest)) - 1)

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of a text that no template has touched."""
        marking = self.marking([text])
        return marking.encode(marking.text(text))

    def _whole(self, text: str) -> list[int]:
        return pieces.encode(self._tokenizer, text)

    def _marked_stretches(self, prompt: str, mark: str) -> Iterator[tuple[int, int]]:
        """Yield where text with marks lies between two control tokens, or between one and an end of the prompt."""
        start = 0
        strips = False
        for found in (*self._pattern.finditer(prompt), None):
            end = len(prompt) if found is None else found.start()
            if mark in prompt[start:end]:
                stretch = prompt[start:end]
                first = start + (len(stretch) - len(stretch.lstrip()) if strips else 0)
                takes_space = found is not None and self._tokens[found[0]][1].lstrip
                yield first, start + len(stretch.rstrip() if takes_space else stretch)
            if found is not None:
                start, strips = found.end(), self._tokens[found[0]][1].rstrip

    def _as_text(self, stretch: str, mark: str, place: Place) -> list[int]:
        ids = self._encoder(place).encode(stretch.replace(mark, ""))
        if self._ids.isdisjoint(ids):
            return ids
        # A vocabulary whose model has the token among its pieces finds it again: its letters are encoded one by one.
        letters = self._encoder(Place.CONTINUED)
        apart = [letters.encode(part) for part in stretch.split(mark) if part]
        return [index for part in apart for index in part if index not in self._ids]

    def _encoder(self, place: Place) -> PlainText:
        if place not in self._plain:
            self._plain[place] = PlainText(self._tokenizer, self._tokens.keys(), place)
        return self._plain[place]


class Marking:
    """The marks of one request."""

    def __init__(self, tokens: ControlTokens, mark: str) -> None:
        self._tokens = tokens
        self.mark = mark

    def text(self, text: str, kept: Collection[str] = ()) -> str:
        """Return ``text`` marked; the spellings that are ``kept`` stay what they are."""
        return self._tokens.marked(text, self.mark, kept)

    def value(self, value: Any) -> Any:
        """Return a value of JSON with all of its texts marked, keys too."""
        match value:
            case str():
                return self.text(value)
            case Mapping():
                return {self.value(key): self.value(inner) for key, inner in value.items()}
            case list() | tuple():
                return [self.value(inner) for inner in value]
            case _:
                return value

    def encode(self, prompt: str) -> list[int]:
        """Return the ids of the rendered prompt."""
        return self._tokens.encode(prompt, self.mark)

    def without(self, prompt: str) -> str:
        """Return the rendered prompt as a reader is to see it."""
        return prompt.replace(self.mark, "")


def texts_in(value: object) -> Iterator[str]:
    """Yield all texts of a value of JSON, keys too."""
    match value:
        case str():
            yield value
        case Mapping():
            for key, inner in value.items():
                yield from texts_in(key)
                yield from texts_in(inner)
        case list() | tuple():
            for inner in value:
                yield from texts_in(inner)


_NEVER: Final = "(?!)"


def spelling(words: Collection[str]) -> str:
    """Return a pattern of the longest of ``words`` at a place, which looks at each character of a text once or twice.

    It is a tree of their letters: an alternation of thousands of words would be tried word by word at each place.
    """
    tree: dict[str, Any] = {}
    for word in words:
        branch = tree
        for letter in word:
            branch = branch.setdefault(letter, {})
        branch[""] = {}
    return _pattern_of(tree) if tree else _NEVER


def _pattern_of(branch: dict[str, Any]) -> str:
    stem = ""
    while len(branch) == 1 and "" not in branch:
        [(letter, branch)] = branch.items()
        stem += re.escape(letter)
    ways = [re.escape(letter) + _pattern_of(inner) for letter, inner in branch.items() if letter]
    if not ways:
        return stem
    return f"{stem}(?:{'|'.join(ways)}){'?' if '' in branch else ''}"
