"""The poller: keeps the state of each node current, in one task per node, so that a slow node delays no other.

A poll requests ``/health``, ``/models`` and, for the free memory, ``/discovery`` together. A failed poll, for whatever
reason, changes only the count of failed polls; at ``failure_threshold`` the node is down. A node that is
down is polled less and less often, up to a bound, and is up again with its first good answer.
"""

import asyncio
import functools
import logging
from collections.abc import Mapping
from dataclasses import replace

from cortex.config import Polling
from cortex.fleet.control import NeuronClient
from cortex.fleet.refusals import MAX_TEXT
from cortex.fleet.state import Fleet
from cortex.supervise import Supervisor
from cortex.wire.errors import ApiError

log = logging.getLogger("cortex.fleet")


class Poller:
    """Polls every node until stopped."""

    def __init__(
        self,
        fleet: Fleet,
        neurons: Mapping[str, NeuronClient],
        settings: Polling,
        supervisor: Supervisor | None = None,
    ) -> None:
        self._supervisor = supervisor or Supervisor()
        self._fleet = fleet
        self._neurons = neurons
        self._settings = settings
        self._wanted: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def start(self) -> None:
        """Begin; the first polls are under way when this returns."""
        self.reconfigure(self._neurons, self._settings)

    def reconfigure(self, neurons: Mapping[str, NeuronClient], settings: Polling) -> None:
        """Poll these nodes from now on."""
        changed = {name for name, neuron in neurons.items() if self._neurons.get(name) is not neuron}
        for name in self._tasks.keys() - neurons.keys() | (self._tasks.keys() & changed):
            self._tasks.pop(name).cancel()
        self._neurons, self._settings = dict(neurons), settings
        for name in neurons.keys() - self._tasks.keys():
            self._wanted[name] = asyncio.Event()
            self._tasks[name] = self._supervisor.start(f"poll {name}", functools.partial(self._watch, name))

    async def stop(self) -> None:
        """Stop and wait for the tasks."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def poll_soon(self, node: str) -> None:
        """Poll a node now rather than when it is due, since a request to it has just failed."""
        if node in self._tasks:
            self._wanted[node].set()

    async def poll(self, name: str) -> None:
        """Poll a node once, and record its state or a failed poll."""
        try:
            await self._ask(name)
        except ApiError as error:
            self._fail(name, error)
        except Exception as error:
            log.exception("node=%s poll failed", name)
            self._fail(name, error)

    async def _ask(self, name: str) -> None:
        neuron = self._neurons[name]
        # Not a TaskGroup: one whose task fails leaves its caller marked as cancelled (until Python 3.13). The next
        # `asyncio.timeout` then ends the caller (before 3.11.3): a node which was down once would stay so for ever.
        health = asyncio.create_task(neuron.health())
        models = asyncio.create_task(neuron.models())
        discovery = asyncio.create_task(neuron.discovery())
        asked = health, models, discovery
        try:
            await asyncio.gather(*asked)
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        known = self._fleet.state.nodes[name]
        statuses = {status.id: status for status in models.result()}
        reported = sum(status.running + status.waiting for status in statuses.values())
        if not known.up:
            log.info("node=%s up", name)
        self._fleet.replace(
            replace(
                known,
                up=True,
                polled=True,
                discovery=discovery.result(),
                health=health.result(),
                models=statuses,
                foreign_load=max(0, reported - self._fleet.in_flight.by_node.get(name, 0)),
                failed_polls=0,
                fault=None,
            )
        )

    def _fail(self, name: str, error: BaseException) -> None:
        known = self._fleet.state.nodes[name]
        failed_polls = known.failed_polls + 1
        up = known.up and failed_polls < self._settings.failure_threshold
        fault = str(error)[:MAX_TEXT] or type(error).__name__
        if failed_polls == self._settings.failure_threshold:  # once, of a node that has never been up too
            log.warning("node=%s down failed_polls=%d fault=%r", name, failed_polls, fault)
        self._fleet.replace(replace(known, up=up, polled=True, failed_polls=failed_polls, fault=fault))

    async def _watch(self, name: str) -> None:
        while True:
            await self.poll(name)
            self._wanted[name].clear()
            try:
                async with asyncio.timeout(self._pause_s(name)):
                    await self._wanted[name].wait()
            except TimeoutError:
                pass

    def _pause_s(self, name: str) -> float:
        settings = self._settings
        excess = self._fleet.state.nodes[name].failed_polls - settings.failure_threshold
        if excess <= 0:
            return settings.interval_s
        return max(settings.interval_s, min(settings.max_backoff_s, settings.interval_s * 2.0 ** min(excess, 16)))
