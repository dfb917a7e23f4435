"""Text as no more than text: a tokenizer that takes no token for what it spells, beside the one of the model.

It shares the model's vocabulary and merges, so that it costs nothing, and leaves out those of its added tokens that
are not to be recognised. What a tokenizer puts before a text (SentencePiece's space) it puts there only where it is
asked to. Loads no torch.
"""

import enum
import json
from collections.abc import Collection
from typing import Any

from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from neuron.text import pieces


class Place(enum.Enum):
    """Place of a piece of text in a prompt, which decides whether a space is put before it."""

    BEGINNING = "beginning"
    BEHIND_A_TOKEN = "behind a token"
    """Behind a special token: some vocabularies begin each such piece with a space, some only the first of all."""
    CONTINUED = "continued"
    """In the middle of text, where nothing is put before it."""


class PlainText:
    """Encodes text of which no part may become one of the tokens named in ``without``."""

    def __init__(self, tokenizer: Tokenizer, without: Collection[str], place: Place) -> None:
        self._tokenizer = Tokenizer(tokenizer.model)
        self._tokenizer.normalizer = _normalizer(tokenizer.normalizer, place)
        self._tokenizer.pre_tokenizer = _pre_tokenizer(tokenizer.pre_tokenizer, place)
        self._ids: dict[int, int] = {}
        """The model's id of each added token that has another one here."""
        kept = [
            (index, token)
            for index, token in tokenizer.get_added_tokens_decoder().items()
            if token.content not in without
        ]
        self._tokenizer.add_tokens([_copy(token) for _, token in kept])
        for index, token in kept:
            here = self._tokenizer.token_to_id(token.content)
            if here is not None and here != index:
                self._ids[here] = index

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``."""
        ids = pieces.encode(self._tokenizer, text)
        return [self._ids.get(index, index) for index in ids] if self._ids else ids


def _copy(token: AddedToken) -> AddedToken:
    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=False,
    )


def _normalizer(whole: Any, place: Place) -> Any:
    if whole is None or place is not Place.CONTINUED:
        return whole
    kept = [part for part in _parts(json.loads(whole.__getstate__()), "normalizers") if part["type"] != "Prepend"]
    found = normalizers.NFC()
    found.__setstate__(json.dumps({"type": "Sequence", "normalizers": kept}).encode())
    return found


def _pre_tokenizer(whole: Any, place: Place) -> Any:
    if whole is None or place is Place.BEGINNING:
        return whole
    parts = _parts(json.loads(whole.__getstate__()), "pretokenizers")
    for part in parts:
        if part["type"] == "Metaspace" and (place is Place.CONTINUED or part["prepend_scheme"] == "first"):
            part["prepend_scheme"] = "never"
        elif part["type"] == "ByteLevel" and place is Place.CONTINUED:
            part["add_prefix_space"] = False
    found = pre_tokenizers.Whitespace()
    found.__setstate__(json.dumps({"type": "Sequence", "pretokenizers": parts}).encode())
    return found


def _parts(state: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """Return the steps that a component is made of."""
    if state["type"] == "Sequence":
        return [part for inner in state[key] for part in _parts(inner, key)]
    return [state]
