"""Anthropic's SDK against cortex -> neuron -> device worker with the real model: counts are the engine's."""

from collections.abc import Iterator
from typing import Any

import anthropic
import daemons
import pytest

# The SDK has no parameter for what its newest API version refuses; the server takes it of any.
GREEDY: Any = {"extra_body": {"temperature": 0}}
QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def client(gateway: daemons.Daemon) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(
        base_url=gateway.url, api_key="none", max_retries=0, timeout=60, _strict_response_validation=True
    ) as found:
        yield found


def test_whole_and_streamed_are_equal(client: anthropic.Anthropic) -> None:
    asked: Any = {"model": daemons.MODEL, "max_tokens": 24, "messages": QUESTION, **GREEDY}
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as events:
        streamed = events.get_final_message()
    assert whole.content[0].type == "text"
    assert "Paris" in whole.content[0].text
    assert [block.to_dict() for block in streamed.content] == [block.to_dict() for block in whole.content]
    assert streamed.stop_reason == whole.stop_reason
    assert streamed.usage.output_tokens == whole.usage.output_tokens


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"system": "You are a pirate."},
        {"tools": [{"name": "f", "description": "Finds.", "input_schema": {"type": "object", "properties": {}}}]},
    ],
    ids=["plain", "system", "tools"],
)
def test_a_count_is_what_the_engine_reports(client: anthropic.Anthropic, extra: Any) -> None:
    counted = client.messages.count_tokens(model=daemons.MODEL, messages=QUESTION, **extra).input_tokens
    usage = client.messages.create(model=daemons.MODEL, max_tokens=1, messages=QUESTION, **extra).usage
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)
    assert counted > 20


def test_a_prompt_that_is_too_long(client: anthropic.Anthropic) -> None:
    long: Any = [{"role": "user", "content": "word " * 20_000}]
    assert client.messages.count_tokens(model=daemons.MODEL, messages=long).input_tokens > 20_000
    for stream in (False, True):
        with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: 2\d{4} tokens > \d+ maximum"):
            client.messages.create(model=daemons.MODEL, max_tokens=1, messages=long, stream=stream)


def test_a_stop_sequence(client: anthropic.Anthropic) -> None:
    message = client.messages.create(
        model=daemons.MODEL, max_tokens=24, messages=QUESTION, stop_sequences=["Paris"], **GREEDY
    )
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "Paris")
