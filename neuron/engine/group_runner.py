"""The executor of a model that several devices hold: each rank runs its part of every step.

Rank 0 is launched like any executor and sends the plan on; the others :meth:`~GroupRunner.follow`. A rank that fails in
the middle of a step leaves the others waiting in it, so that any failure there is the end of the group.
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
from neuron.models import decoder
from neuron.models.config import ModelConfig
from neuron.models.shard import Shard, local_config
from neuron.models.sizing import MemoryPlan
from neuron.triton_kernels.batch import Batch


class GroupRunner(Runner):
    """One rank's part of a model. ``config`` is the whole model's."""

    def __init__(
        self,
        config: ModelConfig,
        weights: decoder.DecoderWeights,
        plan: MemoryPlan,
        device: torch.device,
        group: Group,
        settings: EngineSettings = DEFAULTS,
    ) -> None:
        super().__init__(local_config(config, Shard(group.rank, group.size)), weights, plan, device, settings)
        # What a step sampled is known to rank 0 alone, which sends it with the next plan.
        self.overlaps = False
        self.group = group
        shares = [Shard(rank, group.size).vocabulary(config) for rank in range(group.size)]
        self._widths = tuple(share.stop - share.start for share in shares)

    def launch(self, plan: StepPlan) -> InFlightStep:
        """Begin a step on all ranks. Of rank 0."""
        try:
            self.group.send(plan)
            return super().launch(plan)
        except GroupLostError:
            raise
        except Exception as error:
            raise GroupLostError(f"a step failed on rank 0, and the others wait in it: {error}") from error

    def follow(self) -> bool:
        """Do the next thing that rank 0 does; return whether there will be more. Of the other ranks."""
        message = self.group.receive()
        match message:
            case None:
                return False
            case Cleared(pages):
                super().clear_pages(np.frombuffer(pages, np.int32).copy())
            case _:
                try:
                    super().launch(plan_of(message))
                except GroupLostError:
                    raise
                except Exception as error:
                    raise GroupLostError(f"a step failed on rank {self.group.rank}: {error}") from error
        return True

    def clear_pages(self, pages: Int32Array) -> None:
        """Zero ``pages`` on all ranks. Of rank 0."""
        self.group.send(pages)
        super().clear_pages(pages)

    def _forward(self, token_ids: torch.Tensor, batch: Batch) -> torch.Tensor:
        return decoder.forward(
            self.config, self._weights, token_ids, batch, self._keys, self._values, self._kernels, self.group.sum
        )

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        # All have them all, as a gather to one rank has no form that both backends know. The others sample greedily
        # from theirs, which nobody asks for.
        return self.group.gather(super()._logits(hidden), self._widths)


@dataclasses.dataclass(frozen=True, slots=True)
class Follower:
    """A model in the engine of a rank other than 0: it runs what it is sent."""

    runner: GroupRunner
    plan: MemoryPlan
    loaded: LoadedModel
