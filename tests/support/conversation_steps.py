"""Steps at conversations and stored responses, one a line, of which nothing but typed errors may come.

A line is ``METHOD path body``; ``$`` in either is the conversation that was made last, ``%`` the response. ``RESPOND``
is a request for a response that is continued, answered and kept. No server and no node takes part.
"""

import asyncio
import random
import secrets

import orjson
from asgi_call import Call

from cortex._fast.peek import PeekError, peek
from cortex.config import Config, GatewaySettings, StoreSettings
from cortex.fleet.catalogue import Catalogue
from cortex.gateway import Gateway
from cortex.http_io import AsgiExchange
from cortex.responses.stored import StoredResponses
from cortex.wire.errors import ApiError
from cortex.wire.headers import request_id_of

MAX_STEPS = 40
METHODS = {b"GET", b"POST", b"DELETE", b"HEAD", b"PATCH"}
PATHS = [
    b"/v1/conversations",
    b"/v1/conversations/$",
    b"/v1/conversations/$/items",
    b"/v1/conversations/$/items/msg_0",
    b"/v1/responses/%",
    b"/v1/responses/%/input_items",
    b"/v1/responses/%/cancel",
]
PIECES = [
    b"{}",
    b'{"items":[{"role":"user","content":"a"}]}',
    b'{"items":[{}],"metadata":{"a":"b"}}',
    b'{"items":[{"type":"item_reference","id":"msg_1_0"}]}',
    b'{"items":[' + b",".join([b"{}"] * 21) + b"]}",
    b'{"metadata":null}',
    b'{"items":[{"id":1,"type":[],"content":{"a":[1,null]}}]}',
    b'{"items":[{"content":"\\ud800"}]}',
    b'{"model":"m","input":"a","previous_response_id":"%"}',
    b'{"model":"m","input":[{"role":"user","content":"a"}],"conversation":"$"}',
    b'{"model":"m","input":[{"type":"item_reference","id":"x"}],"conversation":{"id":"$"},"store":true}',
    b'{"model":"m","input":[[]],"background":1,"store":false}',
    b'{"model":"m","input":' + b"[" * 900 + b"]" * 900 + b"}",
    b'{"model":"m","input":[{"role":"user","content":1e400}]}',
]


def steps(chance: random.Random) -> bytes:
    """Return some steps."""
    lines = []
    for _ in range(chance.randrange(1, 8)):
        piece = bytearray(chance.choice(PIECES))
        for _ in range(chance.choice([0, 0, 1, 2])):
            at = chance.randrange(len(piece) + 1)
            piece[at : at + chance.randrange(3)] = chance.choice([b"", b"null", b'"', b"[", b"}", b"9" * 20, b"\xff"])
        verb = chance.choice([*sorted(METHODS), b"RESPOND"])
        lines.append(verb + b" " + (b"" if verb == b"RESPOND" else chance.choice(PATHS) + b" ") + bytes(piece))
    return b"\n".join(lines)


class Checker:
    """A gateway without nodes, whose store is small."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        store = StoreSettings(path=":memory:", max_bytes=256 * 1024, max_bytes_per_key=128 * 1024)
        self._gateway = Gateway(Config(store=store, gateway=GatewaySettings(metrics_listen="")), Catalogue({}, {}))
        assert self._gateway._store is not None
        self._loop.run_until_complete(self._gateway._store.open())
        self._responses = StoredResponses(self._gateway._store)

    def close(self) -> None:
        """Let go of the store."""
        assert self._gateway._store is not None
        self._loop.run_until_complete(self._gateway._store.close())
        self._loop.close()

    def check(self, data: bytes) -> None:
        """Take the steps."""
        self._loop.run_until_complete(asyncio.wait_for(self._take(data), 20))

    async def _serve(self, scope: object, receive: object, send: object) -> None:
        exchange = AsgiExchange(scope, receive, send, request_id=request_id_of(None))  # type: ignore[arg-type]
        await self._gateway.handle(exchange)

    async def _take(self, data: bytes) -> None:
        conversation, response = b"conv_0", b"resp_0"
        for line in data.split(b"\n")[:MAX_STEPS]:
            verb, _, rest = line.replace(b"$", conversation).replace(b"%", response).partition(b" ")
            if verb == b"RESPOND":
                response = await self._respond(rest) or response
            elif verb in METHODS:
                path, _, body = rest.partition(b" ")
                text = path.decode("latin-1")
                if not text.startswith("/v1/") or text.startswith("/v1/models") or text == "/v1/responses":
                    continue
                call = await Call(self._serve, verb.decode(), text, body).end()
                assert call.status != 500, line[:2000]
                if call.status == 200 and verb != b"HEAD":
                    answered = orjson.loads(call.body)
                    if answered.get("object") == "conversation":
                        conversation = answered["id"].encode()

    async def _respond(self, body: bytes) -> bytes | None:
        try:
            found = peek(body)
        except PeekError:
            return None
        try:
            pending = await self._responses.begin(body, found)
            orjson.loads(pending.body)
            id = f"resp_{secrets.token_hex(24)}"
            answer = orjson.dumps({"id": id, "output": [{"id": "msg_1_0", "type": "message"}], "store": True})
            kept = orjson.loads(await self._responses.keep(pending, answer))
            if pending.context.store and kept["store"]:
                assert await self._responses.find(id) is not None
            await self._responses.input_items(id, {"limit": "100"})
        except ApiError as error:
            assert error.status != 500, body[:2000]
            return None
        return id.encode()
