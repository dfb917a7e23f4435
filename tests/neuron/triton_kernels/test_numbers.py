"""The kernels' numbers, in Triton's interpreter: in a process of its own, which must see TRITON_INTERPRET first."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


def interpret(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-P", "-m", "neuron.triton_kernels.check", "--numbers", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


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
        "from neuron.triton_kernels import activation, check\n"
        "operation = activation.gated_activation\n"
        "right = operation.eager\n"
        "operation.eager = lambda *given: right(*given) * 1.2\n"
        "raise SystemExit(check.check_numbers('activation'))\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "FAIL gated activation" in done.stdout
