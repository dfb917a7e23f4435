"""A gateway in this process: over fake nodes, or between startup and shutdown with its configuration files."""

import asyncio
import contextlib
import pathlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from types import MappingProxyType
from typing import Any

import msgspec
import rsgi_call
from asgi_call import Call
from daemons import INTERFACE
from fake_node import FakeNode

from cortex.access import local
from cortex.access.keys import KeyRing
from cortex.asgi import Application
from cortex.config import (
    AccessSettings,
    Config,
    EvictionSettings,
    GatewaySettings,
    ModelProfile,
    NodeSettings,
    Polling,
    StoreSettings,
    Timeouts,
)
from cortex.fleet.catalogue import Catalogue
from cortex.gateway import Gateway
from cortex.http_io import AsgiExchange
from cortex.server.ending import Ending
from cortex.wire.headers import REQUEST_ID, request_id_of

QUICK = Polling(interval_s=0.05, timeout_s=3, max_backoff_s=0.2)  # a busy machine may hold everything up for a second
PATIENT = Timeouts()
IN_MEMORY = StoreSettings(path=":memory:")

LOCAL_TOKEN = "sk-local-of-this-rig"
"""Token of the local administrator, sent to /admin where no key is an administrator's."""

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
STREAM = {**CHAT, "stream": True}


def application(gateway: Gateway) -> Application:
    """Return an application over a gateway that is there already."""
    made = Application({})
    made.gateway, made.ending = gateway, Ending(1, [], gateway.end_requests)
    return made


class Rig:
    """A gateway in process, called by ``asgi`` or ``rsgi``, or past what both do before the gateway (``common``)."""

    def __init__(self, gateway: Gateway, interface: str = INTERFACE) -> None:
        self.gateway = gateway
        self._serve: Any = self._common
        if interface == "asgi":
            self._serve = application(gateway)
            self._serve.is_open = True
        elif interface == "rsgi":
            called = application(gateway)
            called.open_rsgi(asyncio.get_running_loop())
            self._serve = rsgi_call.Server(called.__rsgi__)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._serve(scope, receive, send)

    async def _common(self, scope: Any, receive: Any, send: Any) -> None:
        given = dict(scope["headers"]).get(REQUEST_ID)
        exchange = AsgiExchange(scope, receive, send, request_id=request_id_of(given))
        await self.gateway.handle(exchange)

    def call(
        self, method: str, path: str, body: Any = b"", headers: dict[str, str] | None = None, client: str = "127.0.0.1"
    ) -> Call:
        """Send a request; without headers, one to /admin has the administrator's token, as the commands send it."""
        if headers is None and path.startswith("/admin/"):
            headers = {"authorization": f"Bearer {LOCAL_TOKEN}"}
        return Call(self, method, path, body, headers, client)

    def chat(self, **fields: Any) -> Call:
        """Ask for a chat completion."""
        return self.call("POST", "/v1/chat/completions", {**CHAT, **fields})

    def metric(self, name: str, **labels: str) -> float:
        """Return a sample's value; 0 if there is none."""
        return self.gateway.metrics.registry.get_sample_value(name, labels) or 0.0

    @property
    def in_flight(self) -> int:
        return sum(self.gateway.fleet.in_flight.by_node.values())


@contextlib.asynccontextmanager
async def rig(
    *neurons: FakeNode,
    models: tuple[ModelProfile, ...] = (),
    aliases: dict[str, str] | None = None,
    prefixes: dict[str, str] | None = None,
    timeouts: Timeouts = PATIENT,
    polling: Polling = QUICK,
    store: StoreSettings = IN_MEMORY,
    wait: bool = True,
    nodes: tuple[NodeSettings, ...] = (),
    eviction: EvictionSettings | None = None,
    keys: KeyRing | None = None,
    access: Mapping[str, Any] = MappingProxyType({}),
    interface: str = INTERFACE,
    **settings: Any,
) -> AsyncIterator[Rig]:
    """Run a gateway over ``neurons``, which are served here unless they have been given a port, or over ``nodes``."""
    async with contextlib.AsyncExitStack() as stack:
        for neuron in neurons:
            if not neuron.port:
                await stack.enter_async_context(neuron.serving())
        config = Config(
            store=store,
            gateway=GatewaySettings(metrics_listen="", timeouts=timeouts, polling=polling, **settings),
            eviction=eviction or EvictionSettings(),
            access=msgspec.convert(dict(access), AccessSettings),
            neurons=nodes or tuple(NodeSettings(neuron.name, neuron.url) for neuron in neurons),
        )
        catalogue = Catalogue({profile.id: profile for profile in models}, aliases or {}, prefixes=prefixes or {})
        gateway = Gateway(config, catalogue, keys, local_token=LOCAL_TOKEN)
        await gateway.start()
        try:
            if wait:
                await until(lambda: gateway.fleet.state.complete)
            with rsgi_call.no_sockets():
                yield Rig(gateway, interface)
        finally:
            await gateway.stop()


async def until(condition: Callable[[], Any], timeout_s: float = 10, what: str = "") -> Any:
    """Let the loop run until ``condition`` is true, and return what it returned."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what or condition}"
        await asyncio.sleep(0.002)
    return found


def write_config(folder: pathlib.Path, *neurons: FakeNode, models: str = "", gateway: str = "") -> pathlib.Path:
    """Write ``cortex.toml`` and ``models.toml`` and return the path of the former."""
    path = folder / "cortex.toml"
    nodes = "".join(f'[[neurons]]\nname = "{neuron.name}"\nendpoint = "{neuron.url}"\n' for neuron in neurons)
    path.write_text(f"[gateway]\n{gateway}\n[gateway.polling]\ninterval_s = 0.05\n{nodes}")
    path.write_text(path.read_text() + f'[store]\npath = "{folder}/responses.db"\n')
    (folder / "models.toml").write_text(models)
    return path


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
        """Send a request, to /admin as the local administrator."""
        token = local.find(self.app.addresses[0][1], self._environment)
        headers = {"authorization": f"Bearer {token}"} if path.startswith("/admin/") else None
        return await Call(self.app, method, path, body, headers).end()

    async def names(self) -> set[str]:
        return {model["id"] for model in (await self.get("/v1/models"))["data"]}

    async def until_named(self, *names: str) -> None:
        async with asyncio.timeout(10):
            while await self.names() != set(names):
                await asyncio.sleep(0.02)
