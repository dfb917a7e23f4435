"""Devices of this host, and the choice among them by ``--devices``.

GPUs are queried through NVML, which makes no CUDA context, so that the daemon can fork afterwards; the CPU is described
within the limits of its control group. Ordinals follow the PCI bus, filtered by
``CUDA_VISIBLE_DEVICES``, and the workers are started so that CUDA counts the same way. Nothing here imports torch.
"""

import contextlib
import dataclasses
import os
import pathlib
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cortex.wire.node import Device, DeviceKind
from neuron.errors import DeviceListError, UnknownDeviceError

CUDA_ENVIRONMENT = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
"""Environment of a worker in which CUDA's ordinals are the ones of this module."""


@dataclasses.dataclass(frozen=True, slots=True)
class Host:
    """Devices in the order of their ordinals, and the versions of driver and CUDA if there is a driver."""

    devices: tuple[Device, ...]
    driver_version: str | None = None
    cuda_version: str | None = None
    no_gpu: str | None = None
    """Reason for the absence of GPUs though the kernel has a driver for them."""
    no_gpu_here: str = ""
    """Reason for the absence of GPUs, for a user who named one."""


@dataclasses.dataclass(frozen=True, slots=True)
class Roots:
    """Folders of the kernel's files."""

    proc: pathlib.Path = pathlib.Path("/proc")
    cgroup: pathlib.Path = pathlib.Path("/sys/fs/cgroup")


ROOTS = Roots()


def probe(environment: Mapping[str, str] = os.environ, roots: Roots = ROOTS) -> Host:
    """Return every device of this host: the visible GPUs, then the CPU."""
    gpus = _probe_gpus(environment.get("CUDA_VISIBLE_DEVICES"), roots)
    return dataclasses.replace(gpus, devices=(*gpus.devices, probe_cpu(roots)))


def parse_devices(text: str, available: Sequence[str], no_gpu: str = "") -> tuple[str, ...]:
    """Return the ids that ``text`` names: ``0,1``, ``cuda:0``, ``cpu``, ``all``, or ``auto``.

    ``available`` are the ids of :func:`probe`. A bare number is a GPU; ``auto`` takes every GPU, or the CPU where
    there is none; ``all`` also takes the CPU. ``cpu:1`` and so on are more workers on the same processor and memory,
    for models over several ranks. ``no_gpu`` is the reason for the absence of GPUs. Raises DeviceListError and
    UnknownDeviceError.
    """
    gpus = tuple(device for device in available if device.startswith("cuda:"))
    words = [word.strip().lower() for word in text.split(",")]
    if words == ["auto"]:
        return gpus or ("cpu:0",)
    if words == ["all"]:
        return tuple(available)
    found: list[str] = []
    for word in words:
        if not word:
            raise DeviceListError(f"empty device in {text!r}: name devices like 0,1 or cuda:0 or cpu")
        if not (match := re.fullmatch(r"(?:cuda:)?(\d+)|cpu(?::(\d+))?", word)):
            raise DeviceListError(f"{word!r} is no device: name devices like 0,1 or cuda:0 or cpu, or say auto")
        device = f"cuda:{int(match[1])}" if match[1] else f"cpu:{int(match[2] or 0)}"
        if device not in available and match[1]:
            why = f": {no_gpu}" if no_gpu and not gpus else ""
            advice = "" if gpus else "; neuron --devices cpu runs models without a GPU"
            raise UnknownDeviceError(f"there is no {device} here{why}. Devices here: {', '.join(available)}{advice}")
        if device in found:
            raise DeviceListError(f"{device} is named twice in {text!r}")
        found.append(device)
    return tuple(found)


# ------------------------------------------------------------------ GPUs


def visible_gpus(setting: str | None, uuids: Sequence[str]) -> list[int]:
    """Return the bus ordinals that ``CUDA_VISIBLE_DEVICES`` leaves, in its order.

    As CUDA reads it: unset is all, entries are ordinals or prefixes of a UUID, and the first entry that names no GPU,
    or a GPU for the second time, ends the list. (CUDA programming guide, "CUDA environment variables".)
    """
    if setting is None:
        return list(range(len(uuids)))
    found: list[int] = []
    for entry in (part.strip() for part in setting.split(",")):
        if entry.isdigit():
            matches = [int(entry)] if int(entry) < len(uuids) else []
        else:
            matches = [index for index, uuid in enumerate(uuids) if entry and uuid.startswith(entry)]
        if len(matches) != 1 or matches[0] in found:
            break
        found += matches
    return found


def _probe_gpus(visible: str | None, roots: Roots) -> Host:
    has_driver = (roots.proc / "driver/nvidia/version").exists()
    try:
        import pynvml as nvml
    except ImportError:  # a gateway-only installation
        reason = "nvidia-ml-py is not installed"
        return Host((), None, None, reason if has_driver else None, f"{reason} (pip install 'helexa-cortex[neuron]')")
    with contextlib.ExitStack() as stack:
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            no_driver = "" if has_driver else f"no NVIDIA driver is loaded ({roots.proc}/driver/nvidia is missing), "
            hint = "; a container needs --gpus or --device nvidia.com/gpu=all" if _in_container() else ""
            return Host((), None, None, str(error) if has_driver else None, f"{no_driver}NVML says: {error}{hint}")
        stack.callback(nvml.nvmlShutdown)
        version = nvml.nvmlSystemGetCudaDriverVersion_v2()
        handles = [_answer(nvml, "nvmlDeviceGetHandleByIndex", index) for index in range(nvml.nvmlDeviceGetCount())]
        if visible is not None and visible.startswith("MIG-"):
            # A MIG instance is no GPU by this count, and CUDA shows a process one of them.
            chosen = [_answer(nvml, "nvmlDeviceGetHandleByUUID", visible.partition(",")[0].strip())]
            chosen = [handle for handle in chosen if handle is not None]
        else:
            uuids = [_text(_answer(nvml, "nvmlDeviceGetUUID", handle) or "") for handle in handles]
            chosen = [handles[index] for index in visible_gpus(visible, uuids)]
        hidden = f"CUDA_VISIBLE_DEVICES is {visible!r}, which names none of the {len(handles)}"
        hides = visible is not None and visible not in {"", "-1"} and bool(handles) and not chosen
        return Host(
            tuple(_describe(nvml, f"cuda:{ordinal}", handle, roots) for ordinal, handle in enumerate(chosen)),
            _text(nvml.nvmlSystemGetDriverVersion()),
            f"{version // 1000}.{version % 1000 // 10}",
            hidden if hides else None,
            "" if chosen else hidden if handles else "the NVIDIA driver is loaded and sees no GPU",
        )


def _in_container() -> bool:
    return any(pathlib.Path(path).exists() for path in ("/.dockerenv", "/run/.containerenv"))


def _answer(nvml: Any, question: str, subject: object) -> Any:
    """Query NVML; return ``None`` if it has no answer, as for a GPU that has fallen off the bus."""
    if subject is None:
        return None
    try:
        return getattr(nvml, question)(subject)
    except nvml.NVMLError:
        return None


def _describe(nvml: Any, name: str, handle: object, roots: Roots) -> Device:
    """Describe a GPU. A GPU that does not answer keeps its ordinal, without memory."""
    product = _answer(nvml, "nvmlDeviceGetName", handle)
    memory = _answer(nvml, "nvmlDeviceGetMemoryInfo", handle)
    capability = _answer(nvml, "nvmlDeviceGetCudaComputeCapability", handle)
    free_bytes, total_bytes = (0, 0) if memory is None else (int(memory.free), int(memory.total))
    if memory is None and product is not None:
        free_bytes, total_bytes = host_memory(roots)  # unified memory
    return Device(
        id=name,
        kind=DeviceKind.CUDA,
        name="does not answer" if product is None else _text(product),
        memory_total_bytes=total_bytes,
        memory_free_bytes=free_bytes,
        compute_capability="" if capability is None else "{}.{}".format(*capability),
    )


def _text(value: str | bytes) -> str:
    """Return a string of NVML, which older bindings return as bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


# ------------------------------------------------------------------ the CPU


def probe_cpu(roots: Roots = ROOTS) -> Device:
    """Return this host's CPU, with the cores and the memory this process may use."""
    free_bytes, total_bytes = host_memory(roots)
    return Device(
        id="cpu:0",
        kind=DeviceKind.CPU,
        name=_cpu_name(roots),
        memory_total_bytes=total_bytes,
        memory_free_bytes=free_bytes,
        num_cores=usable_cores(roots),
    )


def usable_cores(roots: Roots = ROOTS) -> int:
    """Return the number of cores that this process may keep busy: its affinity, within its control group's quota."""
    cores = len(os.sched_getaffinity(0))
    for folder in _cgroups(roots, "cpu"):
        quota, _, period = (_read(folder / "cpu.max") or "").partition(" ")
        if not period:  # version 1
            quota, period = _read(folder / "cpu.cfs_quota_us") or "-1", _read(folder / "cpu.cfs_period_us") or "0"
        if quota not in {"max", "-1"} and int(period) > 0:
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def host_memory(roots: Roots = ROOTS) -> tuple[int, int]:
    """Return (free, total) bytes of memory that the kernel can give, within the control group's limits.

    Page cache that the group could drop counts as free, as it does in the kernel's MemAvailable.
    """
    facts = dict(re.findall(r"^(\w+):\s+(\d+) kB$", (roots.proc / "meminfo").read_text(), re.MULTILINE))
    total_bytes = int(facts["MemTotal"]) * 1024
    free_bytes = int(facts["MemAvailable"]) * 1024
    for folder in _cgroups(roots, "memory"):
        limit = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
        used = _read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes")
        if not limit or not used or limit == "max" or int(limit) >= total_bytes:
            continue
        total_bytes = int(limit)
        stat = dict(re.findall(r"^(\w+) (\d+)$", _read(folder / "memory.stat") or "", re.MULTILINE))
        # version 1 counts descendant groups in its total_ rows only
        held = int(used) - int(stat.get("total_inactive_file") or stat.get("inactive_file") or 0)
        free_bytes = min(free_bytes, max(0, int(limit) - held))
    return free_bytes, total_bytes


def _cpu_name(roots: Roots) -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _read(roots.proc / "cpuinfo") or "", re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def _cgroups(roots: Roots, controller: str) -> Iterator[pathlib.Path]:
    """Yield the folders of this process's control groups that can limit ``controller``, from its own to the root."""
    for line in (_read(roots.proc / "self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = roots.cgroup / controller if controllers else roots.cgroup
        folder = root / path.lstrip("/")
        # In a cgroup namespace the path may not exist; the root is the group then.
        yield folder
        while folder != root and root in folder.parents:
            folder = folder.parent
            yield folder


def _read(path: pathlib.Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
