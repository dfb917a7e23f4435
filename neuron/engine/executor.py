"""The executor interface: a plan is launched as a step in flight, which is waited for.

``launch(plan)`` returns an :class:`InFlightStep` while the step may still run on the device; the tokens that it samples
stay there for the next step. ``wait`` brings the outcome to the host.
"""

import dataclasses
from typing import Any, Final, Protocol

import numpy as np
import torch

from neuron.device.jobs import TokenLogprobs
from neuron.engine.plan import StepPlan
from neuron.engine.sampler import LogprobReport, Sampler
from neuron.engine.sequence import Float32Array, Int32Array
from neuron.engine.staging import to_host
from neuron.layers.cache import AHEAD_TOKENS
from neuron.models.model import ModelConfig

MAX_STEPS: Final = AHEAD_TOKENS
"""Most steps of a multi-step decode: the shortest on a GPU takes a quarter of a millisecond."""
NO_LATER: Final[Int32Array] = np.empty((0, 0), np.int32)


@dataclasses.dataclass(frozen=True, slots=True)
class StepOutcome:
    """Outcome of a step of B sequences, R sampled rows and E rows of hidden states."""

    ids: Int32Array
    """``[R]``, NON_FINITE for a row whose logits are not finite."""
    finite: np.ndarray[Any, np.dtype[np.bool_]]
    """``[B]``: whether a sequence's last row is finite. A NaN anywhere before reaches it by attention."""
    hidden: Float32Array
    """``[E, hidden]``"""
    logprobs: dict[int, TokenLogprobs]
    """Log probabilities of the rows of R that want them."""
    later: Int32Array = dataclasses.field(default_factory=lambda: NO_LATER)
    """``[N - 1, R]``: the tokens of the steps after the first, if there were any. A row that is not finite, or has
    sampled a stop, has none after it; ``finite`` is the last step's."""

    def wait(self) -> "StepOutcome":
        """Return it: a step that is computed while it is launched is its own :class:`InFlightStep`."""
        return self


class InFlightStep(Protocol):
    """A launched step whose outcome may not be known yet."""

    def wait(self) -> StepOutcome:
        """Return the outcome once it is there."""


class Executor(Protocol):
    """Executor of one model's steps, on its caches: eager, by graphs, native, or on several ranks."""

    config: ModelConfig
    sampler: Sampler
    overlaps: bool
    """Whether a step is launched before the outcome of the one before it is known."""
    max_steps: int
    """Most decode steps of one launch, where every row draws plainly."""

    def launch(self, plan: StepPlan) -> InFlightStep:
        """Begin a step."""

    def clear(self, tables: tuple[Int32Array, ...]) -> None:
        """Zero pages of each of its tables, so that a NaN in them cannot reach the next sequence that gets them.

        Behind the tables may be state slots.
        """

    def close(self) -> None:
        """Release what it holds beside memory: graphs, the other ranks."""


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceStep:
    """A step whose outcome is copied to the host asynchronously, see :meth:`behind`."""

    ids: torch.Tensor
    finite: torch.Tensor
    hidden: torch.Tensor
    report: LogprobReport | None
    done: torch.cuda.Event | None

    @classmethod
    def behind(
        cls, ids: torch.Tensor, finite: torch.Tensor, hidden: torch.Tensor, report: LogprobReport | None
    ) -> "DeviceStep":
        """Queue the copies of an outcome behind its kernels, and ahead of the next launch."""
        found = to_host(ids), to_host(finite), to_host(hidden)
        done = torch.cuda.current_stream().record_event() if ids.device.type == "cuda" else None
        return cls(*found, report, done)

    def wait(self) -> StepOutcome:
        """Return the outcome, without waiting for later launches."""
        if self.done is not None:
            self.done.synchronize()
        return StepOutcome(
            self.ids.numpy(),
            self.finite.numpy(),
            self.hidden.numpy(),
            {} if self.report is None else self.report.rows(),
        )
