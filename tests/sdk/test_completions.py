"""Text completions through the SDK of OpenAI: lists of prompts, token ids, the prompt echoed; streamed and not."""

from collections.abc import Iterator
from typing import Any

import daemons
import httpx
import openai
import pytest


@pytest.fixture(params=["gateway", "node"])
def client(request: pytest.FixtureRequest) -> Iterator[openai.OpenAI]:
    server: daemons.Daemon = request.getfixturevalue(request.param)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def both(client: openai.OpenAI, prompt: Any, **fields: Any) -> Any:
    """Return a completion, which a stream must make too."""
    whole = client.completions.create(model="m", prompt=prompt, **fields)
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    usage: Any = None
    options: Any = {"include_usage": True}
    for chunk in client.completions.create(model="m", prompt=prompt, stream=True, stream_options=options, **fields):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index, "")
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage == whole.usage
    return whole


def test_a_list_of_prompts_is_as_many_choices(client: openai.OpenAI) -> None:
    alone = [client.completions.create(model="m", prompt=prompt) for prompt in ("hi 1", "hi 22", "think")]
    found = both(client, ["hi 1", "hi 22", "think"])
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    assert [choice.text for choice in found.choices] == [answer.choices[0].text for answer in alone]
    assert found.usage.prompt_tokens == sum(answer.usage.prompt_tokens for answer in alone if answer.usage)
    assert found.usage.completion_tokens == sum(answer.usage.completion_tokens for answer in alone if answer.usage)


def test_choices_of_each_prompt_in_order(client: openai.OpenAI) -> None:
    found = both(client, ["choices", "choices"], n=3)
    assert [choice.text for choice in found.choices] == ["choice 0", "choice 1", "choice 2"] * 2


def test_more_prompts_than_the_model_has_slots_for(client: openai.OpenAI) -> None:
    found = both(client, [f"hi {index}" for index in range(40)])
    assert [choice.text for choice in found.choices] == ["Hello"] * 40


@pytest.mark.parametrize(
    ("prompt", "texts"), [([5, 6], ["tokens (5, 6)"]), ([[5], [6, 7]], ["tokens (5,)", "tokens (6, 7)"])]
)
def test_token_ids(client: openai.OpenAI, prompt: Any, texts: list[str]) -> None:
    assert [choice.text for choice in both(client, prompt).choices] == texts


def test_the_prompt_is_echoed(client: openai.OpenAI) -> None:
    assert both(client, "hi there", echo=True).choices[0].text == "hi there!"
    found = both(client, ["hi there", "a b"], echo=True, max_tokens=0)
    assert [choice.text for choice in found.choices] == ["hi there", "a b"]
    assert found.usage.completion_tokens == 0
    assert both(client, "hi", max_tokens=0).choices[0].text == ""


def test_log_probabilities_of_a_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="m", prompt="a b c", echo=True, logprobs=1, max_tokens=0)
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.tokens == ["a", "b", "c"]
    assert found.token_logprobs == [None, -1.0, -2.0]


def test_one_prompt_that_fails_is_the_calls_failure(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.completions.create(model="m", prompt=["wait", "full", "wait"])
    stream = client.completions.create(model="m", prompt=["hi", "fail", "wait"], stream=True)
    with pytest.raises(openai.APIError, match="worker is gone"):
        list(stream)


def test_a_disconnect_ends_all_prompts(gateway: daemons.Daemon) -> None:
    body = {"model": "m", "prompt": ["wait", "wait", "wait"], "stream": True}
    with httpx.stream("POST", f"{gateway.url}/v1/completions", json=body, timeout=30) as reply:
        next(reply.iter_lines())
    daemons.until(lambda: gateway.get("/health")["in_flight"] == 0, 5, "the call has ended")
