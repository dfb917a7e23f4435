"""A model over the ranks of a group: each computes its part of every step, with sums and gathers over all.

:class:`Leader`, on rank 0, sends ahead what it is about to execute, and :class:`Follower` executes it on another rank.
A rank that fails in a step leaves the others waiting in it, so that any failure there ends the group.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import numpy as np

from neuron.device.jobs import LoadedModel
from neuron.engine.errors import GroupLostError
from neuron.engine.executor import Executor, InFlightStep
from neuron.engine.group import Cleared, Group, plan_of
from neuron.engine.plan import StepPlan
from neuron.engine.sequence import Int32Array
from neuron.models.sizing import MemoryPlan


class Leader:
    """Executor of all ranks, on rank 0: it sends each plan to the others before its own executor launches it."""

    # Only rank 0 has the sampled tokens, and sends them with the next plan.
    overlaps = False
    max_steps = 1

    def __init__(self, executor: Executor, group: Group) -> None:
        self.config, self.sampler = executor.config, executor.sampler
        self._executor = executor
        self._group = group

    def launch(self, plan: StepPlan) -> InFlightStep:
        """Begin a step on all ranks."""
        with _ends_group("rank 0, and the others wait in it"):
            self._group.send(plan)
            return self._executor.launch(plan)

    def clear(self, tables: tuple[Int32Array, ...]) -> None:
        """Zero pages of each table on all ranks."""
        self._group.send(tables)
        self._executor.clear(tables)

    def close(self) -> None:
        """Leave the other ranks."""
        self._executor.close()
        self._group.close()


@dataclasses.dataclass(frozen=True, slots=True)
class Follower:
    """A model in the engine of a rank other than 0: its executor, driven by rank 0."""

    executor: Executor
    group: Group
    plan: MemoryPlan
    loaded: LoadedModel

    def fileno(self) -> int:
        """Return the descriptor that is readable when rank 0 has sent a message."""
        return self.group.fileno()

    def follow(self) -> bool:
        """Execute the next message of rank 0; return whether there will be more."""
        message = self.group.receive()
        match message:
            case None:
                return False
            case Cleared(tables):
                self.executor.clear(tuple(np.frombuffer(pages, np.int32).copy() for pages in tables))
            case _:
                with _ends_group(f"rank {self.group.rank}"):
                    self.executor.launch(plan_of(message))
        return True

    def close(self) -> None:
        """Leave the other ranks."""
        self.executor.close()
        self.group.close()


@contextlib.contextmanager
def _ends_group(where: str) -> Iterator[None]:
    """Raise any failure of a step that all ranks are in as GroupLostError."""
    try:
        yield
    except GroupLostError:
        raise
    except Exception as error:
        raise GroupLostError(f"a step failed on {where}: {error}") from error
