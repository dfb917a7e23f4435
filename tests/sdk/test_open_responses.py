"""The Open Responses specification's acceptance suite, ported: its seventeen tests against the real daemons.

The suite (https://github.com/openresponses/openresponses, ``bun run test:compliance``) holds each response and event to
the schemas of the specification; here ``openresponses-types`` does, which is made from the same document. Ten tests ask
over HTTP, seven over a WebSocket. The model's output is a script.
"""

import asyncio
import base64
import json
from typing import Any

import daemons
import httpx
import openai
import openresponses_types.types as spec
import pydantic
import pytest
import websockets

from cortex.dialects.responses.spec import responses_failure
from cortex.wire.errors import ApiError

RESPONSE = pydantic.TypeAdapter(spec.ResponseResource)
COMPACTION = pydantic.TypeAdapter(spec.CompactResource)
PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC")
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Weather of a place",
    "parameters": {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]},
}
LAST = ("response.completed", "response.incomplete", "response.failed")


def events_of_the_specification() -> pydantic.TypeAdapter[Any]:
    """Return a parser of any event of a stream: the specification has these and no others."""
    kinds = [
        kind
        for name, kind in vars(spec).items()
        if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel) and name.endswith("StreamingEvent")
    ]
    assert len(kinds) > 20
    union: Any = kinds[0]
    for kind in kinds[1:]:
        union = union | kind
    return pydantic.TypeAdapter(union)


EVENT = events_of_the_specification()


def message(text: str, role: str = "user", **fields: Any) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": text, **fields}


def asked(server: daemons.Daemon, message: Any, **fields: Any) -> dict[str, Any]:
    """Return a response over HTTP, checked against the schema."""
    body = {"model": "m", "input": message, "stream": False, **fields}
    reply = httpx.post(f"{server.url}/v1/responses", json=body, timeout=30)
    assert reply.status_code == 200, reply.text
    RESPONSE.validate_python(reply.json())
    found: dict[str, Any] = reply.json()
    return found


def is_complete(response: dict[str, Any]) -> bool:
    return bool(response["output"]) and response["status"] == "completed"


# ------------------------------------------------------------------ over HTTP


def test_a_basic_response(server: daemons.Daemon) -> None:
    assert is_complete(asked(server, [message("Say hello in three words.")]))


def test_a_stream(server: daemons.Daemon) -> None:
    body = {"model": "m", "input": [message("Count to five.")], "stream": True}
    events = []
    with httpx.stream("POST", f"{server.url}/v1/responses", json=body, timeout=30) as reply:
        name = ""
        for line in reply.iter_lines():
            if line.startswith("event:"):
                name = line[6:].strip()
            elif line.startswith("data:") and line[5:].strip() != "[DONE]":
                events.append(json.loads(line[5:]))
                assert events[-1]["type"] == name
    check_events(events)
    assert is_complete(events[-1]["response"])


def check_events(events: list[dict[str, Any]]) -> None:
    """Hold a stream to the schema of each event, and to the order of them all."""
    for event in events:
        EVENT.validate_python(event)
        if "response" in event:
            RESPONSE.validate_python(event["response"])
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] in LAST
    assert not {*kinds[:-1]}.intersection(LAST)
    for kind in ("output_item", "content_part"):
        assert kinds.count(f"response.{kind}.added") == kinds.count(f"response.{kind}.done")


def test_phases_of_an_assistants_history(server: daemons.Daemon) -> None:
    history = [
        message("I should say the number.", "assistant", phase="commentary"),
        message("It is four.", "assistant", phase="final_answer"),
        message("Repeat it."),
    ]
    assert is_complete(asked(server, history))


def test_phases_of_an_answer_are_in_the_schema(server: daemons.Daemon) -> None:
    response = asked(server, [message("hi")])
    response["output"][0]["phase"] = "final_answer"
    RESPONSE.validate_python(response)


def test_a_system_prompt(server: daemons.Daemon) -> None:
    assert is_complete(asked(server, [message("You are a pirate.", "system"), message("Say hello.")]))


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called(server: daemons.Daemon, stream: bool) -> None:
    if not stream:
        response = asked(server, [message("call for the weather in San Francisco")], tools=[WEATHER])
        assert any(item["type"] == "function_call" for item in response["output"])
        return
    body = {"model": "m", "input": [message("call it")], "tools": [WEATHER], "stream": True}
    reply = httpx.post(f"{server.url}/v1/responses", json=body, timeout=30)
    events = [json.loads(line[5:]) for line in reply.text.splitlines() if line.startswith("data:")]
    check_events(events)
    kinds = [event["type"] for event in events]
    assert "response.function_call_arguments.delta" in kinds
    assert "response.function_call_arguments.done" in kinds
    for kind in ("added", "done"):
        items = [event["item"]["type"] for event in events if event["type"] == f"response.output_item.{kind}"]
        assert "function_call" in items


def test_a_call_and_its_output(server: daemons.Daemon) -> None:
    first = asked(server, "call it", tools=[WEATHER])
    call = first["output"][-1]
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "rain"}
    response = asked(server, [message("call it"), *first["output"], output], tools=[WEATHER])
    assert is_complete(response)
    assert response["output"][0]["content"][0]["text"] == "It says rain"


def test_an_image(server: daemons.Daemon) -> None:
    url = f"data:image/png;base64,{base64.b64encode(PIXEL).decode()}"
    parts = [{"type": "input_text", "text": "image"}, {"type": "input_image", "image_url": url}]
    assert is_complete(asked(server, [{"type": "message", "role": "user", "content": parts}]))


def test_several_messages(server: daemons.Daemon) -> None:
    history = [message("My name is Alice."), message("Hello Alice!", "assistant"), message("What is my name?")]
    assert is_complete(asked(server, history))


def compacted(server: daemons.Daemon, message: Any, **fields: Any) -> dict[str, Any]:
    body = {"model": "m", "input": message, **fields}
    reply = httpx.post(f"{server.url}/v1/responses/compact", json=body, timeout=30)
    assert reply.status_code == 200, reply.text
    COMPACTION.validate_python(reply.json())
    found: dict[str, Any] = reply.json()
    return found


def test_a_conversation_is_compacted(server: daemons.Daemon) -> None:
    history = [message("We agreed to launch on Tuesday."), message("Understood.", "assistant")]
    found = compacted(server, history, prompt_cache_key="a-key")
    assert found["object"] == "response.compaction"
    assert [item["type"] for item in found["output"]] == ["message", "compaction"]
    assert found["usage"]["total_tokens"] > 0


def test_a_compaction_needs_a_model(server: daemons.Daemon) -> None:
    body = {"input": [message("Compact this.")]}
    reply = httpx.post(f"{server.url}/v1/responses/compact", json=body, timeout=30)
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "missing_required_parameter"


def test_a_stream_that_never_began_fails_in_form() -> None:
    error = ApiError("No node answers.").info()
    sse_events = responses_failure(error, b"", b"").split(b"\n\n")
    events = [json.loads(sse_event.partition(b"data: ")[2]) for sse_event in sse_events if sse_event]
    for event in events:
        EVENT.validate_python(event)
    assert events[-1]["type"] == "response.failed"
    RESPONSE.validate_python(events[-1]["response"])


def count(server: daemons.Daemon, message: Any, **fields: Any) -> int:
    body = {"model": "m", "input": message, **fields}
    reply = httpx.post(f"{server.url}/v1/responses/input_tokens", json=body, timeout=30)
    assert reply.status_code == 200, reply.text
    found = reply.json()
    assert found["object"] == "response.input_tokens"
    tokens: int = found["input_tokens"]
    return tokens


def test_prompt_tokens_are_counted_without_an_answer(server: daemons.Daemon) -> None:
    fields = {"instructions": "Be brief.", "tools": [WEATHER]}
    assert count(server, "hi there", **fields) == asked(server, "hi there", **fields)["usage"]["input_tokens"]


@pytest.mark.parametrize("name", ["gateway", "translating"])
def test_chains_are_counted_and_compacted_whole(request: pytest.FixtureRequest, name: str) -> None:
    server: daemons.Daemon = request.getfixturevalue(name)
    first = asked(server, "hi 1")
    second = asked(server, "hi 2", previous_response_id=first["id"])
    alone = count(server, "hi 3")
    assert count(server, "hi 3", previous_response_id=second["id"]) > alone
    assert count(server, None, previous_response_id=second["id"]) > 0
    found = compacted(server, None, previous_response_id=second["id"])
    message = [item["content"][0]["text"] for item in found["output"] if item["type"] == "message"]
    assert message == ["hi 1", "hi 2"]
    # Nothing of it is kept: it is its client's.
    assert httpx.get(f"{server.url}/v1/responses/{found['id']}", timeout=30).status_code == 404


@pytest.mark.parametrize("path", ["compact", "input_tokens"])
@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"input": []}, 400, "invalid_value"),
        ({}, 400, "invalid_value"),
        ({"input": 3}, 400, "invalid_type"),
        ({"input": [{"type": "message", "role": "user", "content": [3]}]}, 400, "invalid_type"),
        ({"input": [{"type": [], "role": {}}]}, 400, "invalid_type"),
        ({"input": [{}] * 30_000}, 400, "too_many_items"),
        ({"input": [3]}, 400, "invalid_type"),
        ({"input": "hi", "model": "nobody"}, 404, "model_not_found"),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}, 400, "tool_call_not_found"),
        ({"input": [{"type": "compaction", "encrypted_content": "gAAAA"}]}, 400, "invalid_value"),
    ],
)
def test_faults_of_either_are_reported(
    server: daemons.Daemon, path: str, fields: dict[str, Any], status: int, code: str
) -> None:
    reply = httpx.post(f"{server.url}/v1/responses/{path}", json={"model": "m"} | fields, timeout=30)
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)


@pytest.mark.parametrize("path", ["compact", "input_tokens"])
@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b'{"model":"m","input":"\\ud800"}', b'{"model":"m","input":[{"a":"\\udc00"}]}']
)
def test_a_body_that_is_not_json_is_reported(server: daemons.Daemon, path: str, body: bytes) -> None:
    reply = httpx.post(f"{server.url}/v1/responses/{path}", content=body, headers={"content-type": "application/json"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_json")


@pytest.mark.parametrize(
    ("message", "status", "code"), [("full", 400, "context_length_exceeded"), ("busy", 429, "rate_limit_exceeded")]
)
def test_a_model_may_refuse_to_count(server: daemons.Daemon, message: str, status: int, code: str) -> None:
    reply = httpx.post(f"{server.url}/v1/responses/input_tokens", json={"model": "m", "input": message}, timeout=30)
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)


RESULT = {"type": "tool_result", "tool_use_id": "t", "content": "x"}
ORPHANS: dict[str, dict[str, Any]] = {
    "/v1/responses": {"input": [{"type": "function_call_output", "call_id": "t", "output": "x"}]},
    "/v1/chat/completions": {"messages": [{"role": "tool", "tool_call_id": "t", "content": "x"}]},
    "/v1/messages": {"max_tokens": 9, "messages": [{"role": "user", "content": [RESULT]}]},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": [RESULT]}]},
}


@pytest.mark.parametrize("path", ORPHANS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_result_without_its_call_is_refused_in_every_dialect(server: daemons.Daemon, path: str, stream: bool) -> None:
    reply = httpx.post(server.url + path, json={"model": "m", "stream": stream} | ORPHANS[path], timeout=30)
    error = reply.json()["error"]
    assert (reply.status_code, error["type"]) == (400, "invalid_request_error")
    assert error.get("code", error.get("details", {}).get("error_code")) == "tool_call_not_found"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("thread", [{"type": "create"}, {"type": "continue", "previous_message_id": "msg_1"}])
def test_a_thread_is_refused_before_anything_is_made_of_its_rest(
    server: daemons.Daemon, stream: bool, thread: dict[str, str]
) -> None:
    body = {"model": "m", "max_tokens": 9, "stream": stream, "thread": thread, "messages": [message("hi")]}
    del body["messages"][0]["type"]
    reply = httpx.post(f"{server.url}/v1/messages", json=body, timeout=30)
    assert reply.status_code == 400
    details = reply.json()["error"]["details"]
    assert details == {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}


def test_the_sdk_counts_and_compacts(server: daemons.Daemon) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        assert client.responses.input_tokens.count(model="m", input="hi").input_tokens > 0
        found = client.responses.compact(model="m", input="hi")
        assert [item.type for item in found.output] == ["message", "compaction"]
        items: Any = [item.model_dump(exclude_unset=True, warnings=False) for item in found.output]
        answer = client.responses.create(model="m", input=[*items, {"role": "user", "content": "turns"}])
        assert answer.output_text.endswith("|user:turns")


# ------------------------------------------------------------------ over a WebSocket


@pytest.fixture(params=["gateway", "translating"])
def socket_url(request: pytest.FixtureRequest) -> str:
    server: daemons.Daemon = request.getfixturevalue(request.param)
    return server.url.replace("http", "ws") + "/v1/responses"


async def exchange(url: str, *messages: Any) -> list[list[dict[str, Any]]]:
    """Send each message when the one before it was answered, on one connection; return the events of each answer."""
    answers: list[list[dict[str, Any]]] = []
    async with websockets.connect(url) as connection:
        for message in messages:
            body = message(answers) if callable(message) else message
            await connection.send(json.dumps({"type": "response.create", "model": "m", "store": False} | body))
            events: list[dict[str, Any]] = []
            while not events or not (events[-1]["type"] in LAST or "status" in events[-1]):
                async with asyncio.timeout(30):
                    events.append(json.loads(await connection.recv()))
            answers.append(events)
    return answers


def ask(url: str, *messages: Any) -> list[list[dict[str, Any]]]:
    return asyncio.run(exchange(url, *messages))


def check_answers(*answers: list[dict[str, Any]]) -> None:
    for events in answers:
        check_events(events)
        assert is_complete(events[-1]["response"])


def continues(index: int, message: Any) -> Any:
    """Return what goes on from the answer of that number."""
    return lambda answers: {"previous_response_id": answers[index][-1]["response"]["id"], "input": message}


def code(events: list[dict[str, Any]]) -> str:
    """Return the code of an error in an answer's place, which has a status; within a stream it has a number."""
    assert events[-1]["type"] == "error"
    found: str = events[-1]["error"]["code"]
    return found


def test_a_response_over_a_websocket(socket_url: str) -> None:
    check_answers(*ask(socket_url, {"input": [message("Count to three.")], "store": True}))


def test_responses_one_after_the_other(socket_url: str) -> None:
    first, second = ask(socket_url, {"input": "hi 1"}, {"input": "hi 2"})
    check_answers(first, second)
    assert first[-1]["response"]["id"] != second[-1]["response"]["id"]


def test_a_response_that_is_not_stored_is_continued(socket_url: str) -> None:
    first, second = ask(socket_url, {"input": "hi"}, continues(0, "turns"))
    check_answers(first, second)
    assert second[-1]["response"]["output"][0]["content"][0]["text"] == "user:hi|assistant:Hello|user:turns"


def test_another_connection_does_not_know_it_and_begins_anew(socket_url: str) -> None:
    (first,) = ask(socket_url, {"input": "hi"})
    missing = {"previous_response_id": first[-1]["response"]["id"], "input": "hi"}
    refused, anew = ask(socket_url, missing, {"input": [message("hi")]})
    assert code(refused) == "previous_response_not_found"
    check_answers(first, anew)


def test_a_response_that_never_was(socket_url: str) -> None:
    (refused,) = ask(socket_url, {"previous_response_id": "resp_0123456789abcdef", "input": "hi"})
    assert code(refused) == "previous_response_not_found"


@pytest.mark.parametrize(
    "failing",
    [
        [{"type": "function_call_output", "call_id": "call_none", "output": "x"}],  # refused before it begins
        "full",  # refused by the model
        "fail",  # broken off in the middle
    ],
)
def test_a_failed_continuation_evicts_its_previous_response(socket_url: str, failing: Any) -> None:
    first, failed, again = ask(socket_url, {"input": "hi"}, continues(0, failing), continues(0, "hi"))
    check_answers(first)
    assert failed[-1]["type"] in ("error", "response.failed")
    assert code(again) == "previous_response_not_found"


def test_a_compacted_conversation_goes_on(socket_url: str, server_of_socket: daemons.Daemon) -> None:
    history = [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "The word is slate."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "OK."}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Compress this."}]},
    ]
    found = compacted(server_of_socket, history)
    (events,) = ask(socket_url, {"input": [*found["output"], message("turns")], "tools": []})
    check_answers(events)
    compacted_text = events[-1]["response"]["output"][0]["content"][0]["text"]
    assert compacted_text.startswith("user:The word is slate.|user:Compress this.|")
    assert compacted_text.endswith("|user:turns")


@pytest.fixture
def server_of_socket(request: pytest.FixtureRequest, socket_url: str) -> daemons.Daemon:
    name = "gateway" if request.node.callspec.params["socket_url"] == "gateway" else "translating"
    found: daemons.Daemon = request.getfixturevalue(name)
    return found
