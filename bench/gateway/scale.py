"""Cost of many streams, many nodes, stalled readers and several workers in cortex, and how each grows.

Four tables, each over one number: paced streams (memory a stream, CPU an SSE event, delay), nodes (what an idle gateway
takes, and what routing adds to a request), readers that ask for a stream and read nothing (memory while they stall, and
after they have left), and worker processes on one port. The last lines extrapolate linear growth to a
large site: that is arithmetic, not a measurement.

    python bench/gateway/scale.py [--interface rsgi|asgi] [--quick] [--keep]
"""

import contextlib
import functools
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import report
from gateway import rig
from gateway.gateways import cortex_command
from gateway.rig import Server

STREAMS = (250, 500, 1000, 2000, 4000)
NODES = (1, 10, 30, 100)
STALLED = 2000
WORKERS = (1, 2)
PACE_MS = 250
NUM_SSE_EVENTS = 20
GIVE_BACK_ROUNDS = 5
STALLED_SSE_EVENTS = 65_535
"""15 MB a stream: no buffer on the way holds it."""
INTERVAL_S = 2.0
"""Polling interval, as configured by default."""
SITE_STREAMS, SITE_NODES, SITE_TOKENS_PER_S = 10_000, 100, 20

Row = dict[str, Any]


@contextlib.contextmanager
def cortex(
    interface: str, *, num_nodes: int = 1, workers: int = 1, pinned: Sequence[int] = ()
) -> Iterator[tuple[int, Server, int]]:
    """Run cortex before mock nodes; give its port, its processes and the first node's port."""
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder = pathlib.Path(temporary)
        node = stack.enter_context(rig.mock(folder, num_ports=num_nodes))
        port = rig.free_ports()
        nodes = range(node, node + num_nodes)
        command = cortex_command(interface, port, nodes, folder, workers=workers, interval_s=INTERVAL_S)
        log = rig.BUILD / "logs" / "scale.log"
        server = Server(command.arguments, pinned=pinned or rig.cores()[:1], log=log, environment=command.environment)
        stack.enter_context(server).wait_for(port)
        time.sleep(1.0)
        yield port, server, node


def measure_streams(interface: str, counts: Sequence[int]) -> list[Row]:
    """Return a row for each number of streams, all from one gateway, fewest first."""
    found: list[Row] = []
    with cortex(interface) as (port, server, _):
        idle_bytes = server.memory().total_bytes
        for count in counts:
            options = {"sse_events": NUM_SSE_EVENTS, "pace": PACE_MS, "answers": 1, "spread": PACE_MS * 4}
            command = rig.on_cores(rig.cores()[1:], rig.load_command(port, count, **options))
            before_s = server.cpu_s()
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as load:
                time.sleep((NUM_SSE_EVENTS * PACE_MS * 0.8) / 1e3)
                busy_bytes = server.memory().total_bytes
                stdout, stderr = load.communicate(timeout=120)
            figures = rig.read_figures(stdout, stderr, load.returncode)
            cpu_s = server.cpu_s() - before_s
            found.append(
                {
                    "streams": count,
                    "KiB a stream": (busy_bytes - idle_bytes) / count / 1024,
                    "CPU us an SSE event": cpu_s * 1e6 / figures["total_sse_events"],
                    "CPU ms a stream": cpu_s * 1e3 / count,
                    "delay p50 ms": figures["delay_p50_us"] / 1e3,
                    "p99": figures["delay_p99_us"] / 1e3,
                    "first p50 ms": figures["first_p50_us"] / 1e3,
                }
            )
    return found


def measure_nodes(interface: str, counts: Sequence[int], *, idle_s: float) -> list[Row]:
    """Return a row for each number of nodes that all have the model."""
    found: list[Row] = []
    for count in counts:
        with cortex(interface, num_nodes=count) as (port, server, _):
            time.sleep(INTERVAL_S)
            before_s, started = server.cpu_s(), time.perf_counter()
            time.sleep(idle_s)
            idle = (server.cpu_s() - before_s) / (time.perf_counter() - started)
            memory_bytes = server.memory().total_bytes
            asked = rig.run_load(port, 16, server, seconds=idle_s / 3, warm=0.2)
            found.append(
                {
                    "nodes": count,
                    "idle CPU %": idle * 100,
                    "CPU us a node's poll": idle * 1e6 * INTERVAL_S / count,
                    "CPU us a request": asked.cpu_answer_us,
                    "PSS MiB": memory_bytes / 2**20,
                }
            )
    return found


def measure_stalled(interface: str, count: int) -> list[Row]:
    """Return what readers that read nothing hold, what is left when they have gone, and both a second time."""
    with cortex(interface) as (port, server, node):
        rig.run_load(port, 64, server, seconds=1)
        before_bytes = server.memory().largest_bytes
        rows: list[Row] = []

        def record(when: str) -> None:
            rss_bytes = server.memory().largest_bytes
            rows.append(
                {
                    "when": when,
                    "RSS MiB": rss_bytes / 2**20,
                    "KiB a reader": (rss_bytes - before_bytes) / count / 1024,
                    "the kernel's, of all TCP, MiB": kernel_bytes() / 2**20,
                    "streams cut": rig.counts(node)["cut"],
                }
            )

        record("before")
        asked = [*rig.load_command(port, count, sse_events=STALLED_SSE_EVENTS), "--stall"]
        for time_ in ("", ", again"):
            cut = rig.counts(node)["cut"]
            with subprocess.Popen(rig.on_cores(rig.cores()[1:], asked), stdout=subprocess.PIPE) as load:
                assert load.stdout is not None
                load.stdout.readline()
                wait_until_still(node)
                record(f"{count} readers stall{time_}")
                load.terminate()
            wait_until(functools.partial(has_cut, node, cut + count), limit_s=30)
            for _ in range(GIVE_BACK_ROUNDS):  # allocators give back now and then, while they are used
                time.sleep(3.0)
                rig.run_load(port, 4, server, seconds=0.2)
            record(f"they have left{time_}")
    return rows


def kernel_bytes() -> int:
    """Return what the kernel holds for all TCP sockets of the machine, both ends of these connections among them."""
    words = pathlib.Path("/proc/net/sockstat").read_text().partition("TCP:")[2].split()
    return int(words[words.index("mem") + 1]) * os.sysconf("SC_PAGE_SIZE")


def wait_until(is_so: Callable[[], bool], *, limit_s: float) -> None:
    """Wait for a condition, or for the limit: the figures then show it."""
    deadline = time.monotonic() + limit_s
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.2)


def has_cut(node: int, count: int) -> bool:
    """Return whether the node has seen ``count`` streams end before their time."""
    return rig.counts(node)["cut"] >= count


def wait_until_still(node: int) -> None:
    """Wait until the node sends nothing more: every window is full."""
    sent = [-1, rig.counts(node)["sse_events"]]

    def is_still() -> bool:
        time.sleep(0.8)
        sent[:] = [sent[1], rig.counts(node)["sse_events"]]
        return sent[0] == sent[1]

    wait_until(is_still, limit_s=60)


def measure_workers(interface: str, counts: Sequence[int]) -> list[Row]:
    """Return a row for each number of workers on one port, which share nothing. They may use the load's core too."""
    found: list[Row] = []
    for count in counts:
        with cortex(interface, workers=count, pinned=rig.cores()) as (port, server, _):
            before_s = {process.pid: rig.cpu_s(process.pid) for process in server.processes()}
            asked = rig.run_load(port, 64, server, seconds=2, warm=0.3)
            used_s = sorted(rig.cpu_s(process.pid) - before_s[process.pid] for process in server.processes())
            found.append(
                {
                    "workers": count,
                    "requests/s": asked.answers_per_s,
                    "CPU us a request": asked.cpu_answer_us,
                    "least busy over busiest": used_s[-count] / used_s[-1],
                    "PSS MiB": server.memory().total_bytes / 2**20,
                }
            )
    return found


def site(streams: Sequence[Row], nodes: Sequence[Row]) -> list[str]:
    """Return what a large site would take, if what was measured goes on in a straight line."""
    most = streams[-1]
    sse_events_per_s = SITE_STREAMS * SITE_TOKENS_PER_S
    num_cores, gib = sse_events_per_s * most["CPU us an SSE event"] / 1e6, SITE_STREAMS * most["KiB a stream"] / 2**20
    least, largest = nodes[0], nodes[-1]
    poll = (largest["idle CPU %"] - least["idle CPU %"]) / (largest["nodes"] - least["nodes"])
    return [
        f"{SITE_STREAMS:,} streams, {sse_events_per_s:,} tokens/s in all: {num_cores:.1f} cores, {gib:.2f} GiB",
        f"{SITE_NODES} nodes: {poll * SITE_NODES:.1f} % of a core in each worker to poll them",
    ]


def main() -> None:
    """Measure and print."""
    parser = report.arguments(__doc__)
    known = ["rsgi", "asgi"]
    parser.add_argument("--interface", choices=known, default=known[0])
    parser.add_argument("--quick", action="store_true", help="small numbers: to see that all works")
    options = parser.parse_args()
    onlookers = rig.Onlookers()
    streams = measure_streams(options.interface, (50, 100) if options.quick else STREAMS)
    nodes = measure_nodes(options.interface, (1, 10) if options.quick else NODES, idle_s=3 if options.quick else 6)
    stalled = measure_stalled(options.interface, 100 if options.quick else STALLED)
    workers = measure_workers(options.interface, WORKERS)
    notes = [f"cortex {options.interface}", *site(streams, nodes), *onlookers.notes()]
    report.write(
        "gateway_scale",
        workers,
        question="What do many streams, many nodes, stalled readers and several workers cost the gateway?",
        packages=["granian", "uvloop"],
        ratios={
            "sse_event_most_streams_over_fewest": streams[-1]["CPU us an SSE event"]
            / streams[0]["CPU us an SSE event"],
            "kib_a_stream": streams[-1]["KiB a stream"],
            "request_most_nodes_over_one": nodes[-1]["CPU us a request"] / nodes[0]["CPU us a request"],
            "kib_a_stalled_reader": stalled[1]["KiB a reader"],
            "rss_after_stalls_over_before": stalled[-1]["RSS MiB"] / stalled[0]["RSS MiB"],
            "rss_second_stall_over_first": stalled[3]["RSS MiB"] / stalled[1]["RSS MiB"],
            "request_two_workers_over_one": workers[1]["CPU us a request"] / workers[0]["CPU us a request"],
        },
        notes=notes,
        keep=options.keep,
        more={"streams": streams, "nodes": nodes, "stalled": stalled},
    )


if __name__ == "__main__":
    try:
        main()
    except rig.RunError as error:
        sys.exit(str(error))
