"""RMS norm of each head, multiplied by a gate: ``y = x / sqrt(mean(x^2) + eps) * weight * silu(gate)``.

The norm is cast before its weight, and the product with the gate is in float32, as in Qwen3-Next's models.
"""

import torch
from torch.nn import functional

from neuron.triton_kernels.operation import Operation


@Operation
def gated_norm(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return ``y`` ``[T, H D]`` of ``x`` and ``gate`` ``[T, H D]``, and ``weight`` ``[D]``."""
    heads = x.unflatten(-1, (-1, len(weight)))
    normed = functional.rms_norm(heads, (len(weight),), None, eps) * weight
    return (normed * functional.silu(gate.float()).view(heads.shape)).to(x.dtype).flatten(1)
