"""Devices of other hosts: control groups of both versions, GPUs through a fake NVML."""

import os
import pathlib
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest

from cortex.wire.node import DeviceKind
from neuron.device.probe import (
    Roots,
    host_memory,
    parse_devices,
    probe,
    probe_cpu,
    usable_cores,
    visible_gpus,
)
from neuron.errors import DeviceListError, UnknownDeviceError

GIB = 1 << 30
TWO = ("cuda:0", "cuda:1", "cpu:0")


@pytest.mark.parametrize(
    ("text", "available", "expected"),
    [
        ("0,1", TWO, ("cuda:0", "cuda:1")),
        ("1", TWO, ("cuda:1",)),
        ("cuda:1, CPU", TWO, ("cuda:1", "cpu:0")),
        ("cpu:0", TWO, ("cpu:0",)),
        ("auto", TWO, ("cuda:0", "cuda:1")),
        ("auto", ("cpu:0",), ("cpu:0",)),
        ("all", TWO, TWO),
    ],
)
def test_devices_by_name(text: str, available: tuple[str, ...], expected: tuple[str, ...]) -> None:
    assert parse_devices(text, available) == expected


def test_more_workers_on_the_processor_can_be_named() -> None:
    assert parse_devices("cpu, cpu:1", ["cpu:0"]) == ("cpu:0", "cpu:1")


@pytest.mark.parametrize("text", ["", ",", "0,", "gpu", "cuda:", "cuda:x", "-1", "1.5", "0,cuda:0", "auto,0"])
def test_lists_that_make_no_sense(text: str) -> None:
    with pytest.raises(DeviceListError) as refused:
        parse_devices(text, TWO)
    assert refused.value.code == "invalid_device"


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(UnknownDeviceError, match=r"there is no cuda:2 here\. Devices here: cuda:0, cuda:1, cpu:0$"):
        parse_devices("2", TWO)


@pytest.mark.parametrize("text", ["0,1", "0", "cuda:0", "cpu,0"])
def test_a_missing_gpu_is_an_error_with_reason_and_remedy(text: str) -> None:
    with pytest.raises(UnknownDeviceError) as refused:
        parse_devices(text, ["cpu:0"], "no NVIDIA driver is loaded")
    assert refused.value.message == (
        "there is no cuda:0 here: no NVIDIA driver is loaded. Devices here: cpu:0; "
        "neuron --devices cpu runs models without a GPU"
    )


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("2,0", [2, 0]),
        ("GPU-b", [1]),
        ("GPU-", []),  # matches two: an ambiguous prefix ends the list
        ("1,7,0", [1]),
        ("0,0", [0]),
        ("-1", []),
        ("NoDevFiles", []),
    ],
)
def test_cuda_visible_devices(setting: str | None, expected: list[int]) -> None:
    assert visible_gpus(setting, ["GPU-aa", "GPU-bb", "MIG-cc"]) == expected


# ------------------------------------------------------------------ the CPU


def host(tmp_path: pathlib.Path, cgroup: str, files: dict[str, str]) -> Roots:
    roots = Roots(tmp_path / "proc", tmp_path / "cgroup")
    (roots.proc / "self").mkdir(parents=True)
    (roots.proc / "self/cgroup").write_text(cgroup)
    (roots.proc / "meminfo").write_text(
        f"MemTotal:       {64 << 20} kB\nMemFree: 1 kB\nMemAvailable:   {48 << 20} kB\nHugePages_Total: 0\n"
    )
    (roots.proc / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Abacus 3000\n")
    for name, text in files.items():
        path = roots.cgroup / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return roots


def test_a_host_without_limits(tmp_path: pathlib.Path) -> None:
    roots = host(tmp_path, "0::/user.slice\n", {"user.slice/memory.max": "max", "user.slice/cpu.max": "max 100000"})
    assert host_memory(roots) == (48 * GIB, 64 * GIB)
    device = probe_cpu(roots)
    assert (device.id, device.kind, device.name) == ("cpu:0", DeviceKind.CPU, "Abacus 3000")
    assert device.num_cores == len(os.sched_getaffinity(0))


def test_the_tightest_group_on_the_way_up_counts(tmp_path: pathlib.Path) -> None:
    files = {
        "a/memory.max": str(8 * GIB),
        "a/memory.current": str(5 * GIB),
        "a/memory.stat": f"anon {3 * GIB}\ninactive_file {2 * GIB}",
        "a/b/memory.max": str(16 * GIB),
        "a/b/memory.current": str(1 * GIB),
        "a/cpu.max": "100000 100000",
        "a/b/cpu.max": "max 100000",
    }
    roots = host(tmp_path, "0::/a/b\n", files)
    assert host_memory(roots) == (5 * GIB, 8 * GIB)
    assert usable_cores(roots) == 1


def test_a_container_with_its_own_view(tmp_path: pathlib.Path) -> None:
    roots = host(
        tmp_path, "0::/\n", {"memory.max": str(GIB), "memory.current": str(2 * GIB), "cpu.max": "50000 100000"}
    )
    assert host_memory(roots) == (0, GIB)
    assert usable_cores(roots) == 1, "half a core is still one"


def test_control_groups_of_version_one(tmp_path: pathlib.Path) -> None:
    files = {
        "memory/job/memory.limit_in_bytes": str(4 * GIB),
        "memory/job/memory.usage_in_bytes": str(3 * GIB),
        "memory/job/memory.stat": f"inactive_file 5\ntotal_inactive_file {GIB}",
        "memory/memory.limit_in_bytes": "9223372036854771712",
        "memory/memory.usage_in_bytes": str(20 * GIB),
        "cpu/job/cpu.cfs_quota_us": "100000",
        "cpu/job/cpu.cfs_period_us": "100000",
        "cpu/cpu.cfs_quota_us": "-1",
        "cpu/cpu.cfs_period_us": "100000",
    }
    roots = host(tmp_path, "4:memory:/job\n3:cpu,cpuacct:/job\n1:name=systemd:/job\n0::/job\n", files)
    assert host_memory(roots) == (2 * GIB, 4 * GIB)
    assert usable_cores(roots) == 1


def test_no_control_groups_at_all(tmp_path: pathlib.Path) -> None:
    roots = host(tmp_path, "", {})
    (roots.proc / "self/cgroup").unlink()
    (roots.proc / "cpuinfo").unlink()
    assert host_memory(roots) == (48 * GIB, 64 * GIB)
    assert probe_cpu(roots).name == os.uname().machine


def test_this_host() -> None:
    free_bytes, total_bytes = host_memory()
    assert 0 < free_bytes <= total_bytes
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))


# ------------------------------------------------------------------ GPUs


class NVMLError(Exception):
    pass


def nvml(*, driver: bool = True) -> types.ModuleType:
    """Fake nvidia-ml-py with two GPUs."""
    module = types.ModuleType("pynvml")
    calls: list[str] = []

    def init() -> None:
        if not driver:
            raise NVMLError("Driver Not Loaded")
        calls.append("init")

    answers = {
        "NVMLError": NVMLError,
        "nvmlInit": init,
        "nvmlShutdown": lambda: calls.append("shutdown"),
        "nvmlSystemGetCudaDriverVersion_v2": lambda: 12080,
        "nvmlSystemGetDriverVersion": lambda: b"570.124.06",
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetUUID": lambda index: f"GPU-{'ab'[index]}",
        "nvmlDeviceGetName": lambda index: f"NVIDIA H20{index}",
        "nvmlDeviceGetMemoryInfo": lambda index: types.SimpleNamespace(total=(index + 1) * GIB, free=index * GIB),
        "nvmlDeviceGetCudaComputeCapability": lambda index: (9, index),
        "calls": calls,
    }
    module.__dict__.update(answers)
    return module


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nvml()
    monkeypatch.setitem(sys.modules, "pynvml", module)
    found = probe({})
    assert (found.driver_version, found.cuda_version) == ("570.124.06", "12.8")
    assert [device.id for device in found.devices] == ["cuda:0", "cuda:1", "cpu:0"]
    second = found.devices[1]
    assert (second.name, second.memory_total_bytes, second.memory_free_bytes, second.compute_capability) == (
        "NVIDIA H201",
        2 * GIB,
        GIB,
        "9.1",
    )
    assert module.calls == ["init", "shutdown"]
    hidden = probe({"CUDA_VISIBLE_DEVICES": "GPU-b"})
    assert [(device.id, device.name) for device in hidden.devices[:-1]] == [("cuda:0", "NVIDIA H201")]


@pytest.mark.parametrize("loaded", [False, True], ids=["no kernel driver", "kernel driver"])
@pytest.mark.parametrize(
    ("module", "why"),
    [(None, "nvidia-ml-py is not installed"), (nvml(driver=False), "Driver Not Loaded")],
    ids=["no bindings", "no driver"],
)
def test_no_gpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, module: types.ModuleType | None, why: str, loaded: bool
) -> None:
    """With a driver in the kernel, the reason for the absence is reported."""
    monkeypatch.setitem(sys.modules, "pynvml", module)
    roots = host(tmp_path, "", {})
    if loaded:
        (roots.proc / "driver/nvidia").mkdir(parents=True)
        (roots.proc / "driver/nvidia/version").write_text("NVRM version: 570\n")
    found = probe({}, roots)
    assert (found.driver_version, found.cuda_version, found.no_gpu) == (None, None, why if loaded else None)
    assert [device.id for device in found.devices] == ["cpu:0"]


@pytest.mark.parametrize(
    ("setting", "why"),
    [("GPU-c", "CUDA_VISIBLE_DEVICES is 'GPU-c', which names none of the 2"), ("", None), ("-1", None), ("1", None)],
)
def test_a_setting_that_hides_all_gpus_by_mistake_is_reported(
    monkeypatch: pytest.MonkeyPatch, setting: str, why: str | None
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml())
    assert probe({"CUDA_VISIBLE_DEVICES": setting}).no_gpu == why


@pytest.mark.parametrize("silent", ["nvmlDeviceGetHandleByIndex", "nvmlDeviceGetName"])
def test_a_gpu_that_is_lost_keeps_its_place(monkeypatch: pytest.MonkeyPatch, silent: str) -> None:
    """After an XID 79 a daemon goes on with the other GPUs, whose ordinals are the same, and answers its polls."""
    module = nvml()
    monkeypatch.setitem(sys.modules, "pynvml", module)

    def losing(answer: Callable[[int], Any]) -> Callable[[int], Any]:
        def lost(index: int) -> Any:
            if index == 0:
                raise NVMLError("GPU is lost")
            return answer(index)

        return lost

    for name in {silent, "nvmlDeviceGetUUID", "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetCudaComputeCapability"}:
        setattr(module, name, losing(getattr(module, name)))
    first, second, _ = probe({}).devices
    assert (first.id, first.name, first.memory_total_bytes, first.compute_capability) == (
        "cuda:0",
        "does not answer",
        0,
        "",
    )
    assert (second.id, second.name, second.memory_total_bytes) == ("cuda:1", "NVIDIA H201", 2 * GIB)


def test_a_gpu_without_memory_of_its_own_has_the_hosts(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    module = nvml()
    monkeypatch.setitem(sys.modules, "pynvml", module)

    def unsupported(handle: int) -> None:
        raise NVMLError("Not Supported")

    monkeypatch.setattr(module, "nvmlDeviceGetMemoryInfo", unsupported)
    device = probe({}, host(tmp_path, "", {})).devices[0]
    assert (device.name, device.memory_free_bytes, device.memory_total_bytes) == ("NVIDIA H200", 48 * GIB, 64 * GIB)


def test_a_mig_instance_is_named_by_its_own_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nvml()
    monkeypatch.setitem(sys.modules, "pynvml", module)

    def by_uuid(uuid: str) -> int:
        if uuid != "MIG-x":
            raise NVMLError("Not Found")
        return 1

    monkeypatch.setattr(module, "nvmlDeviceGetHandleByUUID", by_uuid, raising=False)
    found = probe({"CUDA_VISIBLE_DEVICES": "MIG-x,MIG-y"})
    assert [(device.id, device.memory_total_bytes) for device in found.devices[:-1]] == [("cuda:0", 2 * GIB)]
    found = probe({"CUDA_VISIBLE_DEVICES": "MIG-z"})
    assert [device.id for device in found.devices] == ["cpu:0"]
    assert found.no_gpu is not None


def test_probing_loads_no_torch() -> None:
    code = "import sys; from neuron.device.probe import probe; probe(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout == "False\n"
