"""A model over the ranks of a group: each computes its part of every step.

:class:`ParallelForward` sums and gathers within a step. :class:`Leader`, on rank 0, sends ahead what it is about to
execute, and :class:`Follower` executes it on another rank. A rank that fails in a step leaves the others waiting in it,
so that any failure there ends the group.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from neuron.device.jobs import LoadedModel
from neuron.engine.errors import GroupLostError
from neuron.engine.executor import Executor, InFlightStep
from neuron.engine.group import Cleared, Group, plan_of
from neuron.engine.plan import StepPlan
from neuron.engine.sequence import Int32Array
from neuron.layers.shard import Shard
from neuron.models.decoder import Decoder
from neuron.models.sizing import MemoryPlan
from neuron.triton_kernels.batch import Batch


class ParallelForward:
    """Forward pass of a whole model by all ranks, of which this one has ``part``."""

    def __init__(self, part: Decoder, group: Group) -> None:
        self.config, self.operations = part.config, part.operations
        self._part = dataclasses.replace(part, sum_ranks=group.sum)
        self._group = group
        ranks = [Shard(rank, group.size) for rank in range(group.size)]
        self._widths = tuple(len(each.vocabulary(part.config.vocab_size)) for each in ranks)

    def hidden(self, token_ids: torch.Tensor, batches: Sequence[Batch], caches: Sequence[Any]) -> torch.Tensor:
        """See :class:`~neuron.models.decoder.Forward`."""
        return self._part.hidden(token_ids, batches, caches)

    def drafted(
        self, token_ids: torch.Tensor, hidden: torch.Tensor, batches: Sequence[Batch], caches: Sequence[Any]
    ) -> torch.Tensor:
        """See :class:`~neuron.models.decoder.Forward`."""
        return self._part.drafted(token_ids, hidden, batches, caches)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See :class:`~neuron.models.decoder.Forward`."""
        # All ranks get all logits, as both backends have no gather to one rank. The others sample greedily and drop it.
        return self._group.gather(self._part.logits(hidden), self._widths)


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
