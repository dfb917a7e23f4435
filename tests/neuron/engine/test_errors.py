"""The exceptions of torch and of the driver that are no device faults."""

import re

import pytest
import torch
from capture_rig import cuda_error

from neuron.device.driver import DriverError
from neuron.engine.errors import raise_device_fault, ran_out

NO_FAULTS = [
    ValueError("CUDA error"),
    RuntimeError("shape mismatch"),
    torch.OutOfMemoryError("CUDA error"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    cuda_error(2, "out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmulAlgoGetHeuristic( ltHandle)`"),
    cuda_error(900, "operation not permitted when stream is capturing"),
    RuntimeError("Triton Error [CUDA]: operation failed due to a previous error during capture"),
    cuda_error(901, "operation failed due to a previous error during capture"),
    DriverError("cuGraphInstantiateWithFlags", 2, "CUDA_ERROR_OUT_OF_MEMORY"),
]


@pytest.mark.parametrize("error", NO_FAULTS, ids=str)
def test_other_exceptions_are_no_faults(error: Exception) -> None:
    raise_device_fault(error)


@pytest.mark.parametrize("error", NO_FAULTS, ids=str)
def test_out_of_memory_is_distinguished_from_faults(error: Exception) -> None:
    named = re.search("(?i)out.of.memory|ALLOC_FAILED", str(error)) or isinstance(error, torch.OutOfMemoryError)
    assert ran_out(error) == bool(named)
