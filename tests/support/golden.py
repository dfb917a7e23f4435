"""Transcripts of every dialect and scenario, as data: ``python tests/support/golden.py`` shows what has changed.

``--write`` keeps it. A transcript is the stream, then the whole answer, of one scenario of ``scenarios.py``; what
depends on the time or on chance is fixed.
"""

import difflib
import pathlib
import re
import sys
from collections.abc import Callable, Iterator

import msgspec
from scenarios import play

from cortex._fast.chat_stream import ChatStream
from cortex._fast.messages_stream import MessagesStream
from cortex._fast.responses_stream import ResponsesStream
from cortex.wire.errors import ApiError
from cortex.wire.events import Failed, InferenceEvent
from cortex.wire.request import InferenceRequest, Message, Role, Tool, ToolChoice, ToolMode

FOLDER = pathlib.Path(__file__).parents[1] / "golden"
TOOLS = (Tool("weather", "d", {"type": "object"}), Tool("clock"))
SCENARIOS = ("hi", "think", "call", "patch", "parallel", "forced", "stop", "length", "choices", "logprobs", "fail")
ONE_CHOICE = frozenset({"choices"})
"""Scenarios that only chat has."""


def events_of(scenario: str) -> list[InferenceEvent]:
    """Return what the model does."""
    request = InferenceRequest(
        "m",
        (Message(Role.USER, scenario),),
        tools=TOOLS if scenario in ("call", "patch", "parallel", "forced") else (),
        tool_choice=ToolChoice(ToolMode.REQUIRED) if scenario == "forced" else ToolChoice(),
        stop=("</s>",) if scenario == "stop" else (),
        num_choices=3 if scenario == "choices" else 1,
    )
    return [event for step in play(request) if isinstance(step, list) for event in step]


def chat_stream(scenario: str) -> ChatStream:
    num_choices = 3 if scenario == "choices" else 1
    return ChatStream("chatcmpl-1", "m", 1, num_choices, include_usage=True, keeps=True)


def messages_stream(scenario: str) -> MessagesStream:
    return MessagesStream("msg_1", "m")


def responses_stream(scenario: str) -> ResponsesStream:
    custom = frozenset({"weather"}) if scenario == "patch" else frozenset()
    return ResponsesStream("resp_1", "m", 1, b'{"metadata":{"a":"b"}}', custom_tools=custom, seals=scenario == "think")


def _chat(scenario: str, events: list[InferenceEvent]) -> tuple[bytes, Callable[[], bytes]]:
    stream = chat_stream(scenario)
    return stream.sse_events(events), stream.whole


def _messages(scenario: str, events: list[InferenceEvent]) -> tuple[bytes, Callable[[], bytes]]:
    stream = messages_stream(scenario)
    return stream.sse_events(events), stream.whole


def _responses(scenario: str, events: list[InferenceEvent]) -> tuple[bytes, Callable[[], bytes]]:
    stream = responses_stream(scenario)
    return stream.sse_events(events), stream.whole


DIALECTS = {"chat": _chat, "messages": _messages, "responses": _responses}


def transcripts() -> Iterator[tuple[pathlib.Path, bytes]]:
    """Yield every transcript and where it is kept."""
    for dialect, make in DIALECTS.items():
        for scenario in SCENARIOS:
            if dialect != "chat" and scenario in ONE_CHOICE:
                continue
            events = events_of(scenario)
            stream, whole = make(scenario, events)
            try:
                answer = msgspec.json.format(whole(), indent=1)
            except ApiError as error:
                assert isinstance(events[-1], Failed)
                answer = b"raises " + msgspec.json.encode(error.info())
            yield FOLDER / f"{dialect}-{scenario}.txt", timeless(stream + b"----\n" + answer + b"\n")


def timeless(text: bytes) -> bytes:
    """Return a transcript without the time at which it was made."""
    return re.sub(rb'("completed_at": ?)\d+', rb"\g<1>1", text)


def main() -> None:
    """Show what differs from what is kept; ``--write`` keeps what is."""
    FOLDER.mkdir(exist_ok=True)
    for path, text in transcripts():
        kept = path.read_bytes() if path.exists() else b""
        if kept != text:
            print(*difflib.unified_diff(kept.decode().splitlines(), text.decode().splitlines(), path.name), sep="\n")
            if "--write" in sys.argv:
                path.write_bytes(text)


if __name__ == "__main__":
    main()
