"""Responses made in the background and conversations by name, through OpenAI's SDK: over gateways, and over an end."""

import contextlib
import os
import pathlib
import signal
import time
from collections.abc import Iterator
from typing import Any

import daemons
import openai
import pytest
from openai.types.responses import Response


def sdk(server: daemons.Daemon) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20, _strict_response_validation=True
    )


@pytest.fixture(params=["gateway", "translating"])
def client(request: pytest.FixtureRequest) -> Iterator[openai.OpenAI]:
    with sdk(request.getfixturevalue(request.param)) as found:
        yield found


def begin(client: openai.OpenAI, prompt: Any, **fields: Any) -> Response:
    answer = client.responses.create(model="m", input=prompt, background=True, **fields)
    assert (answer.status, answer.background, answer.output) == ("queued", True, [])
    return answer


def ended(client: openai.OpenAI, id: str) -> Response:
    def look() -> Response | None:
        found = client.responses.retrieve(id)
        return found if found.status not in ("queued", "in_progress") else None

    found: Response = daemons.until(look, 20, "the response has ended")
    return found


def test_it_is_queued_and_then_there(client: openai.OpenAI) -> None:
    first = begin(client, "hi", instructions="Be brief.")
    answer = ended(client, first.id)
    assert (answer.status, answer.output_text, answer.instructions) == ("completed", "Hello", "Be brief.")
    assert (answer.background, answer.store) == (True, True)
    again = client.responses.create(model="m", input="turns", previous_response_id=answer.id)
    assert again.output_text == "user:hi|assistant:Hello|user:turns"
    assert client.responses.cancel(first.id).status == "completed", "what has ended stays as it is"


@pytest.mark.parametrize("prompt", ["hi", "think", "call", "long"])
def test_its_sse_events_can_be_read_from_any_number_on(client: openai.OpenAI, prompt: str) -> None:
    tools: Any = [{"type": "function", "name": "f", "parameters": None, "strict": False}]
    body: Any = {"model": "m", "input": prompt, "tools": tools}
    events = [event.to_dict() for event in client.responses.create(**body, background=True, stream=True)]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    id = events[0]["response"]["id"]  # type: ignore[index]
    assert ended(client, id).to_dict() == events[-1]["response"]
    for after in (0, len(events) // 2, len(events) - 1):
        rest = [event.to_dict() for event in client.responses.retrieve(id, stream=True, starting_after=after)]
        assert rest == events[after + 1 :]
    assert [e.to_dict() for e in client.responses.retrieve(id, stream=True)] == events


def test_a_client_that_leaves_does_not_end_it(client: openai.OpenAI) -> None:
    with client.responses.create(model="m", input="long", background=True, stream=True) as events:
        first = next(iter(events))
    assert first.type == "response.created"
    assert len(ended(client, first.response.id).output_text) > 10_000


def test_it_can_be_cancelled(client: openai.OpenAI) -> None:
    running = begin(client, "wait")
    events = client.responses.retrieve(running.id, stream=True)
    assert any(event.type == "response.output_text.delta" for event in itertools_until_text(events))
    assert client.responses.retrieve(running.id).status == "in_progress"
    with pytest.raises(openai.BadRequestError, match="still being generated"):
        client.responses.create(model="m", input="hi", previous_response_id=running.id)
    assert client.responses.cancel(running.id).status == "cancelled"
    assert client.responses.retrieve(running.id).status == "cancelled"
    assert client.responses.cancel(running.id).status == "cancelled"
    list(events)  # it ends


def itertools_until_text(events: Any) -> Iterator[Any]:
    for event in events:
        yield event
        if event.type == "response.output_text.delta":
            return


@pytest.mark.parametrize(("prompt", "message"), [("fail", "The worker is gone."), ("busy", "Too many wait.")])
def test_a_failed_response_has_its_error(client: openai.OpenAI, prompt: str, message: str) -> None:
    answer = ended(client, begin(client, prompt).id)
    assert answer.status == "failed"
    assert answer.error is not None
    assert answer.error.message == message
    with pytest.raises(openai.APIError, match=message):
        list(client.responses.retrieve(answer.id, stream=True))


def test_what_is_refused(client: openai.OpenAI) -> None:
    for fields, param in (({"store": False}, "background"), ({"input": [{"type": "message"}]}, "input[0].role")):
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(**{"model": "m", "input": "hi", "background": True, **fields})  # type: ignore[call-overload]
        assert caught.value.param == param
    plain = client.responses.create(model="m", input="hi")
    with pytest.raises(openai.BadRequestError, match="synchronous"):
        client.responses.cancel(plain.id)
    with pytest.raises(openai.BadRequestError, match="in the background"):
        client.responses.retrieve(plain.id, stream=True)
    for look in (client.responses.retrieve, client.responses.cancel):
        with pytest.raises(openai.NotFoundError):
            look("resp_none")


def test_one_that_runs_can_be_deleted(client: openai.OpenAI) -> None:
    running = begin(client, "wait")
    client.responses.delete(running.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(running.id)


@contextlib.contextmanager
def gateways(tmp_path: pathlib.Path, node: daemons.Daemon, count: int) -> Iterator[list[daemons.Daemon]]:
    """Gateways that share a store."""
    with contextlib.ExitStack() as stack:
        found = []
        for number in range(count):
            folder = tmp_path / str(number)
            folder.mkdir(exist_ok=True)
            kept = str(tmp_path / "shared.db")
            found.append(
                stack.enter_context(
                    daemons.cortex(folder, node, models=daemons.SCRIPTED_CATALOGUE, model="m", CORTEX_STORE__PATH=kept)
                )
            )
        yield found


def test_another_gateway_returns_it_and_cancels_it(tmp_path: pathlib.Path, node: daemons.Daemon) -> None:
    with gateways(tmp_path, node, 2) as (first, second):
        one, other = sdk(first), sdk(second)
        answer = begin(one, "hi")
        assert ended(other, answer.id).output_text == "Hello"
        assert [e.to_dict() for e in other.responses.retrieve(answer.id, stream=True)] == [
            e.to_dict() for e in one.responses.retrieve(answer.id, stream=True)
        ]
        running = begin(one, "wait")
        assert other.responses.cancel(running.id).status == "cancelled"
        daemons.until(lambda: one.responses.retrieve(running.id).status == "cancelled", 5)
        daemons.until(lambda: first.get("/health")["in_flight"] == 0, 5)
        left = begin(one, "wait")
    with gateways(tmp_path, node, 1) as (again,):
        answered = sdk(again).responses.retrieve(left.id)
        assert answered.status == "failed", "the gateway was stopped, and has stored it"


def test_a_gateway_that_is_killed_is_found_out(tmp_path: pathlib.Path, node: daemons.Daemon) -> None:
    with gateways(tmp_path, node, 1) as (second,):
        folder = tmp_path / "killed"
        folder.mkdir()
        kept = str(tmp_path / "shared.db")
        running = begin_and_kill(node, folder, kept)
        other = sdk(second)
        assert other.responses.retrieve(running.id).status in ("queued", "in_progress"), "it may still come"
        # The lease does not run out here: its time is set back.
        expire_leases(kept)
        answer = other.responses.retrieve(running.id)
        assert (answer.status, answer.error and answer.error.code) == ("failed", "server_error")
        with pytest.raises(openai.APIError, match="is gone"):
            list(other.responses.retrieve(running.id, stream=True))


def begin_and_kill(node: daemons.Daemon, folder: pathlib.Path, kept: str) -> Response:
    """Begin a response at a gateway of its own, and kill that."""
    gateway = daemons.cortex(folder, node, models=daemons.SCRIPTED_CATALOGUE, model="m", CORTEX_STORE__PATH=kept)
    with gateway as first:
        running = begin(sdk(first), "wait")
        for process in first.processes():
            os.kill(process.pid, signal.SIGKILL)
        first.process.wait()
    return running


def expire_leases(path: str) -> None:
    import sqlite3

    connection = sqlite3.connect(path)
    with connection:
        connection.execute("UPDATE records SET lease_until = ? WHERE lease_until > 0", (time.time() - 1,))
    connection.close()


# ------------------------------------------------------------------ conversations by name


STREAMED = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


def ask(client: openai.OpenAI, prompt: Any, stream: bool, **fields: Any) -> Response:
    body: Any = {"model": "m", "input": prompt, **fields}
    if not stream:
        return client.responses.create(**body)
    *_, last = client.responses.create(**body, stream=True)
    assert last.type == "response.completed"
    return last.response


@STREAMED
def test_a_conversation_goes_on(client: openai.OpenAI, stream: bool) -> None:
    items: Any = [{"type": "message", "role": "user", "content": "first"}]
    conversation = client.conversations.create(items=items, metadata={"a": "b"})
    assert client.conversations.retrieve(conversation.id).metadata == {"a": "b"}
    answer = ask(client, "hi", stream, conversation=conversation.id)
    assert answer.conversation is not None
    assert answer.conversation.id == conversation.id
    ask(client, "hi again", stream, conversation={"id": conversation.id}, store=False)
    client.conversations.items.create(conversation.id, items=[{"role": "user", "content": "aside"}])
    answered = ask(client, "turns", stream, conversation=conversation.id)
    expected = [
        "user:first",
        "user:hi",
        "assistant:Hello",
        "user:hi again",
        "assistant:Hello",
        "user:aside",
        "user:turns",
    ]
    assert answered.output_text == "|".join(expected)
    listed = list(client.conversations.items.list(conversation.id, order="asc", limit=3))
    assert len(listed) == len(expected) + 1
    assert len({item.id for item in listed}) == len(listed)
    aside = listed[5]
    assert aside.id is not None
    assert client.conversations.items.retrieve(aside.id, conversation_id=conversation.id) == aside
    client.conversations.items.delete(aside.id, conversation_id=conversation.id)
    answered = ask(client, "turns", stream, conversation=conversation.id)
    assert "user:hi again|assistant:Hello|user:turns|" in answered.output_text, "without the aside"
    in_background = begin(client, "hi", conversation=conversation.id)
    ended(client, in_background.id)
    assert ask(client, "turns", stream, conversation=conversation.id).output_text.endswith(
        "user:hi|assistant:Hello|user:turns"
    )
    assert client.conversations.update(conversation.id, metadata={"c": "d"}).metadata == {"c": "d"}
    client.conversations.delete(conversation.id)
    for look in (client.conversations.retrieve, client.conversations.delete, client.conversations.items.list):
        with pytest.raises(openai.NotFoundError):
            look(conversation.id)
    assert client.responses.retrieve(answer.id).output_text == "Hello", "its responses are kept"


def test_refusals_of_a_conversation(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        ask(client, "hi", False, conversation="conv_none")
    conversation = client.conversations.create()
    answer = ask(client, "hi", False)
    with pytest.raises(openai.BadRequestError, match="not both"):
        ask(client, "hi", False, conversation=conversation.id, previous_response_id=answer.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(conversation.id)
    with pytest.raises(openai.NotFoundError):
        client.conversations.items.retrieve("msg_none", conversation_id=conversation.id)
    with pytest.raises(openai.BadRequestError):
        client.conversations.items.list(conversation.id, order="sideways")  # type: ignore[arg-type]
