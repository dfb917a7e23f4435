"""The warmer: keeps pinned models loaded, at the start, after a node's restart and after a reload of the catalogue.

There is one load for each pinned model that is not loaded, tried again with back-off; a node joins the loads of several
gateways. A model that is loaded already is pinned in place. After a node died of a load, the load is tried again there
only after a pause, longer after each death.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from cortex.config import ModelProfile
from cortex.fleet.catalogue import Catalogue
from cortex.fleet.loader import is_death
from cortex.fleet.state import Fleet
from cortex.supervise import Supervisor
from cortex.wire.errors import ApiError
from cortex.wire.node import ModelState

log = logging.getLogger("cortex.fleet")

RETRY_FIRST_S, RETRY_MAX_S = 5.0, 300.0
DEATH_FIRST_S, DEATH_MAX_S = 60.0, 3600.0
"""Pauses after a load of which the node died."""

Act = Callable[[str, ModelProfile], Awaitable[None]]
"""Function that loads or pins a model on a node."""


class Warmer:
    """A task that watches the pins, and a task for each load."""

    def __init__(
        self,
        fleet: Fleet,
        catalogue: Callable[[], Catalogue],
        load: Act,
        pin: Act,
        supervisor: Supervisor | None = None,
    ) -> None:
        self._supervisor = supervisor or Supervisor()
        self._fleet = fleet
        self._catalogue = catalogue
        self._load = load
        self._pin = pin
        self._acts: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._death_pauses_s: dict[tuple[str, str], float] = {}
        self._watch: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the watch."""
        self._watch = self._supervisor.start("warmer", self._run)

    async def stop(self) -> None:
        """Stop; loads go on in their nodes."""
        tasks = [task for task in (self._watch, *self._acts.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            for profile in self._catalogue().profiles.values():
                for node in profile.pinned:
                    self._look(node, profile)
            await self._fleet.changed()

    def _look(self, name: str, profile: ModelProfile) -> None:
        key = name, profile.id
        node = self._fleet.state.nodes.get(name)
        if node is None or not node.takes_requests or key in self._acts:
            return
        status = node.models.get(profile.id)
        if status is None or status.state in {ModelState.AVAILABLE, ModelState.FAILED}:
            act = self._load_until_ready
        elif status.state is ModelState.READY and not status.pinned:
            act = self._pin_once
        else:
            return
        title = f"warm {profile.id} on {name}"
        task = self._acts[key] = self._supervisor.start(title, lambda: act(name, profile))
        task.add_done_callback(lambda done: self._ended(key))

    def _ended(self, key: tuple[str, str]) -> None:
        self._acts.pop(key, None)

    async def _load_until_ready(self, name: str, profile: ModelProfile) -> None:
        key = name, profile.id
        pause_s = self._death_pauses_s.get(key, 0.0)
        while True:
            await asyncio.sleep(pause_s)
            node = self._fleet.state.nodes.get(name)
            current = self._catalogue().profiles.get(profile.id)
            if node is None or not node.takes_requests or current is None or name not in current.pinned:
                return  # the watch starts another if need be
            try:
                await self._load(name, profile)
            except ApiError as error:
                _log_failure(name, profile, error)
                pause_s = min(max(RETRY_FIRST_S, 2 * pause_s), RETRY_MAX_S)
                if is_death(error):
                    after_s = 2 * self._death_pauses_s.get(key, DEATH_FIRST_S / 2)
                    self._death_pauses_s[key] = min(after_s, DEATH_MAX_S)
                pause_s = max(pause_s, self._death_pauses_s.get(key, 0.0))
            else:
                self._death_pauses_s.pop(key, None)
                return

    async def _pin_once(self, name: str, profile: ModelProfile) -> None:
        try:
            await self._pin(name, profile)
        except ApiError as error:
            _log_failure(name, profile, error)
            await asyncio.sleep(RETRY_FIRST_S)  # the model may be gone: the watch decides again


def _log_failure(name: str, profile: ModelProfile, error: ApiError) -> None:
    log.warning("model=%s node=%s not warm yet: %s", profile.id, name, error.message)
