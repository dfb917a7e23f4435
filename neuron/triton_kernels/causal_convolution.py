"""Causal convolution of each channel over the tokens of a sequence, and SiLU: a recurrent layer's view of neighbours.

``y_t = silu(sum_j w_j x_(t - W + 1 + j))`` with a width of W tokens. A sequence's last W - 1 inputs are kept, zeros
before its first token. Sums and SiLU are in float32.
"""

import torch
from torch.nn import functional

from neuron.triton_kernels.batch import Batch
from neuron.triton_kernels.operation import Operation


@Operation
def causal_convolution(x: torch.Tensor, weight: torch.Tensor, inputs: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return ``y`` ``[T, C]`` of ``x`` ``[T, C]`` and ``weight`` ``[C, W]``.

    ``inputs`` ``[slots, W - 1, C]`` keeps the last inputs of each sequence, oldest first, and is updated in place.
    """
    assert batch.state_slots is not None
    slots, kept = batch.state_slots.long(), inputs.shape[1]
    decodes, rows = batch.num_decodes, batch.cu_seqlens.tolist()
    seen = torch.cat((inputs[slots[:decodes]], x[:decodes, None]), dim=1)
    inputs[slots[:decodes]] = seen[:, 1:]
    parts = [_convolved(seen, weight)[:, 0]]
    for index in range(decodes, len(slots)):
        seen = torch.cat((inputs[slots[index]], x[rows[index] : rows[index + 1]]))
        inputs[slots[index]] = seen[len(seen) - kept :]
        parts.append(_convolved(seen, weight))
    return torch.cat(parts)


def _convolved(seen: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return ``[..., N, C]`` of ``[..., W - 1 + N, C]``."""
    width = weight.shape[1]
    count = seen.shape[-2] - width + 1
    total = sum(seen[..., j : j + count, :].float() * weight[:, j].float() for j in range(width))
    assert isinstance(total, torch.Tensor)
    return functional.silu(total).to(seen.dtype)
