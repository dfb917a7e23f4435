"""A fleet for all scenarios, each of which leaves it idle and whole."""

import contextlib
import pathlib
import signal
from collections.abc import Iterator

import daemons
import pytest
from fleet import GPUS, MODELS, NO_STORE, TWO_WORKERS, Fleet, Gateway, Proxy, profile


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory, smollm2_gguf: pathlib.Path) -> Iterator[Fleet]:
    """Four neurons with fake GPUs, "c" of them behind a proxy, two with the real model, and two gateways."""
    folder = tmp_path_factory.mktemp("fleet")
    models = ""
    for name, gib, load_s, more in MODELS:
        fails = "the weights are broken" if name == "broken" else ""
        models += profile(folder, name, gib, load_s, 2 if "tensor_parallel" in more else 1, more, fails)
    nodes = {name: daemons.scripted_node(folder, name, gpus) for name, gpus in GPUS.items()}
    with contextlib.ExitStack() as stack:
        endpoints = {name: stack.enter_context(node.running()).url for name, node in nodes.items()}
        proxy = Proxy(nodes["c"].port)
        stack.callback(proxy.close)
        endpoints["c"] = f"http://127.0.0.1:{proxy.port}"
        for name in ("real1", "real2"):
            own = folder / name
            own.mkdir()
            endpoints[name] = stack.enter_context(daemons.neuron(own, smollm2_gguf)).url

        def make_gateway(name: str, more: str) -> Gateway:
            return Gateway(folder / name, endpoints, models, settings=TWO_WORKERS, more=more)

        gateways = [make_gateway(f"gateway{i}", NO_STORE) for i in range(2)]
        for gateway in gateways:
            stack.enter_context(gateway.running())
        yield Fleet(nodes, gateways, proxy, make_gateway)


@pytest.fixture(autouse=True)
def left_as_it_was(fleet: Fleet) -> Iterator[None]:
    """After each scenario nothing is in flight, and every node is up again."""
    yield
    for node in fleet.nodes.values():
        if node.process.poll() is None:
            node.process.send_signal(signal.SIGCONT)
        else:
            node.start()
    fleet.assert_idle()
