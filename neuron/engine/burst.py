"""How many rounds a step of decodes has: several are one call of an executor that can, a *burst*.

Between two steps the engine is in Python, for 0.2 to 0.5 ms that a small model on a CPU would have computed in. A burst
spares that where each round follows from the one before it without the engine: everyone's token comes of the logits
alone. What it costs is that tokens come together, so it is short; and whatever the engine must see ends it: a row that
has its last token, a number that is none, a message of the daemon. Where steps overlap, that hides the host behind long
ones better than a burst does, so there only short ones come in bursts.
"""

from collections.abc import Callable, Collection
from typing import Final

import numpy as np

from neuron.engine.sampler import BoolArray
from neuron.engine.scheduler import Step
from neuron.engine.sequence import Int32Array, Sequence
from neuron.triton_kernels.round_state import MAX_STOPS

BURST_S: Final = 0.016
"""How long a burst may be: a frame of a screen, within which nobody sees what came first."""
HOST_BOUND: Final = 1.1
"""Where steps overlap, one that takes less than so many times the host's own part of it waits for the host."""


def qualifies(sequences: Collection[Sequence], draws_plainly: Callable[[Int32Array], BoolArray]) -> bool:
    """Return whether each of ``sequences`` can go on without the engine: everyone's token comes of the logits alone."""
    if any(sequence.constraint is not None or len(sequence.eos) > MAX_STOPS for sequence in sequences):
        return False
    return bool(draws_plainly(np.array([sequence.slot for sequence in sequences], np.int32)).all())


def is_worth_it(round_s: float | None, host_s: float) -> bool:
    """Return whether overlapped steps of ``round_s`` seconds should rather be bursts.

    Overlap hides the host's ``host_s`` behind a longer step, entirely; behind a shorter one the device waits.
    """
    return round_s is not None and round_s < HOST_BOUND * host_s


def num_rounds(
    step: Step,
    round_s: float | None,
    most: int,
    draws_plainly: Callable[[Int32Array], BoolArray],
    make_room: Callable[[Sequence, int], int],
) -> int:
    """Return how often to do ``step``, of which one round takes ``round_s`` seconds, if that is known.

    Nobody's output ends before the last round, unless by a stop token. ``draws_plainly`` is asked of slots,
    ``make_room`` reserves pages for so many tokens behind a sequence's next and returns how many there are.
    """
    if round_s is None or step.num_decodes != len(step.sequences):
        return 1
    count = min(int(BURST_S / round_s), most)
    if count < 2 or not qualifies(step.sequences, draws_plainly):
        return 1
    for sequence in step.sequences:
        if count < 2:
            return 1
        count = min(count, 1 + make_room(sequence, count - 1))
    return count
