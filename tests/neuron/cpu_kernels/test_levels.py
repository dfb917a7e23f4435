"""Dispatch levels: the permission for AMX's tiles, which a process asks for."""

import pathlib
import subprocess
import sys

import pytest

from neuron.cpu_kernels import native

REFUSED = """
import ctypes

class Stack(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

memory = ctypes.create_string_buffer(6 << 10)  # holds the registers of AVX-512, and no tiles
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(ctypes.addressof(memory), 0, len(memory))), None) == 0
from neuron.cpu_kernels import native
print(*native.levels())
"""


def flags() -> set[str]:
    text = pathlib.Path("/proc/cpuinfo").read_text()
    return next((set(line.split()) for line in text.splitlines() if line.startswith("flags")), set())


@pytest.mark.skipif("amx_bf16" not in flags(), reason="no tiles")
def test_without_permission_for_tiles_the_next_level_is_the_best() -> None:
    """The kernel refuses them to a process with a signal stack that is too small for them."""
    found = subprocess.run([sys.executable, "-P", "-c", REFUSED], capture_output=True, text=True, check=True)
    granted = subprocess.run(
        [sys.executable, "-P", "-c", "from neuron.cpu_kernels import native; print(*native.levels())"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert granted.stdout.split()[0] == "amx_bf16"
    assert found.stdout.split() == granted.stdout.split()[1:]


def test_the_portable_level_is_the_last_everywhere() -> None:
    assert native.levels()[-1] == "portable"
