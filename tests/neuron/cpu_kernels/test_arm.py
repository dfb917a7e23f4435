"""The kernels built for Arm with Debian's cross compiler, and run in an emulator: NEON beside portable C.

Needs gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user-static; skipped where they are not.
"""

import pathlib
import shutil
import subprocess

import pytest

COMPILER = shutil.which("aarch64-linux-gnu-gcc")
EMULATOR = shutil.which("qemu-aarch64-static")
KERNELS = pathlib.Path(__file__).parents[3] / "neuron" / "cpu_kernels"
FLAGS = ["-O2", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Werror", "-DNEURON_ARM64", f"-I{KERNELS}"]
LEVELS = {"portable": [], "neon_dotprod": ["-march=armv8.2-a+dotprod"]}


@pytest.mark.skipif(COMPILER is None or EMULATOR is None, reason="no cross compiler and emulator for Arm")
def test_neon_results_equal_portable_c(tmp_path: pathlib.Path) -> None:
    assert COMPILER is not None
    assert EMULATOR is not None
    objects = []
    for level, flags in LEVELS.items():
        for name in ("activation", "attention", "delta", "draw", "matmul", "table"):
            objects.append(str(tmp_path / f"{level}_{name}.o"))
            source = [f"-DNEURON_LEVEL={level}", "-c", str(KERNELS / f"{name}.c"), "-o", objects[-1]]
            subprocess.run([COMPILER, *FLAGS, *flags, *source], check=True)
    program = str(tmp_path / "levels")
    sources = [str(pathlib.Path(__file__).with_name("levels.c")), str(KERNELS / "dispatch.c")]
    subprocess.run([COMPILER, *FLAGS, "-static", *sources, *objects, "-lm", "-o", program], check=True)
    run = subprocess.run([EMULATOR, "-cpu", "max", program], stdout=subprocess.PIPE, text=True, check=False)
    assert run.returncode == 0, run.stdout
    assert run.stdout.count("neon_dotprod") == 32
    # A processor without the dot products is not sent there.
    old = subprocess.run([EMULATOR, "-cpu", "cortex-a53", program], stdout=subprocess.PIPE, text=True, check=True)
    assert "neon_dotprod" not in old.stdout
