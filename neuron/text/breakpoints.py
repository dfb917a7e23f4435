"""Cache breakpoints of a chat: where the prompts that may come next will part from its prompt.

A client sends its whole history with each request, and the template renders it anew: it may drop earlier reasoning,
print the tools elsewhere, end a message otherwise. So the template is asked: the shortest conversations that may follow
are rendered by it, and what they have in common with the prompt is what a later one can resume from. Any position is
sound, and a wrong one only useless.
"""

import bisect
from collections.abc import Iterator, Sequence
from typing import Final

from cortex.wire.request import Message, Role, ToolCall

_TEXT: Final = "x"
_CALL_ID: Final = "call00000"
"""Id of nine letters and digits, which Mistral's templates insist on."""


def following(messages: Sequence[Message], tool: str | None) -> Iterator[list[Message]]:
    """Yield the shortest conversations that may follow one of ``messages``.

    They are another one with its system message, the next question, and the result of a call of ``tool``, if there are
    tools. The answers before these have no reasoning: what a client leaves out, or a template drops.
    """
    question = Message(Role.USER, _TEXT)
    yield [*(message for message in messages if message.role is Role.SYSTEM), question]
    yield [*messages, Message(Role.ASSISTANT, _TEXT), question]
    if tool is not None:
        call = Message(Role.ASSISTANT, "", (ToolCall(_CALL_ID, tool, "{}"),))
        yield [*messages, call, Message(Role.TOOL, _TEXT, tool_call_id=_CALL_ID, name=tool)]


def common_prefix(text: str, other: str) -> int:
    """Return the number of characters with which both texts begin."""
    most = min(len(text), len(other))
    return bisect.bisect_left(range(1, most + 1), True, key=lambda size: text[:size] != other[:size])
