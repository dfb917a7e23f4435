"""Spare capacity: the queue of low-priority requests, admitted only to slots that no other request needs.

A model has a spare slot while one of its nodes runs fewer requests than it takes at a time, less one slot that is kept
free. Waiting requests go in the order of their priority, then of their arrival. The load from elsewhere is known from
the node's last poll, so a low-priority request may be sent just before a more important one, but never many.
"""

import asyncio
import bisect
import itertools
from collections.abc import Mapping

from cortex.fleet.state import Fleet, FleetState
from cortex.wire.errors import OverloadedError

KEPT_SLOTS = 1


def has_spare_capacity(state: FleetState, model: str, in_flight: Mapping[str, int]) -> bool:
    """Return whether a node has a spare slot for ``model``; true for a model that is not loaded."""
    serving = state.serving.get(model, ())
    if not serving:
        return True
    for node in serving:
        load = in_flight.get(node.name, 0) + node.foreign_load
        slots = node.models[model].max_sequences
        if load == 0 or load + KEPT_SLOTS < slots:
            return True
    return False


class SpareCapacity:
    """Queues of waiting requests, one for each model."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._queues: dict[str, list[tuple[int, int]]] = {}
        self._arrivals = itertools.count()

    async def wait(self, model: str, priority: int, timeout_s: float) -> None:
        """Return when there is a spare slot and no request of a higher priority waits.

        Raises:
            OverloadedError: there was none within ``timeout_s``.
        """
        queue = self._queues.setdefault(model, [])
        place = (-priority, next(self._arrivals))
        bisect.insort(queue, place)
        try:
            async with asyncio.timeout(timeout_s):
                while queue[0] is not place or not self._is_free(model):
                    await self._fleet.moved()
        except TimeoutError:
            message = f"No capacity of {model} is left over for requests of this priority."
            raise OverloadedError(message, retry_after_s=max(1.0, timeout_s)) from None
        finally:
            queue.remove(place)
            if not queue:
                self._queues.pop(model, None)
            else:
                self._fleet.notify_change()  # the next one is first now

    def _is_free(self, model: str) -> bool:
        return has_spare_capacity(self._fleet.state, model, self._fleet.in_flight.by_node)
