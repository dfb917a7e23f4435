"""The official SDK, unmodified, against cortex -> neuron -> device worker with the real model."""

import json
from collections.abc import Iterator

import daemons
import httpx
import jsonschema
import openai
import pytest
from openai.types.responses import ResponseCompletedEvent, ResponseTextDeltaEvent

QUESTION = "What is the capital of France?"
CHAT = {"model": daemons.MODEL, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 24}
RESPONSES = {"model": daemons.MODEL, "input": QUESTION, "temperature": 0, "max_output_tokens": 24}


@pytest.fixture
def client(gateway: daemons.Daemon) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{gateway.url}/v1", api_key="none", max_retries=0, timeout=60, _strict_response_validation=True
    ) as found:
        yield found


def test_models(client: openai.OpenAI) -> None:
    assert daemons.MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(daemons.MODEL).object == "model"


def test_chat_whole_and_streamed_are_equal(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**CHAT)
    text = whole.choices[0].message.content
    assert text is not None
    assert "Paris" in text
    chunks = list(client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[0].choices[0].delta.role == "assistant"
    assert whole.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens == 37
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_a_text_that_spells_the_end_of_a_turn_does_not_end_it(client: openai.OpenAI) -> None:
    """In a chat it is text of several tokens; a raw prompt is parsed like a template."""

    def prompt_tokens(content: str) -> int:
        answer = client.chat.completions.create(
            **CHAT | {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
        )
        assert answer.usage is not None
        return answer.usage.prompt_tokens

    assert prompt_tokens("a<|im_end|>b") > prompt_tokens("a b") + 3
    raw = client.completions.create(model=CHAT["model"], prompt="<|im_start|>user<|im_end|>", max_tokens=1)
    assert raw.usage is not None
    assert raw.usage.prompt_tokens == 3


def test_responses_whole_and_streamed_are_equal(client: openai.OpenAI) -> None:
    whole = client.responses.create(**RESPONSES)
    assert "Paris" in whole.output_text
    assert whole.status == "completed"
    events = list(client.responses.create(**RESPONSES, stream=True))
    deltas = [event for event in events if isinstance(event, ResponseTextDeltaEvent)]
    assert [event.type for event in events if not isinstance(event, ResponseTextDeltaEvent)] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in deltas) == whole.output_text
    last = events[-1]
    assert isinstance(last, ResponseCompletedEvent)
    assert last.response.output_text == whole.output_text
    assert last.response.usage is not None
    assert whole.usage is not None
    assert last.response.usage.output_tokens == whole.usage.output_tokens


def test_the_token_limit_ends_an_answer(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(**CHAT | {"max_tokens": 3})
    assert chat.choices[0].finish_reason == "length"
    assert chat.usage is not None
    assert chat.usage.completion_tokens == 3
    response = client.responses.create(**RESPONSES | {"max_output_tokens": 3})
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"


def test_a_stop_string_ends_an_answer_and_is_not_in_it(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**CHAT, stop=["Paris"]).choices[0]
    assert answer.finish_reason == "stop"
    assert answer.message.content is not None
    assert "Paris" not in answer.message.content


def test_a_seed_makes_sampling_repeatable(client: openai.OpenAI) -> None:
    def sample(seed: int) -> str | None:
        asked = CHAT | {"temperature": 1.5, "max_tokens": 16, "seed": seed}
        return client.chat.completions.create(**asked).choices[0].message.content

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(1, 5)}) > 1


def test_several_choices(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**CHAT | {"max_tokens": 4}, n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 1, "greedy choices are the same"


def test_a_conversation_of_several_turns(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(**CHAT)
    messages = [
        *CHAT["messages"],
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": [{"type": "text", "text": "And of Italy?"}]},
    ]
    again = client.chat.completions.create(**CHAT | {"messages": messages})
    assert "Rome" in (again.choices[0].message.content or "")


SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "country": {"enum": ["France", "Italy"]}},
    "required": ["city", "country"],
    "additionalProperties": False,
}


def test_an_answer_in_a_schema(client: openai.OpenAI) -> None:
    asked = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA}}
    answer = client.chat.completions.create(**CHAT | {"max_tokens": 60}, response_format=asked).choices[0]
    assert answer.finish_reason == "stop"
    jsonschema.validate(json.loads(answer.message.content or ""), SCHEMA)
    text = {"format": {"type": "json_schema", "name": "place", "schema": SCHEMA}}
    response = client.responses.create(**RESPONSES | {"max_output_tokens": 60}, text=text)
    jsonschema.validate(json.loads(response.output_text), SCHEMA)


def test_a_schema_that_cannot_be_compiled(client: openai.OpenAI) -> None:
    asked = {"type": "json_schema", "json_schema": {"name": "bad", "schema": {"type": "strin"}}}
    with pytest.raises(openai.BadRequestError, match="strin") as caught:
        client.chat.completions.create(**CHAT, response_format=asked)
    assert caught.value.code == "invalid_schema"


def test_a_tool_that_must_be_called(client: openai.OpenAI) -> None:
    tool = {"type": "function", "function": {"name": "find", "description": "Find a place.", "parameters": SCHEMA}}
    asked = CHAT | {"max_tokens": 80}
    answer = client.chat.completions.create(
        **asked, tools=[tool], tool_choice="required", parallel_tool_calls=False
    ).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.tool_calls is not None
    assert len(answer.message.tool_calls) == 1
    jsonschema.validate(json.loads(answer.message.tool_calls[0].function.arguments), SCHEMA)


def test_log_probabilities(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=2).choices[0]
    assert answer.logprobs is not None
    tokens = answer.logprobs.content or []
    assert "".join(token.token for token in tokens) == answer.message.content
    for token in tokens:
        # Greedy: the token is the likeliest.
        assert token.top_logprobs[0].token == token.token
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob)
        assert token.top_logprobs[1].logprob <= token.logprob <= 0


def test_the_second_question_finds_the_first_in_the_cache(client: openai.OpenAI) -> None:
    system = {"role": "system", "content": "You know the capital of every country. " * 20}
    asked = CHAT | {"messages": [system, *CHAT["messages"]], "max_tokens": 4}
    client.chat.completions.create(**asked)
    usage = client.chat.completions.create(**asked).usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == (usage.prompt_tokens - 1) // 16 * 16


def test_no_key_sees_cached_tokens_of_another(node: daemons.Daemon) -> None:
    def cached(principal: str, path: str = "/v1/completions") -> int:
        text = "Whose prompts are in the cache is nobody's business but theirs. " * 8
        body = {"model": daemons.MODEL, "prompt": text, "max_tokens": 1}
        headers = {"x-cortex-principal": principal} if principal else {}
        reply = httpx.post(node.url + path, json=body, headers=headers, timeout=60).json()
        return int(reply["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert cached("alice") == 0
    there = cached("alice")
    assert there > 50
    assert cached("bob") == 0
    assert cached("") == 0
    assert cached("") == cached("bob") == there


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dialect", ["chat", "responses"])
class TestErrors:
    def call(self, client: openai.OpenAI, dialect: str, stream: bool, **changes: object) -> object:
        if dialect == "chat":
            return client.chat.completions.create(**CHAT | changes, stream=stream)
        return client.responses.create(**RESPONSES | changes, stream=stream)

    def test_an_unknown_model(self, client: openai.OpenAI, dialect: str, stream: bool) -> None:
        with pytest.raises(openai.NotFoundError) as caught:
            self.call(client, dialect, stream, model="nobody")
        assert caught.value.code == "model_not_found"

    def test_a_wrong_type(self, client: openai.OpenAI, dialect: str, stream: bool) -> None:
        with pytest.raises((openai.BadRequestError, openai.UnprocessableEntityError)) as caught:
            self.call(client, dialect, stream, temperature="hot")
        assert caught.value.param == "temperature"

    def test_a_prompt_that_is_too_long(self, client: openai.OpenAI, dialect: str, stream: bool) -> None:
        long = "word " * 20_000
        changes = {"messages": [{"role": "user", "content": long}]} if dialect == "chat" else {"input": long}
        with pytest.raises(openai.BadRequestError, match="maximum context length is") as caught:
            self.call(client, dialect, stream, **changes)
        assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
@pytest.mark.parametrize("body", [b"{", b"[]", b"\xff"])
def test_bad_json(gateway: daemons.Daemon, node: daemons.Daemon, path: str, body: bytes) -> None:
    for daemon in (gateway, node):
        reply = httpx.post(daemon.url + path, content=body)
        assert reply.status_code == 400
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_chain_straight_to_a_neuron(node: daemons.Daemon, stream: bool) -> None:
    with (
        openai.OpenAI(base_url=f"{node.url}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.BadRequestError) as caught,
    ):
        client.responses.create(**RESPONSES, previous_response_id="resp_1", stream=stream)
    assert (caught.value.code, caught.value.param) == ("chained_conversation_not_supported", "previous_response_id")
