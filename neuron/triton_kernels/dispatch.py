"""Choice of the operations' form for a device: Triton kernels on CUDA, eager torch elsewhere.

The setting ``triton_kernels`` turns Triton off, and a host without Triton gets eager torch with a warning.
"""

import functools
import importlib.util
import logging

import torch

from neuron.triton_kernels.operations import EAGER, KERNELS, Operations

logger = logging.getLogger(__name__)


def operations_for(device: torch.device, dtype: torch.dtype, *, triton: bool = True) -> Operations:
    """Return the operations for ``device``; float32 stays eager: the kernels would compute it as TF32."""
    if device.type != "cuda" or dtype == torch.float32 or not triton or not _has_triton():
        return EAGER
    return KERNELS


@functools.cache
def _has_triton() -> bool:
    if importlib.util.find_spec("triton") is None:
        logger.warning("triton is not installed: the device runs eager torch, which is slow (pip install triton)")
        return False
    return True
