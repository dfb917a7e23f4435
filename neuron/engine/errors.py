"""What can go wrong with one sequence, and how torch's exceptions become ours."""

import re
from typing import Final

import msgspec
import torch

from cortex.wire.errors import ApiError, ErrorInfo, UnavailableError
from neuron.device.driver import DeviceFault


class EngineError(ApiError):
    """The engine failed this sequence; the others go on."""

    code = "engine_error"


class NonFiniteLogitsError(EngineError):
    """The model's output for this sequence holds a NaN or an infinity."""

    code = "non_finite_logits"

    def __init__(self, model: str) -> None:
        super().__init__(f"model {model!r} computed a NaN or an infinity for this sequence")


class OutOfMemoryError(UnavailableError):
    """The device ran out of memory in this step."""

    code = "out_of_memory"


class GroupLostError(UnavailableError):
    """A rank of the model's group is gone or does not answer."""

    code = "group_lost"


# What torch and Triton raise for driver and library faults, beside torch.AcceleratorError. A failed allocation is none.
FAULTS: Final = re.compile(
    r"CUDA error|CUDNN_STATUS_|CUBLAS_STATUS_(?!NOT_SUPPORTED|ALLOC_FAILED)|NCCL error|cudaError"
    r"|Triton Error \[CUDA\]"
)


def _ran_out(error: Exception) -> bool:
    """Return whether ``error`` says that there was no memory: torch's, Python's, or Triton's for a kernel's module."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and str(error).startswith("Triton Error [CUDA]: out of memory")
    )


def raise_device_fault(error: Exception) -> None:
    """Raise :class:`DeviceFault` if ``error`` says that the device's context is lost; return if it does not.

    An exception of one request must not poison a device, and a lost context must never answer again.
    """
    if isinstance(error, DeviceFault):
        raise error
    if isinstance(error, GroupLostError):
        # The ranks no longer run the same step, so all their workers are replaced.
        raise DeviceFault("group", -1, error.message) from error
    if _ran_out(error):
        return
    known = getattr(torch, "AcceleratorError", ())
    if (known and isinstance(error, known)) or (isinstance(error, RuntimeError) and FAULTS.search(str(error))):
        code = getattr(error, "error_code", None)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DeviceFault("torch", code if isinstance(code, int) else -1, reason) from error


def error_info(error: Exception) -> ErrorInfo:
    """Return what a client is told of ``error``."""
    if isinstance(error, ApiError):
        return error.info()
    if _ran_out(error):
        return OutOfMemoryError(f"out of device memory: {error}", retry_after_s=1.0).info()
    found = EngineError(f"{type(error).__name__}: {error}").info()
    # Errors of the kernels know no wire, but have a code.
    code = getattr(error, "code", None)
    return msgspec.structs.replace(found, code=code) if isinstance(code, str) else found
