"""Request to an ASGI application in process, whose client can wait, read slowly and leave at any moment."""

import asyncio
from collections.abc import Callable
from typing import Any

import orjson


class Call:
    """A request that is being answered. ``hold`` makes the client stop reading until ``release``."""

    def __init__(
        self,
        app: Any,
        method: str,
        path: str,
        body: bytes | dict[str, Any] = b"",
        headers: dict[str, str] | None = None,
        client: str = "127.0.0.1",
    ) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.chunks: list[bytes] = []
        self.complete = False
        content = body if isinstance(body, bytes) else orjson.dumps(body)
        self._request = [{"type": "http.request", "body": content, "more_body": False}]
        self._gone = asyncio.Event()
        self._reads = asyncio.Event()
        self._reads.set()
        self._progress = asyncio.Event()
        path, _, query = path.partition("?")
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": query.encode(),
            "client": (client, 1),
            "headers": [
                (name.lower().encode(), value.encode())
                for name, value in ({"content-length": str(len(content))} | (headers or {})).items()
            ],
        }
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self._request:
            return self._request.pop()
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        await self._reads.wait()
        if message["type"] == "http.response.start":
            assert not self.status, "two heads"
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            assert self.status, "a body before its head"
            assert not self.complete, "a body after its end"
            if message["body"]:
                self.chunks.append(message["body"])
                self.body += message["body"]
            self.complete = not message.get("more_body", False)
        self._progress.set()

    def hold(self) -> None:
        """Stop reading."""
        self._reads.clear()

    def release(self) -> None:
        """Read again."""
        self._reads.set()

    def leave(self) -> None:
        """Disconnect: the server is notified, and its further output is dropped."""
        self._gone.set()
        self._reads.set()

    async def until(self, condition: Callable[["Call"], Any], timeout_s: float = 10) -> "Call":
        """Wait until ``condition`` holds of this call."""
        async with asyncio.timeout(timeout_s):
            while not condition(self):
                self._progress.clear()
                await self._progress.wait()
        return self

    async def end(self, timeout_s: float = 20) -> "Call":
        """Wait until the application has finished with the request."""
        async with asyncio.timeout(timeout_s):
            await self.task
        return self

    def json(self) -> Any:
        """Return the decoded body."""
        return orjson.loads(self.body)

    def data(self) -> bytes:
        """Return an event stream without its comments."""
        return b"".join(block + b"\n\n" for block in self.body.split(b"\n\n") if block and not block.startswith(b":"))
