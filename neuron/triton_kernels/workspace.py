"""Arrival counters, which outlive a launch, of kernels that split one result over several programs.

The programs of a split kernel store partial results and increment a counter, and the last to arrive adds all parts in
their order: one kernel instead of two (about 1.2 us a dependent node in a graph), and the same sum each time, which
float atomics would not give. The last to arrive resets the counter to zero for the next launch.

They are one array a device, so kernels that use them must be on one stream: a device has one worker with one stream.
"""

import functools
from typing import Final

import torch

NUM_COUNTERS: Final = 1 << 16


@functools.cache
def _counters(device: torch.device) -> torch.Tensor:
    return torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=device)


def counters(device: torch.device, needed: int) -> torch.Tensor:
    """Return the device's counters, at least ``needed`` of them, all zero."""
    if needed > NUM_COUNTERS:
        raise ValueError(f"a launch needs {needed} arrival counters; there are {NUM_COUNTERS}")
    if device.type == "meta":
        return torch.empty(NUM_COUNTERS, dtype=torch.int32, device=device)
    return _counters(device)
