"""OpenAI's own SDK, with strict validation, against cortex -> neuron: streamed and not, with equal answers."""

from collections.abc import Iterator
from typing import Any

import daemons
import openai
import pydantic
import pytest
from openai.types.responses import Response

WEATHER: Any = {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {}}}
CLOCK: Any = {"name": "clock"}
STREAMED = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


@pytest.fixture
def client(server: daemons.Daemon) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20, _strict_response_validation=True
    ) as found:
        yield found


def respond(client: openai.OpenAI, prompt: Any, stream: bool, **fields: Any) -> Response:
    body: Any = {"model": "m", "input": prompt, **fields}
    if not stream:
        return client.responses.create(**body)
    if prompt == "length":  # of which the helper below makes an error
        *_, last = client.responses.create(**body, stream=True)
        assert last.type == "response.incomplete"
        return last.response
    with client.responses.stream(**body) as events:
        for _ in events:
            pass
        return events.get_final_response()


def chat(client: openai.OpenAI, prompt: Any, stream: bool, **fields: Any) -> dict[str, Any]:
    """Return the answer's choices, put together by the SDK where they are streamed."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    body: Any = {"model": "m", "messages": messages, **fields}
    if not stream:
        return client.chat.completions.create(**body).to_dict()
    with client.chat.completions.stream(**body, stream_options={"include_usage": True}) as events:
        for _ in events:
            pass
        return events.get_final_completion().to_dict()


def functions(*tools: Any) -> Any:
    return [{"type": "function", "function": tool} for tool in tools]


def flat(*tools: Any) -> Any:
    return [{"type": "function", "strict": False, **tool} for tool in tools]


def shape(response: Response) -> Any:
    """Return what must be the same whether or not it was streamed."""
    found = response.to_dict()
    for name in ("id", "created_at", "completed_at"):
        found.pop(name)
    for item in found["output"]:  # type: ignore[attr-defined]
        item.pop("id")
        for part in item.get("content") or ():
            part.pop("parsed", None)
        item.pop("parsed_arguments", None)
    return found


@pytest.mark.parametrize("prompt", ["hi", "think", "call", "parallel", "length", "long"])
def test_responses_streamed_and_whole_are_equal(client: openai.OpenAI, prompt: str) -> None:
    whole, streamed = (respond(client, prompt, stream, tools=flat(WEATHER, CLOCK)) for stream in (False, True))
    assert shape(whole) == shape(streamed)


@pytest.mark.parametrize("prompt", ["hi", "think", "call", "parallel", "long", "choices"])
def test_chat_streamed_and_whole_are_equal(client: openai.OpenAI, prompt: str) -> None:
    whole, streamed = (chat(client, prompt, stream, tools=functions(WEATHER, CLOCK), n=3 if prompt == "choices" else 1)
                       for stream in (False, True))  # fmt: skip
    for answer in (whole, streamed):
        for choice in answer["choices"]:
            assert choice.pop("logprobs", None) is None
            choice["message"].pop("parsed", None)
            choice["message"] = {k: v for k, v in choice["message"].items() if v}
            for call in choice["message"].get("tool_calls", ()):
                call["function"].pop("parsed_arguments", None)
                call.pop("index", None)
    assert whole["choices"] == streamed["choices"]
    assert whole["usage"] == streamed["usage"]


class Place(pydantic.BaseModel):
    city: str


@STREAMED
def test_a_json_schema_in_chat(client: openai.OpenAI, stream: bool) -> None:
    asked: Any = {"model": "m", "messages": [{"role": "user", "content": "json"}], "response_format": Place}
    if stream:
        with client.chat.completions.stream(**asked) as events:
            answer = events.get_final_completion()
    else:
        answer = client.chat.completions.parse(**asked)
    assert answer.choices[0].message.parsed == Place(city="Paris")


@STREAMED
def test_a_json_schema_in_responses(client: openai.OpenAI, stream: bool) -> None:
    if stream:
        with client.responses.stream(model="m", input="json", text_format=Place) as events:
            answer = events.get_final_response()
    else:
        answer = client.responses.parse(model="m", input="json", text_format=Place)
    assert answer.output_parsed == Place(city="Paris")
    assert answer.text is not None
    assert answer.text.format is not None
    assert answer.text.format.type == "json_schema"


@STREAMED
def test_a_tool_and_its_result(client: openai.OpenAI, stream: bool) -> None:
    first = respond(client, "call it", stream, tools=flat(WEATHER))
    call = first.output[-1]
    assert call.type == "function_call"
    assert (call.name, call.arguments) == ("weather", '{"city": "Paris"}')
    history = [
        {"role": "user", "content": "call it"},
        *(item.to_dict() for item in first.output),
        {"type": "function_call_output", "call_id": call.call_id, "output": [{"type": "input_text", "text": "rain"}]},
    ]
    for item in history:
        item.pop("parsed_arguments", None)
    assert respond(client, history, stream, tools=flat(WEATHER)).output_text == "It says rain"


@STREAMED
def test_a_custom_tool_and_its_result(client: openai.OpenAI, stream: bool) -> None:
    patch = {"type": "custom", "name": "apply_patch", "description": "d"}
    call = respond(client, "patch it", stream, tools=[patch]).output[-1]
    assert call.type == "custom_tool_call"
    assert (call.name, call.input) == ("apply_patch", '*** Begin Patch\n+"x"\n*** End Patch')
    history = [
        {"role": "user", "content": "patch it"},
        call.to_dict(),
        {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "done"},
    ]
    assert respond(client, history, stream, tools=[patch]).output_text == "It says done"


@STREAMED
def test_a_tool_of_a_namespace(client: openai.OpenAI, stream: bool) -> None:
    tools = [{"type": "namespace", "name": "mcp__s__", "description": "", "tools": flat(WEATHER)}]
    call = respond(client, "call it", stream, tools=tools).output[-1]
    assert call.type == "function_call"
    assert (call.namespace, call.name) == ("mcp__s__", "weather")


@STREAMED
@pytest.mark.parametrize("summary", [None, "auto"])
def test_reasoning_is_an_item_and_comes_back(client: openai.OpenAI, stream: bool, summary: str | None) -> None:
    asked: Any = {"reasoning": {"summary": summary}, "include": ["reasoning.encrypted_content"], "store": False}
    first = respond(client, "think", stream, **asked)
    thought, answer = first.output
    assert thought.type == "reasoning"
    texts = [part.text for part in (thought.summary if summary else thought.content or [])]
    assert texts == ["I wonder.\n"]
    assert thought.encrypted_content
    assert answer.type == "message"
    assert first.usage is not None
    assert first.usage.output_tokens_details.reasoning_tokens == 4
    bare = thought.to_dict()
    for name in ("id", "content", "status"):
        bare.pop(name, None)
    history = [{"role": "user", "content": "hi"}, bare | {"summary": []}, answer.to_dict()]
    again = respond(client, [*history, {"role": "user", "content": "turns"}], stream)
    assert again.output_text == 'user:hi|assistant:So: "yes" ☃|user:turns'


@STREAMED
def test_several_choices_and_log_probabilities(client: openai.OpenAI, stream: bool) -> None:
    choices = chat(client, "choices", stream, n=3)["choices"]
    assert [choice["message"]["content"] for choice in choices] == ["choice 0", "choice 1", "choice 2"]
    scores = chat(client, "logprobs", stream, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert [other["token"] for other in scores[0]["top_logprobs"]] == ["a", "b"]


@STREAMED
@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_a_forced_tool(client: openai.OpenAI, stream: bool, choice: Any) -> None:
    found = respond(client, "forced", stream, tools=flat(WEATHER), tool_choice=choice)
    assert [item.type for item in found.output] == ["function_call"]
    named = choice if isinstance(choice, str) else {"type": "function", "function": {"name": "weather"}}
    answer = chat(client, "forced", stream, tools=functions(WEATHER), tool_choice=named)
    assert answer["choices"][0]["finish_reason"] == "tool_calls"


@STREAMED
@pytest.mark.parametrize(
    ("prompt", "exception", "code"),
    [
        ("full", openai.BadRequestError, "context_length_exceeded"),
        ("unsupported", openai.BadRequestError, "unsupported_parameter"),
        ("busy", openai.RateLimitError, "rate_limit_exceeded"),
    ],
)
def test_errors_before_the_first_byte(
    client: openai.OpenAI, prompt: str, exception: type[openai.APIStatusError], code: str, stream: bool
) -> None:
    for ask in (respond, chat):
        with pytest.raises(exception) as caught:
            ask(client, prompt, stream)
        assert caught.value.code == code
        assert caught.value.request_id


@pytest.fixture
def lenient(client: openai.OpenAI) -> Iterator[openai.OpenAI]:
    """Client without validation: the SDK's type of a chunk forbids the null finish_reason of OpenAI's own API."""
    with openai.OpenAI(base_url=client.base_url, api_key="none", max_retries=0) as found:
        yield found


@STREAMED
def test_text_completions(client: openai.OpenAI, lenient: openai.OpenAI, stream: bool) -> None:
    body: Any = {"model": "m", "prompt": ["hi"], "max_tokens": 9}
    if stream:
        chunks = list(lenient.completions.create(**body, stream=True, stream_options={"include_usage": True}))
        text, usage = "".join(c.choices[0].text for c in chunks if c.choices), chunks[-1].usage
        finish = [c.choices[0].finish_reason for c in chunks if c.choices][-1]
    else:
        whole = client.completions.create(**body)
        text, usage, finish = whole.choices[0].text, whole.usage, whole.choices[0].finish_reason
    assert (text, finish) == ("Hello", "stop")
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (1, 2)
    several = client.completions.create(model="m", prompt="choices", n=3)
    assert [choice.text for choice in several.choices] == ["choice 0", "choice 1", "choice 2"]
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="m", prompt="hi", best_of=2, stream=stream)
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "best_of")
    with pytest.raises(openai.APIError, match="worker is gone"):
        list(lenient.completions.create(model="m", prompt="fail", stream=True))


def test_a_failure_in_the_middle(client: openai.OpenAI) -> None:
    for ask in (respond, chat):
        with pytest.raises(openai.APIError, match="worker is gone"):
            ask(client, "fail", True)


def test_embeddings(gateway: daemons.Daemon) -> None:
    options: Any = {"base_url": f"{gateway.url}/v1", "api_key": "none", "max_retries": 0, "timeout": 20}
    with openai.OpenAI(**options, _strict_response_validation=True) as client:
        found = client.embeddings.create(model="m", input=["one", "three"], encoding_format="float")
        assert [embedding.index for embedding in found.data] == [0, 1]
        assert found.usage.prompt_tokens > 0
        with pytest.raises(openai.BadRequestError) as caught:
            client.embeddings.create(model="m", input=["a", ""])
        assert caught.value.body["param"] == "input[1]"  # type: ignore[index]
    # Without a format the SDK asks for base64 and makes numbers of it, which its own validation does not expect.
    with openai.OpenAI(**options) as client:
        assert client.embeddings.create(model="m", input=["one", "three"]).data[1].embedding == [5.0, 1.0]
        assert client.embeddings.create(model="m", input=[1, 2]).data[0].embedding == [2.0, 0.0]
