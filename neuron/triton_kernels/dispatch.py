"""Which implementation of the operations a device gets: Triton kernels on CUDA, eager torch elsewhere.

``NEURON_TRITON=off`` forces eager torch everywhere, and a host without Triton gets it with a warning. Importing this
module imports no Triton; :func:`operations_for` does, once, for the first CUDA device.

Both implementations have the operations of a decoder's layer, fused as far as a kernel fuses them, so that the forward
pass is written once: the eager ones are compositions of :mod:`neuron.triton_kernels.reference`.
"""

import functools
import logging
import os
from typing import Final, Protocol

import torch

from neuron.triton_kernels import reference
from neuron.triton_kernels.batch import Batch

logger = logging.getLogger(__name__)

SKINNY_ROWS: Final = 64
"""Up to this many rows the weights' bytes are what a projection costs."""

Rotary = tuple[torch.Tensor, torch.Tensor]
Norm = tuple[torch.Tensor, float]


class Operations(Protocol):
    """What a decoder's layer is made of; shapes as in :mod:`neuron.triton_kernels.reference`."""

    def normed_linear(
        self, x: torch.Tensor, norm: Norm, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return ``norm(x) weight^T + bias``."""

    def normed_mlp_in(self, x: torch.Tensor, norm: Norm, gate_up: torch.Tensor) -> torch.Tensor:
        """Return ``silu(gate) * up`` of ``norm(x) gate_up^T``."""

    def add_linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
    ) -> None:
        """Add ``x weight^T + bias`` to ``residual`` in place."""

    def attention(
        self,
        qkv: torch.Tensor,
        qk_norm: torch.Tensor | None,
        eps: float,
        rotary: Rotary,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: Batch,
        scale: float,
    ) -> torch.Tensor:
        """Norm and rotate heads, write keys and values, and attend: ``[T, H D]``."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Return ``x`` normalised."""

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return ``x weight^T``."""


class EagerOperations:
    """The operations in eager torch."""

    def normed_linear(
        self, x: torch.Tensor, norm: Norm, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return ``norm(x) weight^T + bias``."""
        return reference.matmul(reference.rms_norm(x, *norm), weight, bias)

    def normed_mlp_in(self, x: torch.Tensor, norm: Norm, gate_up: torch.Tensor) -> torch.Tensor:
        """Return ``silu(gate) * up`` of ``norm(x) gate_up^T``."""
        return reference.silu_and_mul(reference.matmul(reference.rms_norm(x, *norm), gate_up))

    def add_linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
    ) -> None:
        """Add ``x weight^T + bias`` to ``residual`` in place."""
        residual.add_(reference.matmul(x, weight, bias))

    def attention(
        self,
        qkv: torch.Tensor,
        qk_norm: torch.Tensor | None,
        eps: float,
        rotary: Rotary,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: Batch,
        scale: float,
    ) -> torch.Tensor:
        """Norm and rotate heads, write keys and values, and attend: ``[T, H D]``."""
        q = reference.rope_and_cache(qkv, qk_norm, eps, rotary, batch.slots, key_cache, value_cache)
        return reference.paged_attention(q, key_cache, value_cache, batch, scale)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Return ``x`` normalised."""
        return reference.rms_norm(x, weight, eps)

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return ``x weight^T``."""
        return reference.matmul(x, weight)


EAGER: Final = EagerOperations()


def operations_for(device: torch.device, dtype: torch.dtype) -> Operations:
    """Return what runs on ``device``. Float32 stays eager: the kernels' matrix units would make TF32 of it."""
    if device.type != "cuda" or dtype == torch.float32 or os.environ.get("NEURON_TRITON") == "off":
        return EAGER
    return _triton_operations() or EAGER


@functools.cache
def _triton_operations() -> Operations | None:
    try:
        from neuron.triton_kernels.operations import TritonOperations
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        logger.warning("triton is not installed: the device runs eager torch, which is slow (pip install triton)")
        return None
    return TritonOperations()
