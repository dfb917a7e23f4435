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


def test_rows_of_nan_scores_get_experts() -> None:
    """All entries of the order are written, or the experts' matmuls would use rows of other sequences.

    The interpreter's argmax is numpy's, which finds a NaN; a GPU's reduction compares, and every comparison is false.
    """
    code = (
        "import numpy\n"
        "import torch\n"
        "def argmax(values, axis, keepdims):\n"
        "    best, *others = numpy.moveaxis(values, axis, 0)\n"
        "    found = numpy.zeros(best.shape, numpy.int64)\n"
        "    for at, other in enumerate(others, 1):\n"
        "        kept = (best > other) | (best == other)\n"
        "        best, found = numpy.where(kept, best, other), numpy.where(kept, found, at)\n"
        "    return found\n"
        "numpy.argmax = argmax\n"
        "from neuron.triton_kernels.moe_routing import Picks, route\n"
        "from neuron.triton_kernels import moe_routing\n"
        "empty = torch.empty\n"
        "moe_routing.torch.empty = lambda *shape, **how: empty(*shape, **how).fill_(-7)\n"
        "for picks in (Picks(3), Picks(2, sigmoid=True, num_groups=4, top_groups=2), Picks(8)):\n"
        "    for bad in (float('nan'), float('inf'), -float('inf')):\n"
        "        scores = torch.randn(9, 8, generator=torch.Generator().manual_seed(1))\n"
        "        clean = route.triton(scores.half(), picks)\n"
        "        scores[2], scores[5, 1], scores[7, :4] = bad, float('nan'), bad\n"
        "        found = route.triton(scores.half(), picks)\n"
        "        pairs = 9 * picks.choices\n"
        "        assert found.order.sort().values.tolist() == list(range(pairs)), found.order\n"
        "        assert found.starts[0] == 0 and found.starts[-1] == pairs and (found.starts.diff() >= 0).all()\n"
        "        kept = [row for row in range(9) if row not in (2, 5, 7)]\n"
        "        by_row = lambda routing: routing.weights.view(9, -1)[kept]\n"
        "        assert torch.equal(by_row(found), by_row(clean))\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
