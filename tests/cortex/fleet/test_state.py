"""The devices in the state of a fleet."""

from cortex.fleet.state import Node, devices_in_use
from cortex.wire.node import Device, DeviceKind, Discovery, WorkerState

READY = WorkerState.READY


def node(name: str, boot_id: str, *devices: Device) -> Node:
    found = Discovery(name, "0", "host", "linux", None, None, devices, ("torch",), (), boot_id)
    return Node(name, f"http://{name}:13131", True, True, found)


def cpu(worker: WorkerState | None = READY) -> Device:
    return Device("cpu:0", DeviceKind.CPU, "a CPU", 32, 16, worker=worker)


def gpu(number: int, worker: WorkerState | None) -> Device:
    return Device(f"cuda:{number}", DeviceKind.CUDA, "a GPU", 80, 40, "9.0", 0, worker)


def test_neurons_of_one_host_share_its_memory() -> None:
    nodes = [node("a", "boot", cpu()), node("b", "boot", cpu()), node("c", "other", cpu()), node("old", "", cpu())]
    assert sum(device.memory_total_bytes for device in devices_in_use(nodes)) == 3 * 32
    assert sum(device.memory_total_bytes for device in devices_in_use(nodes[:2])) == 32


def test_each_neuron_counts_the_gpus_that_it_uses() -> None:
    first = node("a", "boot", gpu(0, READY), gpu(1, None), cpu(None))
    second = node("b", "boot", gpu(0, None), gpu(1, READY), cpu(None))
    assert [device.id for device in devices_in_use([first, second])] == ["cuda:0", "cuda:1"]
    # Each may see another GPU as its first.
    assert len(devices_in_use([first, node("c", "boot", gpu(0, READY))])) == 2
