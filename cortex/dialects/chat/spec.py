"""The dialect as a value."""

import pathlib

import msgspec

from cortex.dialects.chat import request
from cortex.dialects.dialect import Dialect, WholeAnswer
from cortex.dialects.schema import COUNT, LIST, OBJECT, TEXT, object_with


class _Choice(msgspec.Struct, frozen=True):
    finish_reason: str | None = None


class Chosen(WholeAnswer, frozen=True):
    """An answer of choices."""

    choices: tuple[_Choice, ...]

    @property
    def finish(self) -> str | None:
        """Finish of the first choice."""
        return self.choices[0].finish_reason if self.choices else None


CHAT = Dialect(
    "openai-chat",
    "/v1/chat/completions",
    "Answer a chat.",
    request.PARAMETERS,
    request.decode,
    object_with(id=TEXT, object={"const": "chat.completion"}, created=COUNT, model=TEXT, choices=LIST, usage=OBJECT),
    Chosen,
    page=pathlib.Path(__file__).with_name("page.js"),
)
