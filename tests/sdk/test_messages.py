"""Anthropic's own SDK, with strict validation, against cortex -> neuron: streamed and not, with equal answers."""

import time
from collections.abc import Iterator
from typing import Any

import anthropic
import daemons
import httpx
import pydantic
import pytest
from anthropic.types import Message

WEATHER: Any = {"name": "weather", "description": "d", "input_schema": {"type": "object", "properties": {}}}
CLOCK: Any = {"type": "custom", "name": "clock", "input_schema": {"type": "object"}}
SEARCH: Any = {"type": "web_search_20250305", "name": "web_search"}


@pytest.fixture
def client(server: daemons.Daemon) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(
        base_url=server.url, api_key="none", max_retries=0, timeout=20, _strict_response_validation=True
    ) as found:
        yield found


def ask(client: anthropic.Anthropic, prompt: str | list[Any], stream: bool, **fields: Any) -> Message:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    body: Any = {"model": "m", "max_tokens": 50, "messages": messages, **fields}
    if not stream:
        return client.messages.create(**body)
    with client.messages.stream(**body) as events:
        for _ in events:
            pass
        return events.get_final_message()


STREAMED = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


@STREAMED
def test_text(client: anthropic.Anthropic, stream: bool) -> None:
    message = ask(client, "hi", stream)
    assert [block.to_dict() for block in message.content] == [{"type": "text", "text": "Hello"}]
    assert (message.stop_reason, message.stop_sequence, message.model) == ("end_turn", None, "m")
    assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (2, 1)
    assert message.usage.output_tokens == 2


@pytest.mark.parametrize("prompt", ["hi", "think", "call", "parallel", "length", "long"])
def test_streamed_and_whole_are_equal(client: anthropic.Anthropic, prompt: str) -> None:
    whole, streamed = (ask(client, prompt, stream, tools=[WEATHER, CLOCK]).to_dict() for stream in (False, True))
    assert whole | {"id": ""} == streamed | {"id": ""}


class Place(pydantic.BaseModel):
    city: str


@STREAMED
def test_a_json_schema(client: anthropic.Anthropic, stream: bool) -> None:
    asked: Any = {"model": "m", "max_tokens": 50, "messages": [{"role": "user", "content": "json"}]}
    if stream:
        with client.messages.stream(**asked, output_format=Place) as events:
            answer = events.get_final_message()
    else:
        answer = client.messages.parse(**asked, output_format=Place)
    assert answer.parsed_output == Place(city="Paris")


@STREAMED
def test_a_tool_and_its_result(client: anthropic.Anthropic, stream: bool) -> None:
    first = ask(client, "call it", stream, tools=[SEARCH, WEATHER])
    assert first.stop_reason == "tool_use"
    text, call = first.content
    assert text.type == "text"
    assert call.type == "tool_use"
    assert (call.name, call.input, call.id) == ("weather", {"city": "Paris"}, "call_1")
    history = [
        {"role": "user", "content": "call it"},
        {"role": "assistant", "content": [block.to_dict() for block in first.content]},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "rain"}]},
            ],
        },
    ]
    last = ask(client, history, stream, tools=[SEARCH, WEATHER])
    assert [block.to_dict() for block in last.content] == [{"type": "text", "text": "It says rain"}]


@STREAMED
def test_parallel_tools(client: anthropic.Anthropic, stream: bool) -> None:
    message = ask(client, "parallel", stream, tools=[WEATHER, CLOCK])
    calls = [block for block in message.content if block.type == "tool_use"]
    assert [(call.name, call.input) for call in calls] == [("weather", {"n": 0}), ("clock", {"n": 1})]


@STREAMED
@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_a_forced_tool(client: anthropic.Anthropic, stream: bool, choice: Any) -> None:
    message = ask(client, "forced", stream, tools=[WEATHER, CLOCK], tool_choice=choice)
    assert [block.type for block in message.content] == ["tool_use"]


@STREAMED
def test_thinking_goes_out_and_comes_back(client: anthropic.Anthropic, stream: bool) -> None:
    message = ask(client, "think", stream, thinking={"type": "enabled", "budget_tokens": 1024}, max_tokens=2048)
    thought, prompt = message.content
    assert thought.type == "thinking"
    assert (thought.thinking, bool(thought.signature)) == ("I wonder.\n", True)
    assert prompt.to_dict() == {"type": "text", "text": 'So: "yes" ☃'}
    replayed = {"role": "assistant", "content": [block.to_dict() for block in message.content]}
    again = ask(client, [{"role": "user", "content": "hi"}, replayed, {"role": "user", "content": "turns"}], stream)
    assert again.content[0].to_dict()["text"] == 'user:hi|assistant:So: "yes" ☃|user:turns'


@STREAMED
def test_a_stop_sequence(client: anthropic.Anthropic, stream: bool) -> None:
    message = ask(client, "stop", stream, stop_sequences=["</block>"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "</block>")


@STREAMED
def test_the_token_limit(client: anthropic.Anthropic, stream: bool) -> None:
    assert ask(client, "length", stream, max_tokens=3).stop_reason == "max_tokens"


@STREAMED
def test_an_image_is_seen(client: anthropic.Anthropic, stream: bool) -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    prompt = [{"role": "user", "content": [{"type": "text", "text": "image "}, image]}]
    assert ask(client, prompt, stream).content[0].to_dict()["text"] == "data:image/png;"


def test_system_messages_and_billing(client: anthropic.Anthropic) -> None:
    system: Any = [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2; cch=1;"},
        {"type": "text", "text": "Rules.", "cache_control": {"type": "ephemeral"}},
    ]
    prompt = [{"role": "user", "content": "turns"}, {"role": "system", "content": "Brief."}]
    message = ask(client, prompt, False, system=system)
    text = message.content[0].to_dict()["text"]
    # To a server that may refuse a second one, system messages go as one.
    assert text in ("system:Rules.|user:turns|system:Brief.", "system:Rules.\n\nBrief.|user:turns")


@pytest.mark.parametrize("extra", [{}, {"tools": [WEATHER, SEARCH]}, {"system": "You are."}])
def test_a_count_is_what_the_engine_then_reports(client: anthropic.Anthropic, extra: Any) -> None:
    prompt: Any = [{"role": "user", "content": "hi there"}]
    counted = client.messages.count_tokens(model="m", messages=prompt, **extra).input_tokens
    usage = ask(client, prompt, False, **extra).usage
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)


@STREAMED
@pytest.mark.parametrize(
    ("prompt", "exception", "status", "match"),
    [
        ("full", anthropic.BadRequestError, 400, "prompt is too long: 150 tokens > 100 maximum"),
        ("unsupported", anthropic.BadRequestError, 400, "'x'"),
        ("busy", anthropic.OverloadedError, 529, "Too many wait"),
    ],
)
def test_errors_before_the_first_byte(
    client: anthropic.Anthropic,
    prompt: str,
    exception: type[anthropic.APIStatusError],
    status: int,
    match: str,
    stream: bool,
) -> None:
    with pytest.raises(exception, match=match) as caught:
        ask(client, prompt, stream)
    assert caught.value.status_code == status
    assert caught.value.request_id
    assert caught.value.response.headers.get("retry-after") == ("2" if status == 529 else None)


@STREAMED
def test_an_unknown_model(client: anthropic.Anthropic, stream: bool) -> None:
    with pytest.raises(anthropic.NotFoundError, match="nobody"):
        ask(client, "hi", stream, model="nobody")
    with pytest.raises(anthropic.NotFoundError, match="nobody"):
        client.messages.count_tokens(model="nobody", messages=[{"role": "user", "content": "hi"}])


def test_a_failure_in_the_middle(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.APIStatusError, match="worker is gone"):
        ask(client, "fail", True)
    with pytest.raises(anthropic.OverloadedError, match="worker is gone"):
        ask(client, "fail", False)


def test_a_client_that_leaves_frees_its_place(server: daemons.Daemon, serving: daemons.Daemon) -> None:
    body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "wait"}]}
    with httpx.stream("POST", server.url + "/v1/messages?beta=true", json=body, timeout=20) as reply:
        lines = reply.iter_lines()
        assert next(lines) == "event: message_start"
        assert running(serving) == 1
        left_at = time.monotonic()
    daemons.until(lambda: running(serving) == 0, 5, "the model is free")
    assert time.monotonic() - left_at < 1


def running(node: daemons.Daemon) -> int:
    return int(node.get("/models")["models"][0]["running"])


@pytest.mark.parametrize(
    "headers",
    [{}, {"x-api-key": "k"}, {"authorization": "Bearer k"}, {"x-api-key": "k", "authorization": "Bearer k"}],
)
@pytest.mark.parametrize("version", [None, "2023-06-01", "2026-10-21", "later"])
def test_any_version_and_credentials(server: daemons.Daemon, headers: dict[str, str], version: str | None) -> None:
    body = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
    sent = headers | ({"anthropic-version": version, "anthropic-beta": "a,b"} if version else {})
    reply = httpx.post(server.url + "/v1/messages?beta=true", json=body, headers=sent)
    assert reply.status_code == 200
    assert reply.headers["request-id"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/messages", 405), ("POST", "/v1/messages/batches", 404), ("POST", "/v1/messages/", 404)],
)
def test_a_missing_path_is_an_error_of_the_dialect(server: daemons.Daemon, method: str, path: str, status: int) -> None:
    reply = httpx.request(method, server.url + path)
    assert (reply.status_code, reply.json()["type"]) == (status, "error")
    assert reply.json()["request_id"] == reply.headers["request-id"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"model":1}', b'{"model":"m"}'])
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_a_bad_body(server: daemons.Daemon, path: str, body: bytes) -> None:
    reply = httpx.post(server.url + path, content=body)
    assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "GET"])
def test_probes_do_not_fail(server: daemons.Daemon, method: str) -> None:
    assert httpx.request(method, server.url + "/api/hello").status_code == 404


def test_model_names_of_claude_code(gateway: daemons.Daemon) -> None:
    with anthropic.Anthropic(
        base_url=gateway.url, api_key="none", max_retries=0, timeout=20, _strict_response_validation=True
    ) as client:
        assert ask(client, "hi", True, model="claude-opus-4-8").model == "claude-opus-4-8"
        assert [model.id for model in client.models.list()] == ["m", "small"]
        assert client.models.retrieve("claude-haiku-4-5").display_name == "claude-haiku-4-5"
        assert client.models.retrieve("m").max_input_tokens == 1 << 20
