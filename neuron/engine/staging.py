"""Asynchronous copies of arrays to a device and back, through pinned memory, in the order of the stream.

A copy from or to other memory waits for all queued work, the step launched ahead included. torch keeps released pinned
memory until the copy that reads it is done.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch

ALIGNED: Final = 16
"""Alignment of each array in bytes, for which kernels are compiled."""

Array = np.ndarray[Any, np.dtype[Any]]


def to_device(array: Array, device: torch.device) -> torch.Tensor:
    """Return ``array`` on ``device``; on a CPU it is the same memory."""
    if device.type == "cpu":
        return torch.from_numpy(array)
    # torch copies strided arrays through memory that is not pinned.
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
    """Return ``tensor`` on the host, valid once the device has reached the copy."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
