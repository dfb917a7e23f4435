"""Errors of a sequence, and the translation of torch's exceptions into them."""

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


FAULTS: Final = re.compile(r"CUDA error|CUDNN_STATUS_|NCCL error|cudaError|Triton Error \[CUDA\]")
"""Messages of torch and Triton for driver and library faults, beside torch.AcceleratorError."""
NO_FAULTS: Final = re.compile(r"CU(?:BLAS|DNN)_STATUS_NOT_SUPPORTED|Triton Error \[CUDA\]: .*captur")
"""Messages among these that are no faults: missing operations, and calls that a capture does not allow."""
NO_MEMORY: Final = re.compile(r"(?:CUDA error|Triton Error \[CUDA\]): out of memory|CU(?:BLAS|DNN)_STATUS_ALLOC_FAILED")
OUT_OF_MEMORY: Final = 2
"""Error code of CUDA's driver and of its runtime."""
CAPTURE_ERRORS: Final = range(900, 909)
"""cudaErrorStreamCaptureUnsupported to -WrongThread: a call that a capture does not allow."""


def ran_out(error: Exception) -> bool:
    """Return whether ``error`` is a failed allocation on the host or the device, which harms neither."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, (torch.AcceleratorError, DriverError)) and _code(error) == OUT_OF_MEMORY:
        return True
    return isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)) is not None


def raise_device_fault(error: Exception) -> None:
    """Raise :class:`DeviceFault` if ``error`` means that the device's context is lost.

    An exception of one request must not poison a device, and a lost context must not be used again.
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
    """Return the CUDA code of an error of torch or of the driver; -1 where it has none."""
    code = error.code if isinstance(error, DriverError) else getattr(error, "error_code", None)
    return code if isinstance(code, int) else -1


def error_info(error: Exception) -> ErrorInfo:
    """Return ``error`` as it is sent to the client."""
    if isinstance(error, ApiError):
        return error.info()
    if ran_out(error):
        return OutOfMemoryError(f"out of device memory: {error}", retry_after_s=1.0).info()
    found = EngineError(f"{type(error).__name__}: {error}").info()
    # Errors of the kernels are no ApiError, but have a code.
    code = getattr(error, "code", None)
    return msgspec.structs.replace(found, code=code) if isinstance(code, str) else found
