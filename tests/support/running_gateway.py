"""The ASGI application with its configuration files, in this process, between its startup and its shutdown."""

import asyncio
import pathlib
from typing import Any

from asgi_call import Call

from cortex.access import local
from cortex.asgi import Application


class Running:
    """The ASGI application between its startup and its shutdown."""

    def __init__(self, path: pathlib.Path) -> None:
        self._environment = {"CORTEX_CONFIG": str(path), "RUNTIME_DIRECTORY": str(path.parent)}
        self.app = Application(self._environment)
        self._messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def __aenter__(self) -> "Running":
        self._task = asyncio.ensure_future(self.app({"type": "lifespan"}, self._messages.get, self._sent.put))
        await self._messages.put({"type": "lifespan.startup"})
        sent = asyncio.ensure_future(self._sent.get())
        await asyncio.wait({sent, self._task}, return_when=asyncio.FIRST_COMPLETED)
        if not sent.done():
            sent.cancel()
            self._task.result()
        assert (await sent)["type"] == "lifespan.startup.complete"
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._messages.put({"type": "lifespan.shutdown"})
        await self._task

    async def get(self, path: str) -> Any:
        return (await self.call("GET", path)).json()

    async def call(self, method: str, path: str, body: bytes = b"") -> Call:
        """Ask as whoever runs the gateway."""
        token = local.find(self.app.addresses[0][1], self._environment)
        headers = {"authorization": f"Bearer {token}"} if path.startswith("/admin/") else None
        return await Call(self.app, method, path, body, headers).end()

    async def names(self) -> set[str]:
        return {model["id"] for model in (await self.get("/v1/models"))["data"]}

    async def until_named(self, *names: str) -> None:
        async with asyncio.timeout(10):
            while await self.names() != set(names):
                await asyncio.sleep(0.02)
