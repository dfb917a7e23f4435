"""Declaration of operations and launches."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch

from neuron.triton_kernels.launch import launch, recording, target_for
from neuron.triton_kernels.norm import _rms_norm_kernel
from neuron.triton_kernels.operations import EAGER, KERNELS, Operations

UNIT = '''
"""``y = factor x``."""

import torch

from neuron.triton_kernels._triton import tl, triton
from neuron.triton_kernels.launch import launch
from neuron.triton_kernels.operation import Make, Operation, Run


@Operation
def scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
    """Return ``factor x`` ``[T]``."""
    return x * factor


@triton.jit(do_not_specialize=["factor"])
def _kernel(x, out, size, factor, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < size).to(tl.float32) * factor
    tl.store(out + i, value.to(out.dtype.element_ty), mask=i < size)


@scaled.launcher
def _launch(x: torch.Tensor, factor: float) -> torch.Tensor:
    out = torch.empty_like(x)
    launch(_kernel, (-(-len(x) // 16),), x=x, out=out, size=len(x), factor=FACTOR, BLOCK=16)
    return out


@scaled.cases()
def _cases(check: Run, make: Make) -> None:
    check(make(77), 3.0)
'''


@pytest.mark.parametrize(("factor", "failed"), [("factor", 0), ("2.0", 6)])
def test_the_check_finds_an_operation_by_its_file_alone(tmp_path: pathlib.Path, factor: str, failed: int) -> None:
    pytest.importorskip("triton")
    (tmp_path / "scaled.py").write_text(UNIT.replace("FACTOR", factor))
    code = "import kernel_check, scaled; kernel_check.check_numbers('scaled')"
    support = str(pathlib.Path(__file__).parents[2] / "support")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), support, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert f"numbers: 6 cases, {failed} failed" in done.stdout


def test_operations_are_bound_to_a_form() -> None:
    operation = Operations.__dict__["rms_norm"]
    assert EAGER.rms_norm is operation.eager
    assert KERNELS.rms_norm is operation.triton
    assert Operations.rms_norm is operation


def test_a_launch_names_the_parameters_of_its_kernel() -> None:
    x = torch.empty(3, 16, device="meta")
    given = {"x": x, "weight": x[0], "out": x, "x_stride": 16, "hidden": 16, "eps": 1e-6, "BLOCK": 16}
    with recording(target_for(90)) as recorded:
        launch(_rms_norm_kernel, (3,), **given)
        with pytest.raises(TypeError, match="_rms_norm_kernel has no parameter residual"):
            launch(_rms_norm_kernel, (3,), residual=x, **given)
        with pytest.raises(KeyError, match="eps"):
            launch(_rms_norm_kernel, (3,), **{name: value for name, value in given.items() if name != "eps"})
    assert len(recorded) == 1
