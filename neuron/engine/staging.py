"""Arrays to a device and back without waiting for it: by pinned memory, in line with what is queued.

A copy from or to other memory waits until all that is queued is done, the step launched ahead included. torch keeps
pinned memory that is let go of until the copy that reads it is done.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch

ALIGNED: Final = 16
"""Bytes that each array begins at a multiple of, as kernels are compiled for."""

Array = np.ndarray[Any, np.dtype[Any]]


def to_device(array: Array, device: torch.device) -> torch.Tensor:
    """Return ``array`` on ``device``; on a CPU it is the same memory."""
    if device.type == "cpu":
        return torch.from_numpy(array)
    # torch copies what has gaps by way of memory that is not pinned.
    return torch.from_numpy(np.ascontiguousarray(array)).pin_memory().to(device, non_blocking=True)


def together(arrays: Sequence[Array], device: torch.device) -> list[torch.Tensor]:
    """Return several arrays on ``device``, by one copy."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    sizes = [-(-array.nbytes // ALIGNED) * ALIGNED for array in arrays]
    ends = np.cumsum(sizes).tolist()
    packed = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=True)
    for array, end, size in zip(arrays, ends, sizes, strict=True):
        place = packed[end - size : end - size + array.nbytes].view(torch.from_numpy(array).dtype)
        place.copy_(torch.from_numpy(array).reshape(-1))
    there = packed.to(device, non_blocking=True)
    return [
        there[end - size : end - size + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        for array, end, size in zip(arrays, ends, sizes, strict=True)
    ]


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` on the host, where it is once the device has come so far."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
