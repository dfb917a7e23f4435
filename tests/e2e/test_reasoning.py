"""A trained model that reasons, behind both daemons: the same in each dialect, whole and streamed."""

import json
from collections.abc import Iterator
from typing import Any

import daemons
import httpx
import hybrid_models
import pytest

from neuron.models.sizing import PAGE_TOKENS

MODEL = "trained"
QUESTION = "Now the door is red, the lamp is blue. What colour is the door?"
MESSAGES = [{"role": "user", "content": QUESTION}]
ASKED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "chat/completions": ({"messages": MESSAGES}, {}, {"reasoning_effort": "none"}),
    "responses": ({"input": QUESTION}, {"reasoning": {"effort": "high"}}, {"reasoning": {"effort": "none"}}),
    "messages": ({"messages": MESSAGES, "max_tokens": 60}, {"thinking": {"type": "adaptive"}}, {}),
}
"""Path of each dialect: a question, and what turns reasoning on and off."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[daemons.Daemon]:
    weights = hybrid_models.TRAINED["qwen3_5"]
    with (
        daemons.neuron(tmp_path_factory.mktemp("neuron"), weights, MODEL) as node,
        daemons.cortex(tmp_path_factory.mktemp("cortex"), node, model=MODEL) as gateway,
    ):
        yield gateway


def whole(answer: dict[str, Any]) -> tuple[str, str]:
    """Return the thought and the text of an answer."""
    if "choices" in answer:
        message = answer["choices"][0]["message"]
        return message.get("reasoning_content") or "", message["content"]
    if "output" in answer:
        parts = {item["type"]: item["content"][0]["text"] for item in answer["output"]}
        return parts.get("reasoning", ""), parts["message"]
    blocks = {block["type"]: block for block in answer["content"]}
    return blocks.get("thinking", {}).get("thinking", ""), blocks["text"]["text"]


def streamed(events: list[dict[str, Any]]) -> tuple[str, str]:
    """Return the thought and the text of a stream."""
    thought, text = "", ""
    for event in events:
        if choices := event.get("choices"):
            thought += choices[0]["delta"].get("reasoning_content") or ""
            text += choices[0]["delta"].get("content") or ""
        match event.get("type"):
            case "response.reasoning_text.delta":
                thought += event["delta"]
            case "response.output_text.delta":
                text += event["delta"]
            case "content_block_delta":
                thought += event["delta"].get("thinking", "")
                text += event["delta"].get("text", "")
    return thought, text


@pytest.mark.parametrize("path", ASKED)
@pytest.mark.parametrize("thinks", [True, False])
def test_each_dialect_has_the_thought_and_the_answer(server: daemons.Daemon, path: str, thinks: bool) -> None:
    question, on, off = ASKED[path]
    asked = {"model": MODEL, "temperature": 0, **question, **(on if thinks else off)}
    reply = httpx.post(f"{server.url}/v1/{path}", json=asked, timeout=60)
    assert reply.status_code == 200, reply.text
    thought, text = whole(reply.json())
    assert text.startswith("The door is ")
    assert thought.startswith("It was said that the door is ") if thinks else thought == ""
    stream = httpx.post(f"{server.url}/v1/{path}", json={**asked, "stream": True}, timeout=60)
    lines = stream.text.splitlines()
    assert streamed([json.loads(line[6:]) for line in lines if line.startswith("data: {")]) == (thought, text)


def usage(answer: dict[str, Any]) -> tuple[int, int]:
    """Return the tokens of the prompt of an answer, and how many of them were cached."""
    found = answer["usage"]
    if "prompt_tokens" in found:
        return found["prompt_tokens"], found["prompt_tokens_details"]["cached_tokens"]
    if "input_tokens_details" in found:
        return found["input_tokens"], found["input_tokens_details"]["cached_tokens"]
    return found["input_tokens"] + found["cache_read_input_tokens"], found["cache_read_input_tokens"]


@pytest.mark.parametrize("path", ASKED)
def test_the_next_turn_computes_less_than_a_page_again(server: daemons.Daemon, path: str) -> None:
    """Although its template drops the reasoning of the one before: the state was kept at the place before it."""
    _, on, _ = ASKED[path]
    common = {"model": MODEL, "temperature": 0, **({"max_tokens": 60} if path == "messages" else {}), **on}
    question, following = (" ".join([f"By {path}.", *[QUESTION] * count]) for count in (6, 4))

    def ask(**more: Any) -> dict[str, Any]:
        reply = httpx.post(f"{server.url}/v1/{path}", json={**common, **more}, timeout=60)
        assert reply.status_code == 200, reply.text
        found: dict[str, Any] = reply.json()
        return found

    if path == "responses":
        first = ask(input=question)
        second = ask(input=following, previous_response_id=first["id"])
    else:
        messages = [{"role": "user", "content": question}]
        first = ask(messages=messages)
        said = first["choices"][0]["message"] if "choices" in first else {"role": "assistant", **first}
        answer = {name: said[name] for name in ("role", "content", "reasoning_content") if said.get(name)}
        second = ask(messages=[*messages, answer, {"role": "user", "content": following}])
    assert whole(first)[0], "it thought"
    (num_first, _), (num_second, num_cached) = usage(first), usage(second)
    # The prompt ends with a tag of reasoning, which the next one has not.
    assert num_first - 4 - PAGE_TOKENS < num_cached < num_first
    assert num_second > num_first + 60


@pytest.mark.parametrize(
    ("path", "bound"),
    [
        ("chat/completions", {"thinking_budget": 4}),
        ("chat/completions", {"reasoning": {"effort": "high", "max_tokens": 4}}),
        ("messages", {"thinking": {"type": "enabled", "budget_tokens": 4}, "max_tokens": 300}),
    ],
)
def test_a_thought_ends_at_its_budget(server: daemons.Daemon, path: str, bound: dict[str, Any]) -> None:
    question, on, _ = ASKED[path]
    free, bounded = (
        whole(httpx.post(f"{server.url}/v1/{path}", json=asked, timeout=60).json())[0]
        for asked in (
            {"model": MODEL, "temperature": 0, **question, **on},
            {"model": MODEL, "temperature": 0, **question, **bound},
        )
    )
    own, words, rest = bounded.partition("\n\nConsidering the limited time")
    assert words
    assert rest.endswith("directly now.")
    assert free.startswith(own)
    assert len(own) < len(free)


@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_call_has_the_form_of_its_template(server: daemons.Daemon, stream: bool) -> None:
    """Its values are bare, and typed by the schema; the thought before it is free."""
    parameters = {
        "type": "object",
        "properties": {
            "colour": {"type": "string", "maxLength": 9},
            "count": {"enum": [1, 2]},
            "more": {"type": "null"},
        },
        "required": ["colour", "count"],
    }
    tool = {"type": "function", "function": {"name": "paint", "parameters": parameters}}
    asked = {"model": MODEL, "temperature": 0, "messages": MESSAGES, "tools": [tool], "tool_choice": "required"}
    asked |= {"parallel_tool_calls": False, "stream": stream, "max_tokens": 400}
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=asked, timeout=60)
    assert reply.status_code == 200, reply.text
    if stream:
        chunks = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
        pieces = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls") or []]
        name, arguments = pieces[0]["function"]["name"], "".join(piece["function"]["arguments"] for piece in pieces)
        assert len(pieces) > 2, "argument by argument"
    else:
        (call,) = reply.json()["choices"][0]["message"]["tool_calls"]
        name, arguments = call["function"]["name"], call["function"]["arguments"]
    assert name == "paint"
    found = json.loads(arguments)
    assert found["count"] in (1, 2)
    assert len(found["colour"]) <= 9
    assert list(found)[:2] == ["colour", "count"]
