"""Responses over a WebSocket: responses that only the connection keeps, lanes, errors, leaving, the SDK itself."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import daemons
import httpx
import openai
import pydantic
import pytest
import websockets
from openai.types.responses import ResponsesServerEvent

EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponsesServerEvent)


class Socket:
    """A connection; every event that arrives is checked against the SDK's types."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    async def send(self, prompt: Any, **fields: Any) -> None:
        await self.connection.send(
            json.dumps({"type": "response.create", "model": "small", "input": prompt, "store": False, **fields})
        )

    async def event(self) -> dict[str, Any]:
        async with asyncio.timeout(20):
            event: dict[str, Any] = json.loads(await self.connection.recv())
        EVENT.validate_python(event, strict=True)
        return event

    async def ask(self, prompt: Any, **fields: Any) -> dict[str, Any]:
        """Return the response of the last event; all events are checked on the way."""
        await self.send(prompt, **fields)
        return await self.rest()

    async def rest(self) -> dict[str, Any]:
        number = 0
        while True:
            event = await self.event()
            assert event["type"] != "error", event
            assert event["sequence_number"] == number
            assert number or event["type"] == "response.created"
            number += 1
            if event["type"] in ("response.completed", "response.incomplete", "response.failed"):
                response: dict[str, Any] = event["response"]
                return response


@contextlib.asynccontextmanager
async def connected(gateway: daemons.Daemon, **headers: str) -> AsyncIterator[Socket]:
    url = gateway.url.replace("http", "ws") + "/v1/responses"
    async with websockets.connect(url, additional_headers=headers, max_size=None) as connection:
        yield Socket(connection)


def text(response: dict[str, Any]) -> str:
    return "".join(part["text"] for item in response["output"] if item["type"] == "message" for part in item["content"])


def run(work: Any) -> None:
    asyncio.run(work)


def test_a_chain_in_the_connections_history_alone(gateway: daemons.Daemon) -> None:
    async def work() -> None:
        async with connected(gateway, **{"openai-beta": "responses_websockets=2026-02-06"}) as socket:
            warm = await socket.ask("hi 0", generate=False, instructions="Be brief.")
            assert (warm["status"], warm["output"], warm["store"]) == ("completed", [], False)
            answer = await socket.ask([], previous_response_id=warm["id"])
            assert text(answer) == "Hello"
            expected = ["user:hi 0", "assistant:Hello"]
            for turn in range(1, 12):
                prompt = [{"role": "user", "content": f"hi {turn}"}]
                answer = await socket.ask(prompt, previous_response_id=answer["id"])
                expected += [f"user:hi {turn}", "assistant:Hello"]
            answered = await socket.ask("turns", previous_response_id=answer["id"])
            assert answered["previous_response_id"] == answer["id"]
            assert text(answered).split("|") == [*expected, "user:turns"]
            # A stored response brings along those that only the connection kept.
            kept = await socket.ask("hi", previous_response_id=answer["id"], store=True)
            async with connected(gateway) as other:
                assert text(await other.ask("turns", previous_response_id=kept["id"])).split("|") == [
                    *expected,
                    "user:hi",
                    "assistant:Hello",
                    "user:turns",
                ]
                await other.send("hi", previous_response_id=answer["id"])
                error = await other.event()
                assert (error["type"], error["status"]) == ("error", 400)
                assert error["error"]["code"] == "previous_response_not_found"
            followed = await socket.ask("turns", previous_response_id=kept["id"], store=True)
            assert text(followed).startswith("user:hi 0|")

    run(work())


def test_a_tool_and_its_result(gateway: daemons.Daemon) -> None:
    async def work() -> None:
        tools = [{"type": "function", "name": "weather", "parameters": None, "strict": False}]
        async with connected(gateway) as socket:
            called = await socket.ask("call it", tools=tools)
            call = called["output"][-1]
            assert (call["type"], call["arguments"]) == ("function_call", '{"city": "Paris"}')
            result = [{"type": "function_call_output", "call_id": call["call_id"], "output": "rain"}]
            assert text(await socket.ask(result, tools=tools, previous_response_id=called["id"])) == "It says rain"

    run(work())


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("{", "invalid_json"),
        ("[]", "invalid_json"),
        ('{"type":"response.steer"}', "invalid_value"),
        ('{"type":3}', "invalid_value"),
        ('{"type":"response.create","model":"m","input":"hi","background":true}', "invalid_value"),
        ('{"type":"response.create","input":"hi"}', "missing_required_parameter"),
        ('{"type":"response.create","model":"nobody","input":"hi"}', "model_not_found"),
        ('{"type":"response.create","model":"nobody","input":"hi","generate":false}', "model_not_found"),
        ('{"type":"response.create","model":"m","input":[{"type":"message"}],"generate":false}', "invalid_value"),
        ('{"type":"response.create","model":"m","input":"full"}', "context_length_exceeded"),
        ('{"type":"response.create","model":"m","input":"busy"}', "rate_limit_exceeded"),
    ],
)
def test_errors_do_not_end_the_connection(gateway: daemons.Daemon, message: str, code: str) -> None:
    async def work() -> None:
        async with connected(gateway) as socket:
            await socket.connection.send(message)
            error = await socket.event()
            assert (error["type"], error["error"]["code"]) == ("error", code)
            assert error["status"] >= 400
            assert text(await socket.ask("hi")) == "Hello"

    run(work())


def test_a_failure_in_the_middle(gateway: daemons.Daemon) -> None:
    async def work() -> None:
        async with connected(gateway) as socket:
            await socket.send("fail")
            seen = []
            while not seen or seen[-1]["type"] != "response.failed":
                seen.append(await socket.event())
            assert seen[-1]["response"]["error"]["message"] == "The worker is gone."
            assert text(await socket.ask("hi")) == "Hello"

    run(work())


def test_lanes_run_concurrently_and_requests_of_a_lane_in_order(gateway: daemons.Daemon) -> None:
    async def work() -> None:
        async with connected(gateway) as socket:
            await socket.send("wait", stream_id="a")
            while (await socket.event())["type"] != "response.output_text.delta":
                pass
            for prompt in ("hi 1", "hi 2"):
                await socket.send(prompt, stream_id="b")
            done = []
            while len(done) < 2:
                event = await socket.event()
                assert event["stream_id"] == "b"
                if event["type"] == "response.completed":
                    done.append(event["response"]["id"])
            assert len(set(done)) == 2

    run(work())


def test_a_client_that_disconnects_ends_its_requests(gateway: daemons.Daemon) -> None:
    async def work() -> None:
        async with connected(gateway) as socket:
            for lane in ("a", "b"):
                await socket.send("wait", stream_id=lane)
            waiting = set()
            while len(waiting) < 2:
                event = await socket.event()
                if event["type"] == "response.output_text.delta":
                    waiting.add(event["stream_id"])

    run(work())
    daemons.until(lambda: gateway.get("/health")["in_flight"] == 0, 5, "both responses have ended")


def test_other_paths_have_none(gateway: daemons.Daemon) -> None:
    async def work() -> None:
        url = gateway.url.replace("http", "ws") + "/v1/chat/completions"
        with pytest.raises(websockets.exceptions.InvalidHandshake):
            async with websockets.connect(url):
                pass

    run(work())
    assert httpx.get(gateway.url + "/health").status_code == 200


def test_a_message_that_is_too_long(gateway: daemons.Daemon) -> None:
    async def work() -> None:
        async with connected(gateway) as socket:
            with contextlib.suppress(websockets.ConnectionClosed):
                await socket.send("x" * (33 << 20))
            with pytest.raises(websockets.ConnectionClosed):
                await socket.event()

    run(work())


def test_a_connection_ends_when_its_client_closes_it(gateway: daemons.Daemon) -> None:
    """And not when a garbage collection finds what held it."""

    async def work() -> None:
        async with connected(gateway) as socket:
            await socket.ask("hi")
            async with asyncio.timeout(5):  # the client's own timeout is 10 s
                await socket.connection.close()
                await socket.connection.wait_closed()

    run(work())


@pytest.mark.filterwarnings("ignore:connect:DeprecationWarning")  # the SDK's business
def test_the_sdks_own_connection(gateway: daemons.Daemon) -> None:
    with (
        openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client,
        client.responses.connect() as connection,
    ):
        connection.response.create(model="m", input="hi")
        types = []
        for event in connection:
            types.append(event.type)
            if event.type == "response.completed":
                assert event.response.output_text == "Hello"
                break
    assert types[0] == "response.created"
