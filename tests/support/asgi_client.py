"""Drive an ASGI application in process: one request, its whole answer, and a client that may leave."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

import orjson


@dataclass
class Reply:
    """An answer as it arrived."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    chunks: list[bytes] = field(default_factory=list)
    complete: bool = False

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    def json(self) -> Any:
        return orjson.loads(self.body)

    def sse_events(self) -> list[tuple[str | None, Any]]:
        """Return (event, decoded data) of each SSE event of an event stream; comments are left out."""
        found = []
        for block in self.body.decode().split("\n\n"):
            lines = [line for line in block.split("\n") if line and not line.startswith(":")]
            if not lines:
                continue
            event = next((line[7:] for line in lines if line.startswith("event: ")), None)
            data = "\n".join(line[6:] for line in lines if line.startswith("data: "))
            found.append((event, data if data == "[DONE]" else orjson.loads(data)))
        return found


async def ask(
    app: Any,
    method: str,
    path: str,
    body: bytes | dict[str, Any] = b"",
    *,
    headers: dict[str, str] | None = None,
    leave_after_chunks: int | None = None,
    timeout_s: float = 20,
) -> Reply:
    """Send one request; with ``leave_after_chunks`` the client disconnects after so many chunks of the answer."""
    data = body if isinstance(body, bytes) else orjson.dumps(body)
    path, _, query = path.partition("?")
    reply = Reply()
    gone = asyncio.Event()
    asked = [{"type": "http.request", "body": data, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if asked:
            return asked.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            reply.status = message["status"]
            reply.headers = {k.decode(): v.decode() for k, v in message["headers"]}
            return
        if message.get("body"):
            reply.chunks.append(message["body"])
        reply.complete = not message.get("more_body", False)
        if leave_after_chunks is not None and len(reply.chunks) >= leave_after_chunks:
            gone.set()

    if leave_after_chunks == 0:
        gone.set()
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": query.encode(),
        "headers": [(k.lower().encode(), v.encode()) for k, v in (headers or {}).items()],
    }
    await asyncio.wait_for(app(scope, receive, send), timeout_s)
    return reply
