"""The executor of a tensor-parallel model: each rank runs its part of every step.

Rank 0 is launched like any executor and sends the plan on; the others :meth:`~GroupRunner.follow`. A rank that fails in
a step leaves the others waiting in it, so that any failure there ends the group.
"""

import dataclasses

import numpy as np
import torch

from neuron.device.jobs import LoadedModel
from neuron.engine.errors import GroupLostError
from neuron.engine.executor import InFlightStep
from neuron.engine.group import Cleared, Group, plan_of
from neuron.engine.plan import StepPlan
from neuron.engine.runner import Runner
from neuron.engine.sequence import Int32Array
from neuron.engine_settings import DEFAULTS, EngineSettings
from neuron.layers.shard import Shard
from neuron.models import decoder
from neuron.models.model import ModelConfig
from neuron.models.sizing import MemoryPlan
from neuron.triton_kernels.batch import Batch


class GroupRunner(Runner):
    """Executor of a rank's part of a model."""

    def __init__(
        self,
        config: ModelConfig,
        weights: decoder.DecoderWeights,
        plan: MemoryPlan,
        device: torch.device,
        group: Group,
        settings: EngineSettings = DEFAULTS,
    ) -> None:
        super().__init__(config, weights, plan, device, settings, Shard(group.rank, group.size))
        # Only rank 0 has the sampled tokens, and sends them with the next plan.
        self.overlaps = False
        self.group = group
        ranks = [Shard(rank, group.size) for rank in range(group.size)]
        self._widths = tuple(len(each.vocabulary(config.vocab_size)) for each in ranks)

    def launch(self, plan: StepPlan) -> InFlightStep:
        """Begin a step on all ranks; rank 0 only."""
        try:
            self.group.send(plan)
            return super().launch(plan)
        except GroupLostError:
            raise
        except Exception as error:
            raise GroupLostError(f"a step failed on rank 0, and the others wait in it: {error}") from error

    def follow(self) -> bool:
        """Execute the next message of rank 0; return whether there will be more. Other ranks only."""
        message = self.group.receive()
        match message:
            case None:
                return False
            case Cleared(tables):
                super().clear_pages(tuple(np.frombuffer(pages, np.int32).copy() for pages in tables))
            case _:
                try:
                    super().launch(plan_of(message))
                except GroupLostError:
                    raise
                except Exception as error:
                    raise GroupLostError(f"a step failed on rank {self.group.rank}: {error}") from error
        return True

    def clear_pages(self, tables: tuple[Int32Array, ...]) -> None:
        """Zero pages of each table on all ranks; rank 0 only."""
        self.group.send(tables)
        super().clear_pages(tables)

    def close(self) -> None:
        """Leave the other ranks."""
        self.group.close()

    def _forward(self, token_ids: torch.Tensor, batches: tuple[Batch, ...]) -> torch.Tensor:
        own = self._of_layers(batches)
        return decoder.forward(self.config, self._weights, token_ids, own, self._caches, self._kernels, self.group.sum)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        # All ranks get all logits, as both backends have no gather to one rank. The others sample greedily and drop it.
        return self.group.gather(super()._logits(hidden), self._widths)


@dataclasses.dataclass(frozen=True, slots=True)
class Follower:
    """A model in the engine of a rank other than 0, which runs the steps of rank 0."""

    runner: GroupRunner
    plan: MemoryPlan
    loaded: LoadedModel
