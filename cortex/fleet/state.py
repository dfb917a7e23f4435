"""The state of the fleet: one immutable value, replaced whole, and the count of requests in flight.

Readers take :attr:`Fleet.state` once per decision and never see half a change. Requests are counted when their node is
selected, not when it answers, so that many at once spread out; the counts are this process's own, apart from polls.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import msgspec

from cortex._fast.in_flight import InFlightRequests
from cortex.wire.node import Device, DeviceKind, Discovery, Health, ModelState, ModelStatus, NodeState


@dataclass(frozen=True, slots=True)
class Node:
    """State of one node. ``failed_polls`` counts failed polls in a row; ``fault`` is the reason of the last."""

    name: str
    endpoint: str
    up: bool = False
    polled: bool = False
    """Whether one poll has ended, well or not."""
    discovery: Discovery | None = None
    health: Health | None = None
    models: Mapping[str, ModelStatus] = field(default_factory=dict)
    foreign_load: int = 0
    """Requests it has from elsewhere: its reported requests less this process's own at that time."""
    failed_polls: int = 0
    fault: str | None = None

    @property
    def takes_requests(self) -> bool:
        """Whether it accepts requests for its loaded models."""
        return self.up and self.health is not None and self.health.state is NodeState.READY


def can_serve(status: ModelStatus) -> bool:
    """Return whether a model serves requests: it is ready, and has memory for at least one sequence."""
    return status.state is ModelState.READY and (status.kv_cache_bytes > 0 or status.weights_bytes == 0)


class ByModel(Mapping[str, tuple[Node, ...]]):
    """The nodes that have a model, by its name, found lazily.

    A state is replaced with every poll of every node, and looked up for a few of thousands of models.
    """

    __slots__ = ("_found", "_has", "_nodes")

    def __init__(self, nodes: tuple[Node, ...], has: Callable[[Node, ModelStatus], bool]) -> None:
        self._nodes = nodes
        self._has = has
        self._found: dict[str, tuple[Node, ...]] = {}

    def __getitem__(self, model: str) -> tuple[Node, ...]:
        found = self._found.get(model)
        if found is None:
            found = tuple(
                node
                for node in self._nodes
                if (status := node.models.get(model)) is not None and self._has(node, status)
            )
            if not found:  # not cached: clients make up names
                raise KeyError(model)
            self._found[model] = found
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(
            dict.fromkeys(
                model for node in self._nodes for model, status in node.models.items() if self._has(node, status)
            )
        )

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclass(frozen=True, slots=True)
class FleetState:
    """Every node by name, and for each model the nodes that serve it and the nodes that list it, in name order."""

    nodes: Mapping[str, Node]
    serving: Mapping[str, tuple[Node, ...]]
    listing: Mapping[str, tuple[Node, ...]]

    @classmethod
    def of(cls, nodes: Iterable[Node]) -> "FleetState":
        """Return the state of ``nodes``."""
        by_name = {node.name: node for node in sorted(nodes, key=lambda node: node.name)}
        up = tuple(node for node in by_name.values() if node.up)
        taking = tuple(node for node in up if node.takes_requests)
        return cls(
            MappingProxyType(by_name),
            ByModel(taking, lambda node, status: can_serve(status)),
            ByModel(up, lambda node, status: True),
        )

    def has_model(self, model: str) -> bool:
        """Return whether any node, up or down, listed a model when it last answered."""
        return any(model in node.models for node in self.nodes.values())

    @property
    def known(self) -> frozenset[str]:
        """All models that nodes, up or down, listed when they last answered."""
        return frozenset(model for node in self.nodes.values() for model in node.models)

    def with_node(self, node: Node) -> "FleetState":
        """Return the state with one node replaced."""
        return FleetState.of({**self.nodes, node.name: node}.values())

    def status(self, node: str, model: str) -> ModelStatus | None:
        """Return the status of a model on a node; ``None`` if the node is not up or does not list it."""
        known = self.nodes.get(node)
        return known.models.get(model) if known is not None and known.up else None

    @property
    def complete(self) -> bool:
        """Whether every node has been polled at least once."""
        return all(node.polled for node in self.nodes.values())


def devices_in_use(nodes: Iterable[Node]) -> list[Device]:
    """Return the devices that nodes use, each once: neurons of one host share its CPU and its memory."""
    found: dict[tuple[str, str], Device] = {}
    for node in nodes:
        if node.discovery is None:
            continue
        boot_id = node.discovery.boot_id
        for device in node.discovery.devices:
            if device.worker is not None:
                is_shared = device.kind is DeviceKind.CPU and boot_id
                found[boot_id if is_shared else f"node {node.name}", device.id] = device
    return list(found.values())


class Fleet:
    """The current :class:`FleetState`, the event of its change, and the requests in flight."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self.state = FleetState.of(nodes)
        self.in_flight = InFlightRequests()
        self.in_flight.on_release = self.notify_change
        self._changed = asyncio.Event()
        self._moved: asyncio.Event | None = None

    def replace(self, node: Node) -> None:
        """Replace the node of the same name, if there still is one."""
        if node.name in self.state.nodes:
            self._become(self.state.with_node(node))

    def reconfigure(self, nodes: Iterable[Node]) -> None:
        """Replace the nodes. A node that was there before at the same endpoint keeps its state."""
        known = self.state.nodes
        self._become(
            FleetState.of(
                old if (old := known.get(node.name)) is not None and old.endpoint == node.endpoint else node
                for node in nodes
            )
        )

    def _become(self, state: FleetState) -> None:
        self.state = state
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        self.notify_change()

    def set_model(self, node: str, status: ModelStatus) -> None:
        """Record a model's status from a node's response, ahead of the next poll."""
        known = self.state.nodes.get(node)
        if known is None:
            return
        self.replace(replace(known, models={**known.models, status.id: status}))

    def forget_model(self, node: str, model: str) -> None:
        """Record that a node does not have a model loaded."""
        known = self.state.nodes.get(node)
        status = known.models.get(model) if known is not None else None
        if status is not None:
            self.set_model(node, msgspec.structs.replace(status, state=ModelState.AVAILABLE))

    async def changed(self) -> None:
        """Wait until the state is replaced."""
        await self._changed.wait()

    def notify_change(self) -> None:
        """Wake the requests that wait for spare capacity; nearly always there are none."""
        moved, self._moved = self._moved, None
        if moved is not None:
            moved.set()

    async def moved(self) -> None:
        """Wait until the state is replaced or a request of this process ends."""
        if self._moved is None:
            self._moved = asyncio.Event()
        await self._moved.wait()
