"""``pytest --benchmark``, as typed: the benchmarks, and nothing else."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
PYTEST = str(pathlib.Path(sys.executable).with_name("pytest"))


def pytest_run(*arguments: str) -> str:
    """Run pytest as in a shell whose environment is not activated."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": os.environ.get("HOME", "/")}
    done = subprocess.run(
        [PYTEST, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_collects_the_benchmarks_alone() -> None:
    collected = [line for line in pytest_run("--benchmark", "--collect-only", "-q").splitlines() if "::" in line]
    assert len(collected) > 10
    assert all(line.startswith("bench/") for line in collected)


def test_every_benchmark_runs() -> None:
    """For a moment each: they run nowhere else."""
    quick = "--benchmark-max-time=0.001", "--benchmark-min-rounds=1", "-p", "no:cacheprovider"
    printed = pytest_run("--benchmark", *quick)
    assert "Name (time in" in printed
    assert "skipped" not in printed.splitlines()[-1]
