"""The bench of a GPU goes through, without one: in the interpreter, and through the tests' driver."""

import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton")

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_a_rehearsal_fills_every_table() -> None:
    command = [sys.executable, "-P", str(ROOT / "bench" / "gpu" / "run.py"), "--rehearse"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=230, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "failed" not in run.stdout
    tables = run.stdout.split("copy GB/s: ")
    assert len(tables) == 11, "ten tables"
    assert all(len(table.splitlines()) > 3 for table in tables[:-1])
    assert run.stdout.count("multi-step") == 3


def test_without_a_gpu_nothing_is_measured() -> None:
    command = [sys.executable, "-P", str(ROOT / "bench" / "gpu" / "run.py"), "--keep"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (run.returncode, run.stdout) == (0, "skipped: no CUDA device\n")
