"""The fleet of one gateway process: connection pools, poller, loader, dispatcher.

It connects the components and decides nothing. Their settings can change while they run
(:meth:`FleetService.reconfigure`).
"""

from collections.abc import Callable

from cortex.config import Config, ModelProfile, NodeSettings, NodeType
from cortex.fleet.catalogue import Catalogue
from cortex.fleet.control import NeuronClient, OpenAIClient, make_pool
from cortex.fleet.dispatch import Dispatcher
from cortex.fleet.loader import Loader
from cortex.fleet.poller import Poller
from cortex.fleet.state import Fleet, Node
from cortex.fleet.warmer import Warmer
from cortex.supervise import Supervisor
from cortex.upstream import Pool
from cortex.wire.errors import ApiError
from cortex.wire.node import PinRequest


class FleetService:
    """The fleet of one gateway process. Start it in the running loop, stop it before the loop ends."""

    def __init__(
        self,
        config: Config,
        catalogue: Catalogue,
        *,
        on_retry: Callable[[str, str], None] = lambda node, reason: None,
        on_load: Callable[[str, bool], None] = lambda model, succeeded: None,
        supervisor: Supervisor | None = None,
    ) -> None:
        supervisor = supervisor or Supervisor()
        self.config = config
        self.catalogue = catalogue
        self.fleet = Fleet(Node(node.name, node.endpoint) for node in config.neurons)
        self.pools = {node.name: self._pool(node) for node in config.neurons}
        self.neurons = {node.name: self._client(node) for node in config.neurons}
        self.poller = Poller(self.fleet, self.neurons, config.gateway.polling, supervisor)
        self.loader = Loader(self.fleet, self.neurons, config.eviction, self.poller.poll_soon, on_load)
        self.warmer = Warmer(self.fleet, lambda: self.catalogue, self._warm, self._pin, supervisor)
        self.dispatcher = Dispatcher(
            self.fleet, config, catalogue, self.pools, self.loader, self.poller, on_retry=on_retry
        )
        self._retired: list[Pool] = []

    def start(self) -> None:
        """Start to poll the nodes; returns before the first has answered."""
        self.poller.start()
        self.warmer.start()

    def end_requests(self, error: ApiError) -> None:
        """End every request that a node is answering, or that waits for a load, with ``error``."""
        self.loader.end(error)
        for pool in (*self.pools.values(), *self._retired):
            pool.close(error)

    async def stop(self) -> None:
        """End the tasks and close every connection."""
        await self.warmer.stop()
        await self.loader.stop()
        await self.poller.stop()
        for pool in (*self.pools.values(), *self._retired):
            pool.close()
        for neuron in self.neurons.values():
            neuron.close()

    def reconfigure(self, config: Config, catalogue: Catalogue) -> None:
        """Apply other nodes, models and limits. Running requests keep those they began with."""
        before = {node.name: node for node in self.config.neurons}
        gateway_changed = config.gateway != self.config.gateway
        self.config, self.catalogue = config, catalogue
        wanted = {node.name: node for node in config.neurons}
        for name in [*self.pools]:
            if gateway_changed or wanted.get(name) != before[name]:
                retired = self.pools.pop(name)
                retired.retire()
                self._retired.append(retired)
                self.neurons.pop(name).close()
        self._retired = [pool for pool in self._retired if pool.num_connections]
        for name, node in wanted.items():
            if name not in self.pools:
                self.pools[name], self.neurons[name] = self._pool(node), self._client(node)
        self.fleet.reconfigure(Node(node.name, node.endpoint) for node in config.neurons)
        self.poller.reconfigure(self.neurons, config.gateway.polling)
        self.loader.eviction = config.eviction
        self.dispatcher.reconfigure(config, catalogue)

    def _pool(self, node: NodeSettings) -> Pool:
        return make_pool(node, self.config.gateway, self.config.gateway.max_connections_per_node)

    def _client(self, node: NodeSettings) -> NeuronClient:
        kind = OpenAIClient if node.type is NodeType.OPENAI else NeuronClient
        return kind(node, self.config.gateway)

    async def _warm(self, name: str, profile: ModelProfile) -> None:
        await self.loader.load_on(name, profile)

    async def _pin(self, name: str, profile: ModelProfile) -> None:
        self.fleet.set_model(name, await self.neurons[name].pin(PinRequest(profile.id, pinned=True)))
