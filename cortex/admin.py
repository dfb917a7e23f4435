"""The operators' view: what the gateway knows of its fleet, as ``cortex status`` shows it."""

import msgspec

from cortex.fleet.state import Fleet
from cortex.http_io import Exchange
from cortex.wire.node import Device, ModelStatus, NodeState, WorkerHealth


class NodeReport(msgspec.Struct, frozen=True):
    """One node as this process sees it; ``in_flight`` are its own requests there."""

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
    strikes: int
    fault: str | None


class FleetReport(msgspec.Struct, frozen=True):
    """``GET /admin/fleet``."""

    nodes: tuple[NodeReport, ...]


class Admin:
    """The endpoints under ``/admin``."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def fleet(self, exchange: Exchange) -> None:
        """``GET /admin/fleet``."""
        await exchange.reply(200, msgspec.json.encode(self.report()))

    def report(self) -> FleetReport:
        """Return the fleet as it is known now."""
        in_flight = self._fleet.in_flight.by_node
        return FleetReport(
            tuple(
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
                    strikes=node.strikes,
                    fault=node.fault,
                )
                for node in self._fleet.state.nodes.values()
            )
        )
