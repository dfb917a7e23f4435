"""Scripts of scripted models: scenarios, chosen by the first word of the user's message, and counting."""

import asyncio
import json
import re
from collections.abc import Iterator, Mapping

from scripted_model import Step

from cortex.wire.errors import ContextLengthError, ErrorInfo, OverloadedError, UnsupportedParameterError
from cortex.wire.events import (
    Failed,
    Finished,
    FinishReason,
    InferenceEvent,
    PromptEcho,
    ReasoningDelta,
    Started,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
)
from cortex.wire.request import FormatKind, ImagePart, InferenceRequest, Message, Role, ToolMode

COMMAND = re.compile(r"\brun (echo [^\n<\"]*)")
"""The command that an agent is asked to run, within the text of any client."""

TOKEN_S = 0.02
"""Pause before each token of an answer."""
ANSWERS: Mapping[str, tuple[str, str, str]] = {
    "Is 2027 a prime number?": (
        "The square root of 2027 is about 45, so I test the primes up to 43. None of them divides it.",
        "Yes. 2027 is prime: none of the primes up to its square root, 2, 3, 5, ... 43, divides it.",
        "",
    ),
    "What is the weather in Paris?": ("", "I will look it up.", '{"city": "Paris"}'),
}
"""Reasoning, text and arguments of a tool call, by question."""

PATCH = '*** Begin Patch\n+"x"\n*** End Patch'


def count(request: InferenceRequest) -> int:
    """Return a token count that depends on every message and tool."""
    num_chars = sum(len(_text(m)) + sum(len(c.arguments) for c in m.tool_calls) for m in request.messages)
    return 1 + num_chars + sum(len(tool.name) + len(tool.description) for tool in request.tools)


def play(request: InferenceRequest) -> list[Step]:
    """Return the steps of a scenario."""
    prompt = request.prompt if isinstance(request.prompt, str) else f"tokens {request.prompt}"
    user = next((m for m in reversed(request.messages) if m.role is Role.USER), Message(Role.USER, prompt))
    asked = _text(user).strip().strip('"')  # some clients quote their argument
    word = asked.split(" ")[0]
    last = request.messages[-1] if request.messages else user
    start = Started(count(request), 1)
    if last.role is Role.TOOL:
        return [[start], *_deltas("It says ", _text(last)), [Finished(FinishReason.STOP, 7)]]
    if command := _command(request):
        return [[start, TextDelta("I run it.")], [_shell_call(request, command)], _called(8)]
    if request.echo or request.max_tokens == 0:
        return _echoed(request, prompt, start)
    match word:
        case "tokens":
            return [[start, TextDelta(asked)], [Finished(FinishReason.STOP, 1)]]
        case "think":
            return [
                [start, ReasoningDelta("I ")],
                [ReasoningDelta("wonder.\n")],
                *_deltas("So: ", '"yes" ☃'),
                [Finished(FinishReason.STOP, 9, 4)],
            ]
        case "call" | "patch":
            name = request.tools[0].name
            arguments = ['{"city": "', 'Paris"}'] if word == "call" else ['{"input": ', _quoted(PATCH), "}"]
            pieces: list[Step] = [[ToolCallDelta(0, arguments=piece)] for piece in arguments]
            return [[start, TextDelta("Looking.")], [ToolCallDelta(0, "call_1", name)], *pieces, _called(11)]
        case "write":  # in the words of an editor that has no tools
            return [[start, TextDelta("made.txt\n```\nscripted\n```\n")], [Finished(FinishReason.STOP, 8)]]
        case "parallel":
            calls = [ToolCallDelta(i, f"call_{i}", tool.name, f'{{"n":{i}}}') for i, tool in enumerate(request.tools)]
            return [[start, *calls], _called(12)]
        case "forced":
            assert request.tool_choice.mode in {ToolMode.NAMED, ToolMode.REQUIRED}
            name = request.tool_choice.name or request.tools[0].name
            return [[start, ToolCallDelta(0, "call_1", name, "{}")], _called(3)]
        case "stop":
            return [[start, TextDelta("a")], [Finished(FinishReason.STOP, 2, stop_string=request.stop[0])]]
        case "length":
            return [[start, TextDelta("a b c")], [Finished(FinishReason.LENGTH, request.max_tokens or 3)]]
        case "json":
            assert request.output_format.kind is FormatKind.JSON_SCHEMA
            assert "city" in json.loads(request.output_format.source)["properties"]
            return [[start], *_deltas('{"city":', '"Paris"}'), [Finished(FinishReason.STOP, 4)]]
        case "long":
            return [[start], *_deltas(*(f"word{i} " for i in range(2000))), [Finished(FinishReason.STOP, 2000)]]
        case "choices":
            choices = range(request.num_choices)
            return [
                [start, *(TextDelta(f"choice {i}", i) for i in choices)],
                [Finished(FinishReason.STOP, 2, choice=i) for i in choices],
            ]
        case "logprobs":
            token = TokenLogprob("a", b"a", -0.5, (TokenLogprob("a", b"a", -0.5), TokenLogprob("b", b"b", -1.5)))
            return [[start, TextDelta("a", logprobs=(token,))], [Finished(FinishReason.STOP, 1)]]
        case "image":
            images = [part for part in user.content if isinstance(part, ImagePart)]
            return [[start, *(TextDelta(image.url[:15]) for image in images)], [Finished(FinishReason.STOP, 1)]]
        case "wait":
            return [[start, TextDelta("a")], asyncio.Event()]
        case "fail":
            return [[start, TextDelta("a")], [Failed(ErrorInfo(503, "device_worker_lost", "The worker is gone."))]]
        case "busy":
            return [OverloadedError("Too many wait.", retry_after_s=2)]
        case "full":
            return [ContextLengthError(100, 150, param="messages")]
        case "unsupported":
            return [UnsupportedParameterError("Unsupported parameter: 'x'.", param="x")]
        case "turns":
            turns = [f"{m.role}:{_text(m)}" for m in request.messages]
            return [[start, TextDelta("|".join(turns))], [Finished(FinishReason.STOP, len(turns))]]
        case _:
            return [[start], *_deltas("Hel", "lo"), [Finished(FinishReason.STOP, 2)]]


def count_up(request: InferenceRequest) -> Iterator[Step]:
    """Count, as ``prompt=100 tokens=20 pause=0.05`` in the last message asks, or answer a question of ``ANSWERS``."""
    content = str(request.messages[-1].content if request.messages else request.prompt or "")
    if content in ANSWERS:
        yield from _answer(request, *ANSWERS[content])
        return
    words = dict(word.split("=", 1) for word in content.split() if "=" in word)
    tokens = int(words.get("tokens", 3))
    yield [Started(int(words.get("prompt", 5)), 0)]
    for number in range(tokens):
        if "pause" in words:
            yield float(words["pause"])
        yield [TextDelta(f"{request.model}:{number} ")]
    yield [Finished(FinishReason.STOP, tokens)]


def _answer(request: InferenceRequest, reasoning: str, text: str, arguments: str) -> Iterator[Step]:
    yield [Started(sum(len(str(message.content)) for message in request.messages) // 4 + 16, 16)]
    deltas: list[InferenceEvent] = [ReasoningDelta(f"{word} ") for word in reasoning.split()]
    deltas += [TextDelta(f"{word} ") for word in text.split()]
    if arguments:
        deltas.append(ToolCallDelta(0, "call_1", request.tools[0].name))
        deltas += [ToolCallDelta(0, arguments=piece) for piece in arguments.partition(" ") if piece]
    for delta in deltas:
        yield TOKEN_S
        yield [delta]
    reason = FinishReason.TOOL_CALLS if arguments else FinishReason.STOP
    yield [Finished(reason, len(deltas), len(reasoning.split()))]


def _echoed(request: InferenceRequest, prompt: str, start: Started) -> list[Step]:
    """Return the prompt, with its words' log probabilities if requested, and an answer if requested."""
    events: list[InferenceEvent] = [start]
    for choice in range(request.num_choices):
        words = [TokenLogprob(word, word.encode(), -1.0 * index) for index, word in enumerate(prompt.split(" "))]
        if request.echo:
            events.append(PromptEcho(prompt, choice, tuple(words) if request.top_logprobs is not None else ()))
        if request.max_tokens != 0:
            events.append(TextDelta("!", choice))
        events.append(Finished(FinishReason.LENGTH, 0 if request.max_tokens == 0 else 1, choice=choice))
    return [events]


def _deltas(*pieces: str) -> list[Step]:
    return [[TextDelta(piece)] for piece in pieces]


SHELLS = {
    "exec_command": "cmd", "shell_command": "command", "bash": "command", "Bash": "command",
    "run_shell_command": "command", "run_commands": "commands", "execute_command": "command",
}  # fmt: skip
"""The tools by which agents run commands, and the parameter that takes the command."""


def _command(request: InferenceRequest) -> str:
    """Return the command that a user has asked an agent to run, if it can and has not yet."""
    if not any(tool.name in SHELLS for tool in request.tools):
        return ""
    for message in reversed(request.messages):
        if message.role is Role.TOOL:
            return ""
        if message.role is Role.USER and (found := COMMAND.search(_text(message))):
            return found[1].strip()
    return ""


def _shell_call(request: InferenceRequest, command: str) -> ToolCallDelta:
    """Return a call of the tool by which the client runs commands."""
    tool = next(tool for tool in request.tools if tool.name in SHELLS)
    arguments: dict[str, object] = {SHELLS[tool.name]: command}
    kinds = tool.parameters.get("properties", {})
    if kinds.get(SHELLS[tool.name], {}).get("type") == "array":
        arguments = {SHELLS[tool.name]: [command]}
    required = {
        name: False if kinds[name].get("type") == "boolean" else "as asked"
        for name in tool.parameters.get("required", ())
    }
    return ToolCallDelta(0, "call_run", tool.name, json.dumps({"description": "as asked"} | required | arguments))


def _called(num_tokens: int) -> list[InferenceEvent]:
    return [Finished(FinishReason.TOOL_CALLS, num_tokens)]


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '\\"').replace("\n", "\\n") + '"'


def _text(message: Message) -> str:
    if isinstance(message.content, str):
        return message.content
    return "".join("" if isinstance(part, ImagePart) else part.text for part in message.content)
