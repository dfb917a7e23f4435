"""What can go wrong with one sequence, and how torch's exceptions become ours."""

import re
from typing import Final

import msgspec
import torch

from cortex.wire.errors import ApiError, ErrorInfo, UnavailableError
from neuron.device.driver import DeviceFault, DriverError


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


# What torch and Triton raise for driver and library faults, beside torch.AcceleratorError.
FAULTS: Final = re.compile(r"CUDA error|CUDNN_STATUS_|NCCL error|cudaError|Triton Error \[CUDA\]")
NO_FAULTS: Final = re.compile(r"CU(?:BLAS|DNN)_STATUS_NOT_SUPPORTED|Triton Error \[CUDA\]: .*captur")
"""What of that is none: an operation that is not there, and work against the rules of a capture."""
NO_MEMORY: Final = re.compile(r"(?:CUDA error|Triton Error \[CUDA\]): out of memory|CU(?:BLAS|DNN)_STATUS_ALLOC_FAILED")
OUT_OF_MEMORY: Final = 2
"""The code of it in CUDA's driver, and in its runtime."""
CAPTURE_ERRORS: Final = range(900, 909)
"""cudaErrorStreamCaptureUnsupported to -WrongThread: something was against the rules of a capture."""


def ran_out(error: Exception) -> bool:
    """Return whether ``error`` says that there was no memory, of the host or the device: neither is worse for it."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, (torch.AcceleratorError, DriverError)) and _code(error) == OUT_OF_MEMORY:
        return True
    return isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)) is not None


def raise_device_fault(error: Exception) -> None:
    """Raise :class:`DeviceFault` if ``error`` says that the device's context is lost; return if it does not.

    An exception of one request must not poison a device, and a lost context must never answer again.
    """
    if isinstance(error, DeviceFault):
        raise error
    if isinstance(error, GroupLostError):
        # The ranks no longer run the same step, so all their workers are replaced.
        raise DeviceFault("group", -1, error.message) from error
    if ran_out(error) or not isinstance(error, RuntimeError) or _code(error) in CAPTURE_ERRORS:
        return
    if isinstance(error, torch.AcceleratorError) or (FAULTS.search(str(error)) and not NO_FAULTS.search(str(error))):
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DeviceFault("torch", _code(error), reason) from error


def _code(error: Exception) -> int:
    """Return CUDA's code of an error of torch's or of the driver; -1 where it has none."""
    code = error.code if isinstance(error, DriverError) else getattr(error, "error_code", None)
    return code if isinstance(code, int) else -1


def error_info(error: Exception) -> ErrorInfo:
    """Return what a client is told of ``error``."""
    if isinstance(error, ApiError):
        return error.info()
    if ran_out(error):
        return OutOfMemoryError(f"out of device memory: {error}", retry_after_s=1.0).info()
    found = EngineError(f"{type(error).__name__}: {error}").info()
    # Errors of the kernels know no wire, but have a code.
    code = getattr(error, "code", None)
    return msgspec.structs.replace(found, code=code) if isinstance(code, str) else found
