"""A fleet for a page to look at: two neurons on this CPU, a scripted one, some with fake GPUs, and a gateway.

All are the real daemons. The gateway can be stopped and started again where it was.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping

import daemons
import psutil
from scripted_model import describe

from cortex.access import local

REAL = "SmolLM2-135M-Instruct"
# Name, GiB, seconds to load, devices.
PRETENDED: tuple[tuple[str, float, float, int], ...] = (
    ("Qwen3-32B", 30, 4.0, 1),
    ("Qwen3-235B-A22B", 140, 3.0, 2),
    ("Llama-3.3-70B", 60, 2.0, 1),
    ("Gemma-3-27B", 24, 6.0, 1),
)
GPUS: Mapping[str, Mapping[str, float]] = {
    "gpu-1": {"cuda:0": 80, "cuda:1": 80},
    "gpu-2": {"cuda:0": 48},
    "gpu-3": {"cuda:0": 24},
}


class Gateway:
    """``cortex serve`` at one address."""

    def __init__(
        self, folder: pathlib.Path, nodes: Mapping[str, str], models: str, keys: str = "", interval_s: float = 0.2
    ) -> None:
        self.port = daemons.free_port()
        self.metrics_port = daemons.free_port()
        self.nodes = dict(nodes)
        self.url = f"http://127.0.0.1:{self.port}"
        self.folder = folder
        self._process: psutil.Process | None = None
        self._running = contextlib.ExitStack()
        endpoints = "".join(f'[[neurons]]\nname = "{name}"\nendpoint = "{url}"\n' for name, url in nodes.items())
        (folder / "models.toml").write_text(models)
        (folder / "keys.toml").write_text(keys)
        (folder / "cortex.toml").write_text(
            f'[gateway]\nlisten = "127.0.0.1:{self.port}"\ndrain_timeout_s = 15\n'
            f'metrics_listen = "127.0.0.1:{self.metrics_port}"\n'
            f"[gateway.polling]\ninterval_s = {interval_s}\nmax_backoff_s = {max(0.5, interval_s)}\n"
            + (f'[access]\nkeys = "{folder / "keys.toml"}"\n' if keys else "")
            + f'[store]\nkind = "none"\n{endpoints}'
        )

    @property
    def link(self) -> str:
        """The address of the page, for whoever runs the gateway; it has a key from its first start on."""
        return f"{self.url}/#key={local.find(self.port, os.environ)}"

    def start(self) -> daemons.Daemon:
        """Serve, and return when every node has answered."""
        config, log = str(self.folder / "cortex.toml"), self.folder / "cortex.log"
        running = self._running.enter_context(
            daemons.daemon("cortex", "serve", "--config", config, port=self.port, log=log)
        )
        daemons.until(lambda: (h := running.get("/health")) and h["nodes_up"] == h["nodes"], 30, "all nodes are up")
        self._process = psutil.Process(running.process.pid)
        return running

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Have every process of it stand still, connections and all."""
        assert self._process is not None
        processes = [self._process, *self._process.children(recursive=True)]
        for process in processes:
            process.suspend()
        try:
            yield
        finally:
            for process in processes:
                process.resume()

    def stop(self) -> None:
        """End, as SIGTERM ends it; an open page must not hold it up."""
        self._running.close()


@contextlib.contextmanager
def neurons(
    folder: pathlib.Path, gpus: Mapping[str, Mapping[str, float]] = GPUS, *, scripted: bool = True
) -> Iterator[dict[str, str]]:
    """Run the nodes and return their addresses; without ``scripted`` none of them plays the scenarios of tests."""
    found: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        for name in ("cpu-1", "cpu-2"):
            port = daemons.free_port()
            config = folder / f"{name}.toml"
            config.write_text(f'[daemon]\nname = "{name}"\nlisten = "127.0.0.1:{port}"\ndevices = "cpu"\n')
            log = folder / f"{name}.log"
            found[name] = stack.enter_context(daemons.daemon("neuron", "--config", str(config), port=port, log=log)).url
        for name, devices in gpus.items():
            port = daemons.free_port()
            found[name] = stack.enter_context(
                daemons.daemon(
                    "python",
                    daemons.SCRIPTED_NODE,
                    json.dumps({"port": port, "name": name, "devices": devices}),
                    port=port,
                    log=folder / f"{name}.log",
                )
            ).url
        if scripted:
            own = folder / "scripted"
            own.mkdir()
            found["scripted"] = stack.enter_context(daemons.scripted_neuron(own)).url
        yield found


def catalogue(folder: pathlib.Path, weights: pathlib.Path) -> str:
    """Return a ``models.toml``: the real model for the two CPUs, and the pretended ones."""
    models = f'[[models]]\nid = "{REAL}"\nsource = "{weights}"\naliases = ["small"]\npreferred_nodes = ["cpu-1"]\n'
    for name, gib, load_s, devices in PRETENDED:
        path = describe(folder, name, gib, load_s, devices)
        wide = f"tensor_parallel = {devices}\n" if devices > 1 else ""
        models += f'[[models]]\nid = "{name}"\nsource = "{path}"\npreferred_nodes = ["gpu-1"]\n{wide}'
    return models
