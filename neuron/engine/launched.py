"""What an executor makes of a plan: a step that runs, and what comes of it.

``launch(plan)`` of an executor returns a :class:`Launched`; the step may still run on the device then, where what it
sampled stays for the next one. Waiting for it brings the outcome to the host.
"""

import dataclasses
from typing import Any, Final, Protocol

import numpy as np
import torch

from neuron.device.jobs import TokenLogprobs
from neuron.engine.plan import StepPlan
from neuron.engine.sampler import LogprobReport, Sampler
from neuron.engine.sequence import Float32Array, Int32Array
from neuron.models.config import ModelConfig

NO_ROUNDS: Final[Int32Array] = np.empty((0, 0), np.int32)


@dataclasses.dataclass(frozen=True, slots=True)
class StepOutcome:
    """The outcome of a step of B sequences, R sampled rows and E rows wanted as they are."""

    ids: Int32Array
    """``[R]``, NON_FINITE for a row whose logits are not."""
    finite: np.ndarray[Any, np.dtype[np.bool_]]
    """``[B]``: whether all that a sequence's last row comes from is. A NaN anywhere before reaches it by attention."""
    hidden: Float32Array
    """``[E, hidden]``"""
    logprobs: dict[int, TokenLogprobs]
    """Of those rows of R that asked for them."""
    later: Int32Array = dataclasses.field(default_factory=lambda: NO_ROUNDS)
    """``[N - 1, R]``: what the rounds after the first sampled, if there were any. A row that is not finite, or has
    sampled a stop, has none after it; ``finite`` is of the last."""


class Launched(Protocol):
    """A step under way."""

    def wait(self) -> StepOutcome:
        """Return the outcome once it is there."""


class Executor(Protocol):
    """Runs the steps of one model: eager, graphs, or native."""

    config: ModelConfig
    sampler: Sampler
    overlaps: bool
    """Whether a step is launched before the outcome of the one before it is known."""
    repeats: bool
    """Whether it does a step of several rounds, if everyone draws plainly."""

    def launch(self, plan: StepPlan) -> Launched:
        """Begin a step."""

    def clear_pages(self, pages: Int32Array) -> None:
        """Zero ``pages``, so that a NaN in them cannot reach the next sequence they are given to."""


@dataclasses.dataclass(frozen=True, slots=True)
class HostStep:
    """A step that is done: its outcome is on the host."""

    outcome: StepOutcome

    def wait(self) -> StepOutcome:
        """Return the outcome."""
        return self.outcome


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceStep:
    """A step whose outcome is computed on a device."""

    ids: torch.Tensor
    finite: torch.Tensor
    hidden: torch.Tensor
    report: LogprobReport | None

    def wait(self) -> StepOutcome:
        """Copy the outcome to the host, which waits for the device."""
        return StepOutcome(
            self.ids.cpu().numpy(),
            self.finite.cpu().numpy(),
            self.hidden.cpu().numpy(),
            {} if self.report is None else self.report.rows(),
        )
