"""One fleet for all scenarios, which each leave it as it was."""

import contextlib
import functools
import pathlib
import signal
from collections.abc import Iterator

import daemons
import pytest
from fleet_rig import GPUS, MODELS, Fleet, Node, Proxy, gateway
from scripted_model import describe


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory, smollm2_gguf: pathlib.Path) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    models = ""
    for name, gib, load_s, more in MODELS:
        devices = 2 if "tensor_parallel" in more else 1
        fails = "the weights are broken" if name == "broken" else ""
        path = describe(folder, name, gib, load_s, devices, fails)
        models += f'[[models]]\nid = "{name}"\nsource = "{path}"\n{more}\n'
    nodes: dict[str, Node] = {}
    with contextlib.ExitStack() as stack:
        for name in GPUS:
            nodes[name] = Node(folder, name, daemons.free_port())
            stack.callback(nodes[name].stop)
        proxy = Proxy(nodes["c"].port)
        stack.callback(proxy.close)
        endpoints = {name: f"http://127.0.0.1:{node.port}" for name, node in nodes.items()}
        endpoints["c"] = f"http://127.0.0.1:{proxy.port}"
        for name in ("real1", "real2"):
            own = folder / name
            own.mkdir()
            endpoints[name] = stack.enter_context(daemons.neuron(own, smollm2_gguf)).url
        start_gateway = functools.partial(gateway, folder, endpoints, models)
        gateways = [stack.enter_context(start_gateway(f"gateway{i}")) for i in range(2)]
        for running in gateways:
            daemons.until(lambda running=running: (running.get("/health") or {}).get("nodes_up") == 6, 30, "all are up")
        yield Fleet(nodes, gateways, proxy, start_gateway)


@pytest.fixture(autouse=True)
def left_as_it_was(fleet: Fleet) -> Iterator[None]:
    """After each scenario nothing is in flight, and every node is up again."""
    yield
    for node in fleet.nodes.values():
        if node.process.poll() is None:
            node.send(signal.SIGCONT)
        else:
            node.start()
    fleet.assert_idle()
