"""Multi-step decode: the number of decode steps that an executor runs in one launch.

Between two launches the engine is in Python, for 0.2 to 0.5 ms in which a small model on a CPU could compute. Several
steps a launch save that where each follows from the one before it without the engine: every row's token comes from its
logits alone. The tokens arrive together, so the launch is kept short, and it ends with any event that the engine must
handle: a row's last token, a NaN, a message of the daemon. Where steps overlap, the host's time is hidden behind long
steps anyway, so there only short steps are launched together.
"""

from collections.abc import Callable, Collection
from typing import Final

import numpy as np

from neuron.engine.executor import Executor
from neuron.engine.scheduler import Step
from neuron.engine.sequence import Sequence
from neuron.engine.step_timer import StepTimer
from neuron.triton_kernels.decode_state import MAX_STOPS

MULTI_STEP_S: Final = 0.016
"""Longest multi-step decode: one frame of a screen, so that no reader sees its tokens come together."""
HOST_BOUND: Final = 1.1
"""Step time, relative to the host's work for it, below which the device waits for the host."""


def is_worth_it(step_s: float | None, host_s: float) -> bool:
    """Return whether multi-step decode beats overlapped steps of ``step_s`` seconds.

    Overlap hides the host's ``host_s`` behind a longer step, entirely; behind a shorter one the device waits.
    """
    return step_s is not None and step_s < HOST_BOUND * host_s


class MultiStep:
    """Decides the number of decode steps, up to ``max_steps``, in each launch of an executor."""

    def __init__(self, executor: Executor, step_timer: StepTimer, max_steps: int) -> None:
        self._executor = executor
        self._step_timer = step_timer
        self._max_steps = max_steps

    def allows(self, running: Collection[Sequence]) -> bool:
        """Return whether the next launch may be a multi-step decode of the ``running`` sequences.

        Where steps overlap this is decided before it is scheduled, as the step in flight must be settled first.
        """
        if min(self._executor.max_steps, self._max_steps) == 1:
            return False
        if not self._executor.overlaps:
            return True
        if not running or any(sequence.prefills for sequence in running):
            return False
        step_s = self._step_timer.step_s(len(running))
        return is_worth_it(step_s, self._step_timer.host_s) and self._qualifies(running)

    def num_steps(self, step: Step, reserve: Callable[[Sequence, int], int]) -> int:
        """Return the number of decode steps to launch as ``step``.

        No output ends before the last one, unless by a stop token. ``reserve`` reserves pages for so many tokens behind
        a sequence's next and returns how many there are.
        """
        step_s = self._step_timer.step_s(step.num_decodes)
        if step_s is None or step.is_single or step.num_decodes != len(step.sequences):
            return 1
        count = min(int(MULTI_STEP_S / step_s), self._executor.max_steps, self._max_steps)
        if count < 2 or not self._qualifies(step.sequences):
            return 1
        for sequence in step.sequences:
            if count < 2:
                return 1
            count = min(count, 1 + reserve(sequence, count - 1))
        return count

    def _qualifies(self, sequences: Collection[Sequence]) -> bool:
        """Return whether every sequence can go on without the engine: its token comes from its logits alone."""
        constraints = [s.constraint for s in sequences if s.constraint is not None]
        if any(each.free_tokens < self._executor.max_steps for each in constraints):
            return False
        if any(len(s.eos) > MAX_STOPS or s.num_replays for s in sequences):
            return False
        slots = np.array([sequence.slot for sequence in sequences], np.int32)
        return bool(self._executor.sampler.draws_plainly(slots).all())
