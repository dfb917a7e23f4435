"""Everything of the fleet that runs in one process, put together: connections, polls, loads, dispatch.

It decides nothing; the parts do.
"""

from collections.abc import Callable

from cortex.config import Config
from cortex.fleet.catalogue import Catalogue
from cortex.fleet.control import NeuronClient
from cortex.fleet.dispatch import Dispatcher
from cortex.fleet.loader import Loader
from cortex.fleet.poller import Poller
from cortex.fleet.state import Fleet, InFlight, Node
from cortex.upstream import Pool


class FleetService:
    """The fleet of one gateway process. Start it in the running loop, stop it before the loop ends."""

    def __init__(
        self,
        config: Config,
        catalogue: Catalogue,
        *,
        on_retry: Callable[[str, str], None] = lambda node, reason: None,
        on_in_flight: Callable[[str, int], None] = lambda node, count: None,
        on_load: Callable[[str, bool], None] = lambda model, succeeded: None,
    ) -> None:
        settings = config.gateway
        self.fleet = Fleet((Node(node.name, node.endpoint) for node in config.neurons), InFlight(on_in_flight))
        self.pools = {
            node.name: Pool(node.name, node.endpoint, settings.timeouts, settings.max_connections_per_node)
            for node in config.neurons
        }
        self._neurons = {node.name: NeuronClient(node.name, node.endpoint, settings) for node in config.neurons}
        self.poller = Poller(self.fleet, self._neurons, settings.polling)
        self._loader = Loader(self.fleet, self._neurons, settings.timeouts.load_stall_s, self.poller.poll_soon, on_load)
        self.dispatcher = Dispatcher(
            self.fleet,
            catalogue,
            self.pools,
            self._loader,
            self.poller,
            settings.timeouts,
            first_look_s=settings.polling.timeout_s + 1,
            on_retry=on_retry,
        )

    def start(self) -> None:
        """Begin to watch the nodes; returns before the first of them has answered."""
        self.poller.start()

    async def stop(self) -> None:
        """End the tasks and close every connection."""
        await self._loader.stop()
        await self.poller.stop()
        for pool in self.pools.values():
            pool.close()
        for neuron in self._neurons.values():
            neuron.close()
