"""Choice of the operations' implementation for a device: Triton kernels on CUDA, eager torch elsewhere.

The setting ``triton_kernels`` turns Triton off, and a host without Triton gets eager torch with a warning. Importing
this module imports no Triton; :func:`operations_for` does, once, for the first CUDA device.
"""

import functools
import logging
from typing import Final

import torch

from neuron.triton_kernels.eager_operations import EagerOperations
from neuron.triton_kernels.operations import Operations

logger = logging.getLogger(__name__)

EAGER: Final = EagerOperations()


def operations_for(device: torch.device, dtype: torch.dtype, *, triton: bool = True) -> Operations:
    """Return the implementation for ``device``; float32 stays eager: the kernels would compute it as TF32."""
    if device.type != "cuda" or dtype == torch.float32 or not triton:
        return EAGER
    return _triton_operations() or EAGER


@functools.cache
def _triton_operations() -> Operations | None:
    try:
        from neuron.triton_kernels.triton_operations import TritonOperations
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        logger.warning("triton is not installed: the device runs eager torch, which is slow (pip install triton)")
        return None
    return TritonOperations()
