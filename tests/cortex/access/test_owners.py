"""Responses and conversations of a key are not found with another key."""

from typing import Any

import pytest
from fake_node import chat_only
from gateway_rig import Rig, rig
from key_rig import ring

from cortex.access.keys import Limits, Principal

ALICE, BOB = "sk-alice", "sk-bob"
KEYS = ring((ALICE, Principal("alice")), (BOB, Principal("bob")), anonymous=Principal("anonymous"))


async def ask(gateway: Rig, key: str, method: str, path: str, body: Any = b"") -> tuple[int, dict[str, Any]]:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    call = await gateway.call(method, path, body, headers).end()
    return call.status, call.json()


@pytest.mark.parametrize("other", [BOB, ""])
async def test_a_response_is_its_owners(other: str) -> None:
    async with rig(chat_only(), keys=KEYS) as gateway:
        _, first = await ask(gateway, ALICE, "POST", "/v1/responses", {"model": "m", "input": "x"})
        path = f"/v1/responses/{first['id']}"
        for method, below in (("GET", ""), ("GET", "/input_items"), ("POST", "/cancel"), ("DELETE", "")):
            status, answer = await ask(gateway, other, method, path + below)
            assert (status, answer["error"]["code"]) == (404, "response_not_found"), (method, below)
        again = {"model": "m", "input": "y", "previous_response_id": first["id"]}
        status, answer = await ask(gateway, other, "POST", "/v1/responses", again)
        assert (status, answer["error"]["code"]) == (400, "previous_response_not_found")
        item = {"type": "item_reference", "id": first["output"][0]["id"]}
        assert (await ask(gateway, other, "POST", "/v1/responses", {"model": "m", "input": [item]}))[0] == 400
        assert (await ask(gateway, ALICE, "POST", "/v1/responses", again))[0] == 200
        assert (await ask(gateway, ALICE, "DELETE", path))[0] == 200


@pytest.mark.parametrize("other", [BOB, ""])
async def test_a_conversation_is_its_owners(other: str) -> None:
    async with rig(chat_only(), keys=KEYS) as gateway:
        _, made = await ask(gateway, ALICE, "POST", "/v1/conversations", {})
        path = f"/v1/conversations/{made['id']}"
        body = {"items": [{"type": "message", "role": "user", "content": "x"}]}
        _, added = await ask(gateway, ALICE, "POST", f"{path}/items", body)
        item = f"/items/{added['data'][0]['id']}"
        for method, below, sent in (
            ("GET", "", b""),
            ("POST", "", {"metadata": {"a": "b"}}),
            ("GET", "/items", b""),
            ("POST", "/items", body),
            ("GET", item, b""),
            ("DELETE", item, b""),
            ("DELETE", "", b""),
        ):
            status, answer = await ask(gateway, other, method, path + below, sent)
            assert (status, answer["error"]["code"]) == (404, "conversation_not_found"), (method, below)
        asked = {"model": "m", "input": "y", "conversation": made["id"]}
        assert (await ask(gateway, other, "POST", "/v1/responses", asked))[0] == 404
        assert (await ask(gateway, ALICE, "POST", "/v1/responses", asked))[0] == 200
        assert len((await ask(gateway, ALICE, "GET", f"{path}/items"))[1]["data"]) >= 2


async def test_a_request_that_is_cancelled_at_once_releases_its_reservation() -> None:
    keys = ring((ALICE, Principal("alice", limits=Limits(max_concurrent=1))))
    async with rig(chat_only(), keys=keys) as gateway:
        for _ in range(20):
            asked = {"model": "m", "input": "x", "background": True}
            status, first = await ask(gateway, ALICE, "POST", "/v1/responses", asked)
            assert status == 200, first
            status, answer = await ask(gateway, ALICE, "POST", f"/v1/responses/{first['id']}/cancel")
            assert (status, answer["status"] in {"cancelled", "completed"}) == (200, True)
        assert gateway.in_flight == 0


async def test_a_response_in_the_background_is_its_owners() -> None:
    async with rig(chat_only(), keys=KEYS) as gateway:
        asked = {"model": "m", "input": "x", "background": True}
        _, first = await ask(gateway, ALICE, "POST", "/v1/responses", asked)
        path = f"/v1/responses/{first['id']}"
        for method, below in (("GET", ""), ("GET", "?stream=true"), ("POST", "/cancel"), ("DELETE", "")):
            assert (await ask(gateway, BOB, method, path + below))[0] == 404, (method, below)
        assert (await ask(gateway, ALICE, "GET", path))[0] == 200
