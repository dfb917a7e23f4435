"""The bench's models on a stub GPU, small: calls into torch and the device loop that a rehearsal does not make."""

import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.stub_cuda

BENCH = pathlib.Path(__file__).parents[2] / "bench" / "gpu" / "run.py"


def test_a_first_look_at_a_gpu_fills_the_tables(environment: dict[str, str]) -> None:
    command = [sys.executable, "-P", str(BENCH), "--small", "--part", "models"]
    variables = {**os.environ, **environment}
    run = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=230, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert len(run.stdout.split("copy GB/s: ")) == 4, "three tables"
    assert run.stdout.count("multi-step") == 3
    assert "forbidden" not in run.stderr
