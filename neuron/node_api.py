"""The node's own paths: discovery, health, metrics, and the control of models."""

from collections.abc import Awaitable, Callable, Coroutine
from typing import TypeVar

import msgspec

from cortex.build_identity import COMMIT
from cortex.dialects import fields, openapi, registry
from cortex.dialects.model_list import ListedModel, reply_model, reply_models, sizes_and_abilities
from cortex.http_io import Exchange, until_disconnect
from cortex.wire.errors import ModelNotFoundError
from cortex.wire.node import (
    DrainRequest,
    Endpoint,
    ForgetRequest,
    LoadRequest,
    ModelList,
    ModelSpec,
    ModelStatus,
    PinRequest,
    UnloadRequest,
)
from neuron import __version__, api_description, metrics
from neuron.service import Service

_ADMIN_BODY_BYTES = 1 << 20

Handler = Callable[[Exchange], Awaitable[None]]
_Asked = TypeVar("_Asked", bound=msgspec.Struct)


class NodeApi:
    """Handlers of the node's own paths."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.routes: dict[str, dict[str, Handler]] = {
            "/discovery": {"GET": self._discovery},
            "/health": {"GET": self._health},
            "/version": {"GET": self._version},
            "/metrics": {"GET": self._metrics},
            "/models": {"GET": self._models},
            "/models/load": {"POST": _control(LoadRequest, service.load, ends_with_client=True)},
            "/models/fit": {"POST": _control(ModelSpec, service.fit, ends_with_client=True)},
            "/models/pull": {"POST": _control(ModelSpec, service.pull, ends_with_client=True)},
            "/models/unload": {"POST": _control(UnloadRequest, service.unload)},
            "/models/forget": {"POST": _control(ForgetRequest, self._forget)},
            "/models/pin": {"POST": _control(PinRequest, self._pin)},
            "/drain": {"POST": _control(DrainRequest, service.drain)},
            "/v1/models": {"GET": self._listed},
            openapi.PATH: {"GET": self._describe},
        }

    async def _discovery(self, exchange: Exchange) -> None:
        await reply_json(exchange, await self._service.discovery(registry.names()))

    async def _health(self, exchange: Exchange) -> None:
        await reply_json(exchange, self._service.health())

    async def _version(self, exchange: Exchange) -> None:
        await reply_json(exchange, {"name": "neuron", "version": __version__, "commit": COMMIT})

    async def _describe(self, exchange: Exchange) -> None:
        await exchange.reply(200, api_description.description())

    async def _metrics(self, exchange: Exchange) -> None:
        devices = (await self._service.discovery(registry.names())).devices
        text = metrics.render(self._service.models.statuses(), self._service.health().workers, devices)
        await exchange.reply(200, text, content_type=b"text/plain; version=0.0.4; charset=utf-8")

    async def _models(self, exchange: Exchange) -> None:
        models = self._service.models
        await reply_json(exchange, ModelList(models.statuses(), models.generation))

    def _forget(self, asked: ForgetRequest) -> ModelStatus:
        status = self._service.models.find(asked.id).status()
        self._service.models.forget(asked.id)
        return status

    def _pin(self, asked: PinRequest) -> ModelStatus:
        return self._service.models.pin(asked.id, asked.pinned, asked.priority, asked.idle_ttl_s)

    async def endpoint(self, exchange: Exchange) -> None:
        """Answer ``GET /models/NAME/endpoint``."""
        name = exchange.path.removeprefix("/models/").removesuffix("/endpoint")
        with self._service.models.use(name):
            host = exchange.header(b"host") or self._service.listen.encode()
            await reply_json(exchange, Endpoint(name, f"http://{host.decode('latin-1')}/v1", registry.names()))

    async def _listed(self, exchange: Exchange) -> None:
        await reply_models(exchange, [_listed(status) for status in self._service.models.statuses()])

    async def listed_model(self, exchange: Exchange) -> None:
        """Answer ``GET /v1/models/NAME``."""
        name = exchange.path.removeprefix("/v1/models/")
        found = next((status for status in self._service.models.statuses() if status.id == name), None)
        if found is None:
            raise ModelNotFoundError(f"The model {name!r} does not exist.", param="model")
        await reply_model(exchange, _listed(found))


def _listed(status: ModelStatus) -> ListedModel:
    return ListedModel(
        id=status.id,
        created=int(status.loaded_at),
        owned_by="neuron",
        name=status.id,
        display_name=status.id,
        state=status.state,
        **sizes_and_abilities(status.context_tokens, status.capabilities),
    )


def _control(
    kind: type[_Asked], do: Callable[[_Asked], Awaitable[object] | object], *, ends_with_client: bool = False
) -> Handler:
    """Return the handler that decodes a body as ``kind`` and answers with what ``do`` makes of it."""

    async def handler(exchange: Exchange) -> None:
        found = do(fields.decode(await exchange.read_body(_ADMIN_BODY_BYTES), kind))
        if isinstance(found, Coroutine):
            found = await (until_disconnect(exchange, found) if ends_with_client else found)
        await reply_json(exchange, found)

    return handler


async def reply_json(exchange: Exchange, value: object) -> None:
    """Answer 200 with ``value`` as JSON."""
    await exchange.reply(200, msgspec.json.encode(value))
