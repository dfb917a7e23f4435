"""Driver table: filled from a library by name, errors with names, counted objects."""

import importlib.util
import subprocess
import sys

import pytest

from neuron.device import _fake_driver as fake  # type: ignore[attr-defined]
from neuron.device.driver import DriverError, DriverHandle, DriverNotFoundError, cuda_driver


def fake_library() -> str:
    spec = importlib.util.find_spec("neuron.device._fake_libcuda")
    assert spec is not None
    assert spec.origin is not None
    return spec.origin


def test_no_library() -> None:
    with pytest.raises(DriverNotFoundError, match=r"libcuda\.so\.none cannot be opened.*--devices cpu"):
        cuda_driver("libcuda.so.none")


def test_a_library_without_the_symbols() -> None:
    with pytest.raises(DriverNotFoundError, match=r"libc\.so\.6 has no cuInit"):
        cuda_driver("libc.so.6")


def test_every_symbol_is_found_by_its_name() -> None:
    code = """
import sys
from neuron.device.driver import DriverError, DriverHandle, cuda_driver
handle = DriverHandle(cuda_driver(sys.argv[1]))
try:
    handle.device(0)
except DriverError as error:
    print(handle.version(), error)
"""
    # in a process of its own: the table of the library that was opened first stays
    ran = subprocess.run([sys.executable, "-c", code, fake_library()], capture_output=True, text=True, check=True)
    assert ran.stdout == "(13, 1) cuDeviceGet returned 100 (CUDA_ERROR_NO_DEVICE)\n"


def test_a_driver_that_does_not_start() -> None:
    fake.reset()
    fake.fail("cuInit", 1, 999)
    with pytest.raises(DriverNotFoundError, match="cuInit returned 999"):
        DriverHandle(fake.capsule())


def test_an_error_has_code_name_and_call() -> None:
    fake.reset()
    handle = DriverHandle(fake.capsule())
    assert (handle.version(), handle.device(1), handle.device_name(1)) == ((12, 8), 1, "Counting Machine")
    with pytest.raises(DriverError, match=r"cuDeviceGet returned 101 \(CUDA_ERROR_INVALID_DEVICE\)") as caught:
        handle.device(2)
    assert (caught.value.call, caught.value.code, caught.value.name) == (
        "cuDeviceGet",
        101,
        "CUDA_ERROR_INVALID_DEVICE",
    )
    fake.fail("cuDriverGetVersion", 2, 12345)
    with pytest.raises(DriverError, match="unknown error"):
        handle.version()


def test_graphs_are_owned_once() -> None:
    fake.reset()
    handle = DriverHandle(fake.capsule())
    for graph in (1, 2, 3):
        handle.adopt_graph_exec(graph)
    with pytest.raises(ValueError, match="already owned"):
        handle.adopt_graph_exec(3)
    handle.destroy_graph_exec(2)
    with pytest.raises(KeyError):
        handle.destroy_graph_exec(2)
    assert handle.num_graph_execs == 2
    handle.destroy_graph_execs()
    assert (handle.num_graph_execs, fake.count("cuGraphExecDestroy")) == (0, 3)


def test_a_cpu_has_no_driver() -> None:
    handle = DriverHandle(None)
    assert (handle.is_host, handle.version(), handle.device(0), handle.device_name(0)) == (True, (0, 0), 0, "")


def test_only_a_table_is_taken_for_one() -> None:
    with pytest.raises(ValueError, match="PyCapsule_GetPointer"):
        DriverHandle(object())  # type: ignore[arg-type]
