"""The daemon's HTTP surface, in process, with a harness that plays scripts."""

import array
import asyncio
import base64
import json
import pathlib
from collections.abc import Awaitable, Callable
from typing import Any

import openai
import pytest
from asgi_client import Reply, ask
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response
from prometheus_client.parser import text_string_to_metric_families
from scripted_model import HELLO, ScriptedHarness, Step

from cortex import event_stream
from cortex.wire.errors import ErrorInfo, OverloadedError, UnprocessableError
from cortex.wire.events import Failed, Finished, FinishReason, ReasoningDelta, Started, TextDelta, ToolCallDelta
from cortex.wire.node import LoadRequest
from cortex.wire.request import InferenceRequest
from neuron.api import Api
from neuron.config import Config, DaemonSettings
from neuron.metrics import RequestRecord
from neuron.service import Service

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
RESPONSES = {"model": "m", "input": "hi"}
ASKS = pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/responses", RESPONSES)], ids=["chat", "responses"]
)
STREAMED = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


def with_api(
    story: Callable[[Api, Service], Awaitable[None]], harness: ScriptedHarness | None, load: bool = True
) -> None:
    async def run() -> None:
        config = Config(daemon=DaemonSettings(name="node", devices="cpu"))
        service = Service(config, {} if harness is None else {"torch": harness})
        if harness is not None and load:
            await service.load(LoadRequest("m", "/"))
        await story(Api(service), service)

    asyncio.run(run())


def ask_once(path: str, body: Any, harness: ScriptedHarness | None = None, **options: Any) -> Reply:
    found: list[Reply] = []

    async def story(api: Api, service: Service) -> None:
        found.append(await ask(api, options.pop("method", "POST"), path, body, **options))

    with_api(story, harness or ScriptedHarness())
    return found[0]


def playing(*script: Step) -> ScriptedHarness:
    return ScriptedHarness(lambda request: list(script))


# ------------------------------------------------------------------ inference


def test_chat_whole() -> None:
    reply = ask_once("/v1/chat/completions", CHAT)
    answer = ChatCompletion.model_validate(reply.json(), strict=True)
    assert reply.status == 200
    assert answer.choices[0].message.content == "Hello"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 2, 7)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 2
    assert reply.headers["x-request-id"]


def test_chat_streamed() -> None:
    reply = ask_once("/v1/chat/completions", CHAT | {"stream": True, "stream_options": {"include_usage": True}})
    sse_events = reply.sse_events()
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert sse_events[-1] == (None, "[DONE]")
    chunks = [ChatCompletionChunk.model_validate(data, strict=True) for _, data in sse_events[:-1]]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 2


def test_responses_streamed_in_order() -> None:
    reply = ask_once("/v1/responses", RESPONSES | {"stream": True})
    events = [event for event, _ in reply.sse_events()]
    assert events == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [data["sequence_number"] for _, data in reply.sse_events()] == list(range(10))
    final = Response.model_validate(reply.sse_events()[-1][1]["response"], strict=True)
    assert final.output_text == "Hello"


def test_responses_whole_equals_the_streamed_response() -> None:
    script = playing(
        [Started(3)], [ReasoningDelta("why")], [TextDelta("a")], [ToolCallDelta(0, "call_1", "f", "{}")],
        [Finished(FinishReason.TOOL_CALLS, 9, 2)],
    )  # fmt: skip
    whole = ask_once("/v1/responses", RESPONSES, script).json()
    last = ask_once("/v1/responses", RESPONSES | {"stream": True}, script).sse_events()[-1][1]["response"]
    Response.model_validate(whole, strict=True)

    def shape(response: dict[str, Any]) -> Any:
        for item in response["output"]:
            item["id"] = ""
        return {k: v for k, v in response.items() if k not in {"id", "created_at", "completed_at"}}

    assert shape(whole) == shape(last)
    assert [item["type"] for item in whole["output"]] == ["reasoning", "message", "function_call"]


@ASKS
@STREAMED
def test_a_missing_model_is_404(path: str, body: dict[str, Any], stream: bool) -> None:
    reply = ask_once(path, body | {"model": "nobody", "stream": stream})
    assert (reply.status, reply.json()["error"]["code"]) == (404, "model_not_found")
    assert "nobody" in reply.json()["error"]["message"]


@ASKS
@STREAMED
def test_no_harness_is_503(path: str, body: dict[str, Any], stream: bool) -> None:
    async def story(api: Api, service: Service) -> None:
        reply = await ask(api, "POST", path, body | {"stream": stream})
        assert (reply.status, reply.json()["error"]["code"]) == (503, "no_harness")

    with_api(story, None)


@STREAMED
def test_a_chained_conversation_is_400(stream: bool) -> None:
    reply = ask_once("/v1/responses", RESPONSES | {"previous_response_id": "resp_1", "stream": stream})
    error = reply.json()["error"]
    assert (reply.status, error["code"], error["param"]) == (
        400,
        "chained_conversation_not_supported",
        "previous_response_id",
    )


@ASKS
@STREAMED
def test_an_error_before_the_first_token_keeps_its_status(path: str, body: dict[str, Any], stream: bool) -> None:
    harness = playing(OverloadedError("full", retry_after_s=2.4))
    reply = ask_once(path, body | {"stream": stream}, harness)
    assert (reply.status, reply.headers["retry-after"]) == (429, "3")
    assert reply.json()["error"]["code"] == "rate_limit_exceeded"


FAILURE = ErrorInfo(503, "device_worker_lost", "The device worker died.", retry_after_s=1)


@ASKS
def test_a_failure_in_mid_stream_is_an_error_event(path: str, body: dict[str, Any]) -> None:
    reply = ask_once(path, body | {"stream": True}, playing([Started(1)], [TextDelta("a")], [Failed(FAILURE)]))
    assert (reply.status, reply.complete) == (200, True)
    event, data = reply.sse_events()[-1]
    if path.endswith("responses"):
        assert event == "response.failed"
        assert data["response"]["error"]["message"] == FAILURE.message
    else:
        assert data["error"]["code"] == "device_worker_lost"
        assert b"[DONE]" not in reply.body


@ASKS
def test_a_failure_while_the_answer_is_whole_is_a_status(path: str, body: dict[str, Any]) -> None:
    reply = ask_once(path, body, playing([Started(1)], [TextDelta("a")], [Failed(FAILURE)]))
    assert (reply.status, reply.json()["error"]["code"]) == (503, "device_worker_lost")


@ASKS
@STREAMED
def test_a_bug_is_a_500_and_the_daemon_lives(path: str, body: dict[str, Any], stream: bool) -> None:
    reply = ask_once(path, body | {"stream": stream}, playing(ZeroDivisionError("secret")))
    assert (reply.status, reply.json()["error"]["code"]) == (500, "internal_error")
    assert b"secret" not in reply.body


@ASKS
@STREAMED
@pytest.mark.parametrize("leave_after_chunks", [0, 1])
def test_a_client_that_leaves_ends_the_work(
    path: str, body: dict[str, Any], stream: bool, leave_after_chunks: int
) -> None:
    async def story(api: Api, service: Service) -> None:
        if not stream and leave_after_chunks:
            return  # a whole answer has no middle
        await ask(api, "POST", path, body | {"stream": stream}, leave_after_chunks=leave_after_chunks)
        assert harness.models["m"].closed == 1
        assert service.models.statuses()[0].running == 0

    harness = ScriptedHarness(lambda request: [[Started(1)], [TextDelta("a")], asyncio.Event()])
    with_api(story, harness)


def test_headers_and_heartbeats_do_not_wait_for_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "HOLD_HEADERS_S", 0.01)
    monkeypatch.setattr(event_stream, "HEARTBEAT_INTERVAL_S", 0.01)

    async def story(api: Api, service: Service) -> None:
        asyncio.get_running_loop().call_later(0.1, silent.set)
        reply = await ask(api, "POST", "/v1/chat/completions", CHAT | {"stream": True})
        assert reply.chunks[0] == b": keep-alive\n\n"
        assert reply.chunks.count(b": keep-alive\n\n") > 1
        assert reply.sse_events()[-1] == (None, "[DONE]")

    silent = asyncio.Event()
    with_api(story, ScriptedHarness(lambda request: [silent, *HELLO]))


def test_a_gateway_sends_the_principal_and_priority() -> None:
    asked = []

    def play(request: InferenceRequest) -> list[Any]:
        asked.append((request.principal, request.priority))
        return list(HELLO)

    async def story(api: Api, service: Service) -> None:
        for priority in ("7", "-3", ""):
            headers = {"x-cortex-principal": "alice", "x-cortex-priority": priority}
            assert (await ask(api, "POST", "/v1/chat/completions", CHAT, headers=headers)).status == 200
        wrong = await ask(api, "POST", "/v1/chat/completions", CHAT, headers={"x-cortex-priority": "first"})
        assert wrong.status == 400
        assert "x-cortex-priority" in wrong.json()["error"]["message"]

    with_api(story, ScriptedHarness(play))
    assert asked == [("alice", 7), ("alice", -3), ("alice", 0)]


@STREAMED
def test_the_principal_is_known_in_every_dialect(stream: bool) -> None:
    asked = []

    def play(request: InferenceRequest) -> list[Any]:
        asked.append(request.principal)
        return list(HELLO)

    bodies = {
        "/v1/chat/completions": CHAT,
        "/v1/completions": {"model": "m", "prompt": "hi"},
        "/v1/responses": RESPONSES,
        "/v1/messages": CHAT | {"max_tokens": 5},
    }

    async def story(api: Api, service: Service) -> None:
        for path, body in bodies.items():
            reply = await ask(api, "POST", path, body | {"stream": stream}, headers={"x-cortex-principal": "alice"})
            assert reply.status == 200, reply.body

    with_api(story, ScriptedHarness(play))
    assert asked == ["alice"] * len(bodies)


def test_usage_is_reported_to_a_gateway_that_asks() -> None:
    reply = ask_once("/v1/chat/completions", CHAT | {"stream": True}, headers={"x-cortex-report-usage": "1"})
    comment = next(line for line in reply.body.decode().split("\n") if line.startswith(": usage "))
    assert '"prompt_tokens":5' in comment
    assert '"completion_tokens":2' in comment
    assert '"cached_tokens":2' in comment


@ASKS
@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff\xfe", b'{"model":"m"}'])
def test_a_bad_body_is_400(path: str, body: dict[str, Any], raw: bytes) -> None:
    reply = ask_once(path, raw)
    assert reply.status == 400
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_nested_deeper_than_is_read_is_400() -> None:
    deep = b"[" * 300 + b"]" * 300
    openai = (
        "chat/completions",
        "completions",
        "responses",
        "responses/compact",
        "responses/input_tokens",
        "embeddings",
    )
    for path in (*openai, "messages", "messages/count_tokens"):
        reply = ask_once(f"/v1/{path}", b'{"model":"m","input":"a","metadata":' + deep + b"}")
        assert reply.status == 400, path
        assert b"Too deeply nested" in reply.body


def test_a_body_that_is_too_large_is_413() -> None:
    async def story(api: Api, service: Service) -> None:
        service.max_body_bytes = 100
        reply = await ask(api, "POST", "/v1/chat/completions", CHAT | {"pad": "x" * 100})
        assert (reply.status, reply.json()["error"]["code"]) == (413, "request_too_large")

    with_api(story, ScriptedHarness())


def test_embeddings_of_texts_and_tokens() -> None:
    reply = ask_once("/v1/embeddings", json.dumps({"model": "m", "input": ["ab", "c"]}).encode())
    assert reply.status == 200
    assert reply.json() == {
        "object": "list",
        "model": "m",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [2.0, 0.0]},
            {"object": "embedding", "index": 1, "embedding": [1.0, 1.0]},
        ],
        "usage": {"prompt_tokens": 3, "total_tokens": 3},
    }
    body = {"model": "m", "input": [5, 6, 7], "encoding_format": "base64", "user": "u"}
    packed = ask_once("/v1/embeddings", json.dumps(body).encode()).json()["data"][0]["embedding"]
    assert array.array("f", base64.b64decode(packed)).tolist() == [3.0, 0.0]
    missing = ask_once("/v1/embeddings", b'{"model": "x", "input": "a"}')
    assert (missing.status, missing.json()["error"]["code"]) == (404, "model_not_found")


# ------------------------------------------------------------------ the node


def get(path: str, method: str = "GET") -> Reply:
    return ask_once(path, b"", method=method)


def test_discovery_lists_devices_harnesses_and_dialects() -> None:
    found = get("/discovery").json()
    assert found["name"] == "node"
    assert found["harnesses"] == ["torch"]
    assert found["dialects"] == [
        "openai-chat", "openai-completions", "openai-embeddings", "openai-responses", "anthropic-messages",
    ]  # fmt: skip
    cpu = next(device for device in found["devices"] if device["id"] == "cpu:0")
    assert cpu["kind"] == "cpu"
    assert cpu["memory_total_bytes"] > cpu["memory_free_bytes"] > 0
    assert cpu["num_cores"] >= 1


def test_health_version_models_endpoint() -> None:
    assert get("/health").json()["state"] == "starting"
    assert get("/version").json()["name"] == "neuron"
    assert [m["id"] for m in get("/models").json()["models"]] == ["m"]
    (listed,) = get("/v1/models").json()["data"]
    assert (listed["id"], listed["owned_by"], listed["state"], listed["max_model_len"]) == (
        "m",
        "neuron",
        "ready",
        1 << 20,
    )
    assert listed["modalities"] == {"input": ["text", "image"], "output": ["text"]}
    assert get("/v1/models/m").json() == listed
    assert get("/v1/models/a/b:c").json()["error"]["code"] == "model_not_found"
    endpoint = get("/models/m/endpoint").json()
    assert endpoint["base_url"].endswith("/v1")
    assert get("/models/x/endpoint").status == 404


def test_load_and_unload() -> None:
    async def story(api: Api, service: Service) -> None:
        loaded = await ask(api, "POST", "/models/load", {"id": "n", "source": "/"})
        assert (loaded.status, loaded.json()["state"], loaded.json()["context_tokens"]) == (200, "ready", 1 << 20)
        unloaded = await ask(api, "POST", "/models/unload", {"id": "n"})
        assert (unloaded.status, unloaded.json()["state"]) == (200, "available")
        assert (await ask(api, "POST", "/models/unload", {"id": "who"})).status == 404
        forgotten = await ask(api, "POST", "/models/forget", {"id": "n"})
        assert (forgotten.status, forgotten.json()["id"]) == (200, "n")
        assert (await ask(api, "POST", "/models/forget", {"id": "n"})).status == 404
        assert "n" not in [model["id"] for model in (await ask(api, "GET", "/models")).json()["models"]]
        await ask(api, "POST", "/models/load", {"id": "n", "source": "/"})
        assert (await ask(api, "POST", "/models/forget", {"id": "n"})).status >= 400, "it is loaded"

    with_api(story, ScriptedHarness())


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"id": "n"}, 400, "source"),
        ({"id": "n", "source": 3}, 400, "source"),
        ({"id": "n", "source": "/", "sauce": 1}, 400, None),
        ({"id": "n", "source": "/nowhere/at/all"}, 422, "source"),
        ({"id": "n", "source": "hf:x"}, 400, "source"),
        ({"id": "n", "source": "/", "harness": "candle"}, 503, "harness"),
    ],
)
def test_a_wrong_load_is_refused_with_its_reason(body: dict[str, Any], status: int, param: str | None) -> None:
    reply = ask_once("/models/load", body)
    assert reply.status == status
    assert reply.json()["error"]["message"]
    if param is not None:
        assert reply.json()["error"]["param"] == param


def test_a_failed_load_has_its_reason() -> None:
    async def story(api: Api, service: Service) -> None:
        harness.fails = UnprocessableError("model does not fit on cpu:0: needs 18.2 GiB, free 15.9 GiB")
        reply = await ask(api, "POST", "/models/load", {"id": "n", "source": "/"})
        assert reply.status == 422
        assert "18.2 GiB" in reply.json()["error"]["message"]

    harness = ScriptedHarness()
    with_api(story, harness)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("POST", "/", 404),
        ("DELETE", "/models/load", 405),
        ("GET", "/v1/chat/completions", 405),
        ("OPTIONS", "/v1/chat/completions", 405),
        ("HEAD", "/health", 200),
        ("HEAD", "/v1/responses", 405),
    ],
)
def test_paths_and_methods(method: str, path: str, status: int) -> None:
    reply = get(path, method)
    assert reply.status == status
    if method == "HEAD":
        assert reply.body == b""


def test_metrics_parse_and_count() -> None:
    async def story(api: Api, service: Service) -> None:
        async def value(name: str, **labels: str) -> float:
            text = (await ask(api, "GET", "/metrics")).body.decode()
            samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
            return next((s.value for s in samples if s.name == name and labels.items() <= s.labels.items()), 0.0)

        before = await value("neuron_tokens_total", model="m", kind="output")
        await ask(api, "POST", "/v1/chat/completions", CHAT)
        await ask(api, "POST", "/v1/chat/completions", CHAT | {"model": "made-up"})
        assert await value("neuron_tokens_total", model="m", kind="output") == before + 2
        assert await value("neuron_time_to_first_token_seconds_count", model="m") > 0
        assert await value("neuron_requests_total", model="made-up") == 0
        await ask(api, "POST", "/models/unload", {"id": "m"})
        text = (await ask(api, "GET", "/metrics")).body.decode()
        assert [line for line in text.splitlines() if 'model="m"' in line] == [
            'neuron_model_state{model="m",state="available"} 1.0',
        ]

    with_api(story, ScriptedHarness())


def test_no_series_is_there_twice_or_outlives_its_model() -> None:
    """Also where a request ends after its model was unloaded, and so counts itself anew."""

    async def story(api: Api, service: Service) -> None:
        async def models() -> set[str]:
            text = (await ask(api, "GET", "/metrics")).body.decode()
            samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
            rows = [(s.name, *sorted(s.labels.items())) for s in samples]
            assert len(rows) == len(set(rows))
            return {s.labels["model"] for s in samples if s.labels.get("model") and "state" not in s.labels}

        assert await models() == set()
        await ask(api, "POST", "/models/load", {"id": "m", "source": "/"})
        await ask(api, "POST", "/v1/chat/completions", CHAT)
        assert await models() == {"m"}
        late = RequestRecord("req_late", "openai-chat")
        late.model = "m"
        await ask(api, "POST", "/models/unload", {"id": "m"})
        assert await models() == set()
        late.close(200)
        assert await models() == set()

    with_api(story, ScriptedHarness(), load=False)


def test_the_sdk_raises_its_own_error_types() -> None:
    """The envelope is what the official SDK reads its fields from."""
    body = ask_once("/v1/chat/completions", CHAT | {"temperature": 9}).json()
    error = openai.APIError("x", request=None, body=body["error"])  # type: ignore[arg-type]
    assert (error.code, error.param, error.type) == ("invalid_value", "temperature", "invalid_request_error")


# ------------------------------------------------------------------ keep-alive and principals


def test_a_load_sets_the_keep_alive_and_a_pin_changes_it() -> None:
    async def story(api: Api, service: Service) -> None:
        body = {"id": "n", "source": "/", "priority": 2, "idle_ttl_s": 60, "evict": {"strategy": "priority"}}
        status = (await ask(api, "POST", "/models/load", body)).json()
        assert (status["state"], status["priority"], status["idle_ttl_s"], status["pinned"]) == ("ready", 2, 60, False)
        pinned = (await ask(api, "POST", "/models/pin", {"id": "n", "pinned": True})).json()
        assert (pinned["pinned"], pinned["priority"]) == (True, 2)
        assert (await ask(api, "POST", "/models/pin", {"id": "nobody"})).status == 404
        stale = {"id": "n", "generation": status["generation"] - 1}
        reply = await ask(api, "POST", "/models/unload", stale)
        assert (reply.status, reply.json()["error"]["code"]) == (409, "generation_conflict")
        before = (await ask(api, "GET", "/models")).json()["generation"]
        unloaded = await ask(api, "POST", "/models/unload", {"id": "n", "generation": status["generation"]})
        assert unloaded.json()["state"] == "available"
        assert (await ask(api, "GET", "/models")).json()["generation"] > before

    with_api(story, ScriptedHarness())


def test_a_drained_node_takes_nothing_new_until_it_is_opened_again() -> None:
    async def story(api: Api, service: Service) -> None:
        refused = await ask(api, "POST", "/drain", {})
        assert (refused.status, refused.json()["error"]["param"]) == (400, "draining")
        assert (await ask(api, "GET", "/health")).json()["state"] != "draining"
        assert (await ask(api, "POST", "/drain", {"draining": True})).json()["state"] == "draining"
        assert (await ask(api, "GET", "/health")).json()["state"] == "draining"
        for path, body in (("/v1/chat/completions", CHAT), ("/models/load", {"id": "n", "source": "/"})):
            reply = await ask(api, "POST", path, body)
            assert (reply.status, "retry-after" in reply.headers) == (503, True)
        await ask(api, "POST", "/drain", {"draining": False})
        assert (await ask(api, "POST", "/v1/chat/completions", CHAT)).status == 200

    with_api(story, ScriptedHarness())


def test_a_node_with_a_secret_answers_only_its_holders(tmp_path: pathlib.Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("open sesame\n")

    async def run() -> None:
        service = Service(
            Config(daemon=DaemonSettings(devices="cpu", secret_file=str(secret))), {"torch": ScriptedHarness()}
        )
        await service.load(LoadRequest("m", "/"))
        api = Api(service)
        for given in ({}, {"authorization": "Bearer open"}, {"authorization": "open sesame"}):
            reply = await ask(api, "POST", "/v1/chat/completions", CHAT, headers=given)
            assert (reply.status, reply.json()["error"]["code"]) == (401, "invalid_api_key")
            assert (await ask(api, "GET", "/models", headers=given)).status == 401
        assert (await ask(api, "GET", "/health")).status == 200
        given = {"authorization": "Bearer open sesame"}
        assert (await ask(api, "POST", "/v1/chat/completions", CHAT, headers=given)).status == 200

    asyncio.run(run())


# ------------------------------------------------------------------ unknown members


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", {"model": "m", "prompt": "hi"}),
        ("/v1/responses", RESPONSES),
        ("/v1/messages", CHAT | {"max_tokens": 5}),
        ("/v1/messages/count_tokens", CHAT),
        ("/v1/embeddings", {"model": "m", "input": "hi"}),
    ],
)
@STREAMED
def test_an_answer_lists_unknown_members(path: str, body: dict[str, Any], stream: bool) -> None:
    asked = body | ({"stream": True} if stream else {})
    assert "x-cortex-ignored" not in ask_once(path, asked).headers
    reply = ask_once(path, asked | {"temprature": 0.5})
    assert reply.status == 200
    assert reply.headers["x-cortex-ignored"] == "temprature"


@STREAMED
def test_an_answer_lists_unenforced_parts_of_its_schema(stream: bool) -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    chat = {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}}
    responses = {"text": {"format": {"type": "json_schema", "name": "s", "schema": schema}}}
    for path, body in (("/v1/chat/completions", CHAT | chat), ("/v1/responses", RESPONSES | responses)):
        reply = ask_once(path, body | ({"stream": True} if stream else {}))
        assert (reply.status, reply.headers["x-cortex-ignored"]) == (200, "response_format.uniqueItems")


def test_parameters_of_other_servers_are_refused_by_name() -> None:
    reply = ask_once("/v1/chat/completions", CHAT | {"use_beam_search": True})
    assert (reply.status, reply.json()["error"]["code"]) == (400, "unsupported_parameter")
    assert reply.json()["error"]["param"] == "use_beam_search"
