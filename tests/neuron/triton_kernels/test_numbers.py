"""The kernels' numbers, in Triton's interpreter: in a process of its own, which must see TRITON_INTERPRET first."""

import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SUPPORT = pathlib.Path(__file__).parents[2] / "support"
PATH = os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])
ENVIRONMENT = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": PATH}


def interpret(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", SUPPORT / "kernel_check.py", "--numbers", *arguments]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)


# One case of each kernel; `make check-kernels` runs them all.
@pytest.mark.parametrize(
    "part",
    [
        *(
            "rms norm",
            "gated norm",
            "gated activation",
            "rope and",
            "H4 K4 D80",
            "causal convolution",
            "gated delta",
            "replay",
        ),
        *("skinny", "matmul of floats", "quantized matmul Q2_K", "quantized matmul NVFP4"),
    ],
)
def test_numbers(part: str) -> None:
    done = interpret("--only", part)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 cases" not in done.stdout


def test_the_check_sees_a_wrong_number() -> None:
    code = (
        "import kernel_check\n"
        "from neuron.triton_kernels import activation\n"
        "operation = activation.gated_activation\n"
        "right = operation.eager\n"
        "operation.eager = lambda *given: right(*given) * 1.2\n"
        "raise SystemExit(kernel_check.check_numbers('activation'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "FAIL gated activation" in done.stdout
