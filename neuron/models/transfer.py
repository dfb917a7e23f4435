"""Copies from host memory to a device, through alternating pinned buffers.

A copy from pageable memory goes through the driver's own staging buffer, at a fraction of the bus's rate and with the
host waiting. Here the host fills one pinned buffer, with conversion, while the device reads the other.
"""

import warnings
from collections.abc import Callable
from typing import Any, Final, Protocol

import numpy as np
import torch

BUFFER_BYTES: Final = 32 << 20
"""Size of a buffer: large enough to hide the start of a copy (32 MiB take 0.6 ms at 55 GB/s)."""
NUM_BUFFERS: Final = 2


class Event(Protocol):
    """Interface of ``torch.cuda.Event``."""

    def record(self) -> None:
        """Mark this point of the device's work."""

    def synchronize(self) -> None:
        """Wait until the device is past the mark; return at once if there is none."""


def from_file(packed: np.ndarray[Any, np.dtype[np.uint8]]) -> torch.Tensor:
    """Return a mapped file's bytes as a tensor of the same memory, to be read only."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about memory that is not writable
        return torch.from_numpy(packed)


def _pinned(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


class Transfer:
    """Copier to a device. A CPU needs no buffers: its copy is one pass."""

    def __init__(
        self,
        device: torch.device,
        *,
        buffer_bytes: int = BUFFER_BYTES,
        allocate: Callable[[int], torch.Tensor] = _pinned,
        event: Callable[[], Event] = torch.cuda.Event,
    ) -> None:
        self._buffers: list[tuple[torch.Tensor, Event]] = []
        self._next = 0
        if device.type == "cuda":
            self._buffers = [(allocate(buffer_bytes), event()) for _ in range(NUM_BUFFERS)]

    def copy(self, source: torch.Tensor, destination: torch.Tensor) -> None:
        """Copy ``source``, on the host, into contiguous ``destination`` of the same shape and any dtype.

        The copy is ordered before later work of the current stream; ``source`` is free on return.
        """
        if source.shape != destination.shape:
            raise ValueError(f"a copy from {list(source.shape)} to {list(destination.shape)}")
        if not self._buffers:
            destination.copy_(source)
            return
        flat = destination.view(-1)
        rows = source.view(-1, 1) if source.is_contiguous() else source.reshape(-1, source.shape[-1])
        width = rows.shape[1]
        step = max(1, len(self._buffers[0][0]) // destination.element_size() // width)
        for start in range(0, len(rows), step):
            piece = rows[start : start + step]
            buffer, event = self._buffers[self._next]
            self._next = (self._next + 1) % len(self._buffers)
            event.synchronize()
            staged = buffer[: piece.numel() * destination.element_size()].view(destination.dtype)
            staged.view(piece.shape).copy_(piece)
            flat[start * width :][: piece.numel()].copy_(staged, non_blocking=True)
            event.record()


ON_HOST: Final = Transfer(torch.device("cpu"))
