"""The operators' endpoints under ``/admin``: a report of the fleet, and actions on models and nodes.

Every action is a neuron's; the gateway finds the node and returns its response. The neurons hold the state, so a pin or
a drain through one gateway is seen by all.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import msgspec

from cortex.config import ModelProfile
from cortex.dialects import fields
from cortex.errors import NoNodeError, UnknownNodeError
from cortex.fleet import placement
from cortex.fleet.control import NeuronClient
from cortex.fleet.router import offered_profile
from cortex.fleet.service import FleetService
from cortex.http_io import Exchange
from cortex.settings import ConfigError
from cortex.supervise import Supervisor
from cortex.wire.errors import ApiError, InvalidRequestError, ModelNotFoundError
from cortex.wire.node import (
    Count,
    Device,
    DrainRequest,
    ForgetRequest,
    ModelState,
    ModelStatus,
    NodeState,
    PinRequest,
    UnloadRequest,
    WorkerHealth,
)

MAX_BODY_BYTES = 1 << 20
FORGETTABLE = frozenset({ModelState.AVAILABLE, ModelState.FAILED})


class NodeReport(msgspec.Struct, frozen=True):
    """A node in the state of this process; ``in_flight`` counts this process's requests there.

    ``failed_polls`` are those in a row.
    """

    name: str
    endpoint: str
    up: bool
    state: NodeState | None
    version: str
    hostname: str
    devices: tuple[Device, ...]
    workers: tuple[WorkerHealth, ...]
    models: tuple[ModelStatus, ...]
    in_flight: int
    failed_polls: int
    fault: str | None


class FleetReport(msgspec.Struct, frozen=True):
    """``GET /admin/fleet``. ``config_error`` is the reason why the current files are not in force.

    ``degraded`` has the names of failing background tasks and components.
    """

    nodes: tuple[NodeReport, ...]
    config_error: str | None = None
    degraded: tuple[str, ...] = ()


class ModelAct(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /admin/models/unload``, or a load: without ``node``, the best one, or all that have it."""

    model: str
    node: str = ""
    drain_timeout_s: float = 30.0


class LoadAct(ModelAct, frozen=True, forbid_unknown_fields=True):
    """``POST /admin/models/load``; ``evict_for_tokens`` is the context for which a ``node`` evicts others."""

    evict_for_tokens: Count = 0


class ForgetAct(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /admin/models/forget``: on a node, or on all that list the model and do not have it loaded."""

    model: str
    node: str = ""


class PinAct(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /admin/models/pin``: on a node, or on all that have the model loaded."""

    model: str
    node: str = ""
    pinned: bool = True


class DrainAct(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /admin/nodes/drain``."""

    node: str
    draining: bool = True


class Acted(msgspec.Struct, frozen=True):
    """Result of an action on models, by node."""

    nodes: dict[str, ModelStatus]


class Admin:
    """The endpoints under ``/admin``, after authentication."""

    def __init__(
        self,
        service: FleetService,
        reload: Callable[[], None],
        config_error: Callable[[], ConfigError | None],
        supervisor: Supervisor,
    ) -> None:
        self._supervisor = supervisor
        self._service = service
        self._fleet = service.fleet
        self._reload = reload
        self._config_error = config_error

    async def fleet(self, exchange: Exchange) -> None:
        """``GET /admin/fleet``."""
        await exchange.reply(200, msgspec.json.encode(self.report()))

    async def load(self, exchange: Exchange) -> None:
        """``POST /admin/models/load``: returns when the model is ready."""
        asked = fields.decode(await exchange.read_body(MAX_BODY_BYTES), LoadAct)
        profile = self._profile(asked.model)
        if asked.node:
            self._neuron(asked.node)
            await self._service.loader.load_on(asked.node, profile, evict_for_tokens=asked.evict_for_tokens)
            name = asked.node
        elif asked.evict_for_tokens:
            raise InvalidRequestError("'evict_for_tokens' is for a load on one 'node'.", param="evict_for_tokens")
        else:
            candidates = placement.choose(self._fleet.state, profile)
            if not candidates:
                raise NoNodeError(f"No node that is up can load {profile.id}.", retry_after_s=5)
            name = await self._service.loader.load(profile, tuple(candidate.node for candidate in candidates))
        await self._reply(exchange, {name: self._status(name, profile.id)})

    async def unload(self, exchange: Exchange) -> None:
        """``POST /admin/models/unload``: returns when the model is gone."""
        asked = fields.decode(await exchange.read_body(MAX_BODY_BYTES), ModelAct)

        async def act(neuron: NeuronClient, status: ModelStatus) -> ModelStatus:
            return await neuron.unload(UnloadRequest(status.id, asked.drain_timeout_s, status.generation))

        await self._on_each(exchange, asked.model, asked.node, act)

    async def forget(self, exchange: Exchange) -> None:
        """``POST /admin/models/forget``: removes failed and unloaded models from the lists."""
        asked = fields.decode(await exchange.read_body(MAX_BODY_BYTES), ForgetAct)
        model = self._service.catalogue.resolve(asked.model)
        if asked.node:
            self._neuron(asked.node)
        nodes = [asked.node] if asked.node else list(self._service.neurons)
        await asyncio.gather(*(self._service.poller.poll(node) for node in nodes))
        found = [
            node.name
            for node in self._fleet.state.listing.get(model, ())
            if node.name in nodes and (asked.node or node.models[model].state in FORGETTABLE)
        ]
        if not found:
            where = f"on {asked.node}" if asked.node else "failed or unloaded on any node that is up"
            raise ModelNotFoundError(f"The model {asked.model!r} is not {where}.", param="model")
        outcomes = await asyncio.gather(*(self._neuron(node).forget(ForgetRequest(model)) for node in found))
        await asyncio.gather(*(self._service.poller.poll(node) for node in found))
        await self._reply(exchange, dict(zip(found, outcomes, strict=True)))

    async def pin(self, exchange: Exchange) -> None:
        """``POST /admin/models/pin``. A model that no node has loaded can be unpinned, with no effect."""
        asked = fields.decode(await exchange.read_body(MAX_BODY_BYTES), PinAct)

        async def act(neuron: NeuronClient, status: ModelStatus) -> ModelStatus:
            return await neuron.pin(PinRequest(status.id, asked.pinned))

        await self._on_each(exchange, asked.model, asked.node, act, may_be_nowhere=not asked.pinned)

    async def drain(self, exchange: Exchange) -> None:
        """``POST /admin/nodes/drain``: the node accepts nothing new; running requests continue."""
        asked = fields.decode(await exchange.read_body(MAX_BODY_BYTES), DrainAct)
        health = await self._neuron(asked.node).drain(DrainRequest(asked.draining))
        await self._service.poller.poll(asked.node)
        await exchange.reply(200, msgspec.json.encode(health))

    async def reload(self, exchange: Exchange) -> None:
        """``POST /admin/reload``: read the configuration again, all of it or nothing."""
        try:
            self._reload()
        except ConfigError as error:
            raise InvalidRequestError(f"The configuration is as it was: {error}", param=error.key or None) from None
        await exchange.reply(200, msgspec.json.encode(self.report()))

    def report(self) -> FleetReport:
        """Return a report of the fleet's current state."""
        in_flight = self._fleet.in_flight.by_node
        error = self._config_error()
        nodes = tuple(
            NodeReport(
                name=node.name,
                endpoint=node.endpoint,
                up=node.up,
                state=node.health.state if node.health else None,
                version=node.discovery.version if node.discovery else "",
                hostname=node.discovery.hostname if node.discovery else "",
                devices=node.discovery.devices if node.discovery else (),
                workers=node.health.workers if node.health else (),
                models=tuple(sorted(node.models.values(), key=lambda status: status.id)),
                in_flight=in_flight.get(node.name, 0),
                failed_polls=node.failed_polls,
                fault=node.fault,
            )
            for node in self._fleet.state.nodes.values()
        )
        return FleetReport(nodes, None if error is None else str(error), self._supervisor.degraded)

    async def _on_each(
        self,
        exchange: Exchange,
        name: str,
        node: str,
        act: Callable[[NeuronClient, ModelStatus], Awaitable[ModelStatus]],
        *,
        may_be_nowhere: bool = False,
    ) -> None:
        """Perform an action on a model, on a node or on all that have it, and reply with the results."""
        model = self._service.catalogue.resolve(name)
        if node:
            self._neuron(node)
        await asyncio.gather(
            *(self._service.poller.poll(known) for known in ([node] if node else self._service.neurons))
        )
        found = {
            known.name: known.models[model]
            for known in self._fleet.state.listing.get(model, ())
            if (known.name == node if node else known.models[model].state is not ModelState.AVAILABLE)
        }
        is_known = model in self._service.catalogue.profiles or model in self._fleet.state.listing
        if not found and not (may_be_nowhere and is_known):
            where = f"on {node}" if node else "on any node that is up"
            raise ModelNotFoundError(f"The model {name!r} is not {where}.", param="model")
        outcomes = await asyncio.gather(*(act(self._neuron(known), status) for known, status in found.items()))
        for known, status in zip(found, outcomes, strict=True):
            self._fleet.set_model(known, status)
        await self._reply(exchange, dict(zip(found, outcomes, strict=True)))

    async def _reply(self, exchange: Exchange, nodes: dict[str, ModelStatus]) -> None:
        await exchange.reply(200, msgspec.json.encode(Acted(nodes)))

    def _profile(self, name: str) -> ModelProfile:
        profile = self._known_profile(name)
        if profile is None:
            with contextlib.suppress(ConfigError):  # another worker may just have added it
                self._reload()
            profile = self._known_profile(name)
        if profile is None:
            raise ModelNotFoundError(f"The model {name!r} is not in the catalogue.", param="model")
        return profile

    def _known_profile(self, name: str) -> ModelProfile | None:
        model = self._service.catalogue.resolve(name)
        return self._service.catalogue.profiles.get(model) or offered_profile(self._fleet.state, model)

    def _neuron(self, name: str) -> NeuronClient:
        neuron = self._service.neurons.get(name)
        if neuron is None:
            known = ", ".join(self._service.neurons)
            raise UnknownNodeError(f"There is no node '{name}'; there is: {known}.", param="node")
        return neuron

    def _status(self, node: str, model: str) -> ModelStatus:
        status = self._fleet.state.status(node, model)
        if status is None:
            raise ApiError(f"{node} went down after it loaded {model}.")
        return status
