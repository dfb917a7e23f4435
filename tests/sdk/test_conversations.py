"""Conversations by reference through OpenAI's SDK: over two gateways, over a restart, and what is not there."""

import pathlib
from collections.abc import Iterator
from typing import Any

import daemons
import httpx
import openai
import pytest
from openai.types.responses import Response

STREAMED = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


def sdk(server: daemons.Daemon) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20, _strict_response_validation=True
    )


@pytest.fixture
def client(gateway: daemons.Daemon) -> Iterator[openai.OpenAI]:
    with sdk(gateway) as found:
        yield found


def ask(client: openai.OpenAI, prompt: Any, stream: bool = False, **fields: Any) -> Response:
    body: Any = {"model": "small", "input": prompt, **fields}
    if not stream:
        return client.responses.create(**body)
    *_, last = client.responses.create(**body, stream=True)
    assert last.type == "response.completed"
    return last.response


@STREAMED
def test_a_chain_of_twenty_responses(client: openai.OpenAI, stream: bool) -> None:
    answer = ask(client, "hi 0", stream, instructions="Be brief.")
    assert answer.store is True
    expected = ["user:hi 0", "assistant:Hello"]
    for turn in range(1, 20):
        answer = ask(client, f"hi {turn}", stream, previous_response_id=answer.id)
        expected += [f"user:hi {turn}", "assistant:Hello"]
    last = ask(client, "turns", stream, previous_response_id=answer.id)
    assert last.previous_response_id == answer.id
    assert last.output_text == "|".join([*expected, "user:turns"]), "all that was said, and no instructions"


@STREAMED
def test_tools_and_reasoning_are_part_of_it(client: openai.OpenAI, stream: bool) -> None:
    tools = [{"type": "custom", "name": "patch"}]
    thought = ask(client, "think", stream)
    called = ask(client, "patch it", stream, tools=tools, previous_response_id=thought.id)
    call = called.output[-1]
    assert call.type == "custom_tool_call"
    result = {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "done"}
    answered = ask(client, [result], stream, tools=tools, previous_response_id=called.id)
    assert answered.output_text == "It says done"
    turns = ask(client, "turns", previous_response_id=answered.id).output_text.split("|")
    assert turns == [
        "user:think",
        'assistant:So: "yes" ☃',
        "user:patch it",
        "assistant:Looking.",
        "tool:done",
        "assistant:It says done",
        "user:turns",
    ]


def test_an_item_is_referred_to(client: openai.OpenAI) -> None:
    first = ask(client, "hi")
    prompt = [{"role": "user", "content": "hi"}, {"type": "item_reference", "id": first.output[0].id}]
    again = ask(client, [*prompt, {"role": "user", "content": "turns"}])
    assert again.output_text == "user:hi|assistant:Hello|user:turns"
    with pytest.raises(openai.BadRequestError, match="msg_0_0"):
        ask(client, [{"type": "item_reference", "id": "msg_0_0"}])


@STREAMED
def test_a_stored_response_is_there_until_it_is_deleted(client: openai.OpenAI, stream: bool) -> None:
    answer = ask(client, [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}, HI], stream)
    kept = client.responses.retrieve(answer.id)
    assert kept.to_dict() == answer.to_dict()
    items = list(client.responses.input_items.list(answer.id, order="asc", limit=2))
    assert [item.role for item in items] == ["user", "assistant", "user"]  # type: ignore[union-attr]
    assert len({item.id for item in items}) == 3
    assert [item.id for item in client.responses.input_items.list(answer.id)] == [item.id for item in items][::-1]
    with pytest.raises(openai.BadRequestError, match="synchronous"):
        client.responses.cancel(answer.id)
    client.responses.delete(answer.id)
    for look in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError, match=answer.id):
            look(answer.id)
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "hi", stream, previous_response_id=answer.id)
    assert (caught.value.code, caught.value.param) == ("previous_response_not_found", "previous_response_id")


HI = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}


@STREAMED
@pytest.mark.parametrize("fields", [{"store": False}, {"input": "fail"}])
def test_responses_that_are_not_stored(
    gateway: daemons.Daemon, client: openai.OpenAI, stream: bool, fields: dict[str, Any]
) -> None:
    body = {"model": "m", "input": "hi", "stream": stream, **fields}
    reply = httpx.post(gateway.url + "/v1/responses", json=body)
    if "store" not in fields:
        assert (reply.status_code, "response.failed" in reply.text) == ((200, True) if stream else (503, False))
        return
    id = reply.text.partition('"id":"')[2].partition('"')[0]
    assert '"store":false' in reply.text
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(id)


@pytest.mark.parametrize("id", ["resp_nothing", "x", "resp_" + "a" * 200, "resp_a\r\nb"])
def test_an_id_that_is_none(client: openai.OpenAI, id: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "hi", previous_response_id=id)
    assert caught.value.code == "previous_response_not_found"


@pytest.mark.parametrize("kind", ["sqlite", "valkey"])
def test_two_gateways_and_a_restart(
    request: pytest.FixtureRequest, tmp_path: pathlib.Path, node: daemons.Daemon, kind: str
) -> None:
    kept = {"CORTEX_STORE__PATH": str(tmp_path / "shared.db")}
    if kind == "valkey":
        kept = {"CORTEX_STORE__KIND": kind, "CORTEX_STORE__URL": request.getfixturevalue("valkey")}
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()

    def gateway(folder: pathlib.Path) -> Any:
        return daemons.cortex(folder, node, models=daemons.SCRIPTED_CATALOGUE, model="m", **kept)

    answer = None
    with gateway(folders[0]) as first, gateway(folders[1]) as second:
        clients = [sdk(first), sdk(second)]
        for turn in range(20):
            previous = {"previous_response_id": answer.id} if answer else {}
            answer = ask(clients[turn % 2], f"hi {turn}", turn % 3 == 0, **previous)
    assert answer is not None
    with gateway(folders[0]) as again:
        last = ask(sdk(again), "turns", previous_response_id=answer.id)
    assert last.output_text.startswith("user:hi 0|assistant:Hello|user:hi 1|")
    assert last.output_text.endswith("user:hi 19|assistant:Hello|user:turns")


@STREAMED
def test_a_neuron_by_itself_keeps_nothing(node: daemons.Daemon, stream: bool) -> None:
    client = sdk(node)
    assert ask(client, "hi", stream, model="m").store is False
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "hi", stream, model="m", previous_response_id="resp_1")
    assert caught.value.code == "chained_conversation_not_supported"
