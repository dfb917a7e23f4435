"""The name that an answer gives to the model: the one that was asked for, whichever way the answer comes."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import daemons
import httpx
import pytest
import websockets

NAMES = pytest.mark.parametrize("name", ["m", "small", "claude-opus-4-1", "claude-☃ and 'more'"])
MESSAGES = [{"role": "user", "content": "hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "hi"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 9},
    "/v1/responses": {"input": "hi"},
}


def names_in(value: Any) -> Iterator[str]:
    """Yield every name of a model in an answer, at the top and in what it carries."""
    if not isinstance(value, dict):
        return
    if "model" in value:
        yield value["model"]
    for carrier in ("response", "message"):
        yield from names_in(value.get(carrier))


def names_of(reply: httpx.Response) -> set[str]:
    if not reply.headers["content-type"].startswith("text/event-stream"):
        return set(names_in(reply.json()))
    data = [line[6:] for line in reply.text.splitlines() if line.startswith("data: {")]
    return {name for line in data for name in names_in(json.loads(line))}


@pytest.fixture(params=["gateway", "translating"])
def url(request: pytest.FixtureRequest) -> str:
    found: daemons.Daemon = request.getfixturevalue(request.param)
    return found.url


@NAMES
@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_an_answer_has_the_name_that_was_asked_for(url: str, path: str, name: str, stream: bool) -> None:
    with httpx.Client(timeout=20) as client:
        for _ in range(2):  # the second one has a connection that is open, and could be sent at once
            reply = client.post(url + path, json={"model": name, "stream": stream, **BODIES[path]})
            assert reply.status_code == 200, reply.text
            assert names_of(reply) == {name}


@NAMES
def test_stored_responses_have_it_too(url: str, name: str) -> None:
    with httpx.Client(timeout=20, base_url=url) as client:
        first = client.post("/v1/responses", json={"model": name, "input": "hi"}).json()
        assert client.get(f"/v1/responses/{first['id']}").json()["model"] == name
        body = {"model": name, "input": "hi", "previous_response_id": first["id"], "background": True}
        begun = client.post("/v1/responses", json=body).json()
        assert begun["model"] == name

        def look() -> Any:
            found = client.get(f"/v1/responses/{begun['id']}").json()
            return found if found["status"] == "completed" else None

        assert daemons.until(look, 20, "the response has ended")["model"] == name


@NAMES
@pytest.mark.parametrize("generate", [True, False])
def test_a_websocket_has_it_too(url: str, name: str, generate: bool) -> None:
    async def story() -> None:
        address = url.replace("http", "ws") + "/v1/responses"
        async with websockets.connect(address) as connection, asyncio.timeout(20):
            asked = {"type": "response.create", "model": name, "input": "hi", "store": False, "generate": generate}
            await connection.send(json.dumps(asked))
            while True:
                event = json.loads(await connection.recv())
                assert set(names_in(event)) <= {name}
                if event["type"] == "response.completed":
                    return

    asyncio.run(story())


def test_a_node_returns_the_name_that_its_gateway_sends(node: daemons.Daemon) -> None:
    body = {"model": "m", "messages": MESSAGES}
    for header, name in (("a%20b", "a b"), ("", "m"), ("x" * 2000, "m"), ("%22%0D%0A", '"\r\n')):
        reply = httpx.post(f"{node.url}/v1/chat/completions", json=body, headers={"x-cortex-model-name": header})
        assert reply.json()["model"] == name
