"""Cost of a gateway: cortex in both its interfaces beside common routers and proxies, in one run.

Every gateway stands before the same mock node and is asked by the same load (both in C, together far faster than any
gateway), on a core of its own. All are started once, then measured alternately, round by round, so that a machine that
slows down slows all of them; a ratio is the median of the rounds' ratios. An answer that is wrong fails its gateway's
run: the cell is empty and the reason is printed; a peer that cannot be run here is named and left out.

    python bench/gateway/run.py [--only NAME...] [--scenario NAME...] [--quick] [--keep]

``direct`` is the load before the mock node without a gateway: the rig's own limit. Added times are over it.
"""

import argparse
import contextlib
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import report
from gateway import rig
from gateway.gateways import GATEWAYS, Gateway
from gateway.rig import Figures, Memory, RunError, Server

DIRECT = "direct"
RSGI, ASGI, VLLM, SMG, ENVOY, LITELLM, NGINX = (gateway.name for gateway in GATEWAYS)

NUM_SSE_EVENTS = 200
PACE_MS = 10
PACED_SSE_EVENTS = 300
LARGE_BYTES = 60_000
AGENT: Mapping[str, float | str] = {"body": LARGE_BYTES, "tools": 12}
"""Request of an agent: a long conversation and its tools."""


@dataclass(frozen=True)
class Scenario:
    """Scenario of the load. ``options`` are the load program's; ``too_slow`` are the gateways that it leaves out."""

    name: str
    connections: int
    options: Mapping[str, float | str] = field(default_factory=dict)
    is_timed: bool = True
    """Whether it runs for a time, or for some streams on each connection."""
    num_nodes: int = 1
    too_slow: Container[str] = frozenset()

    def run(self, port: int, server: Server | None, seconds: float) -> Figures:
        """Ask once."""
        timed = {"seconds": seconds, "warm": 0.2} if self.is_timed else {}
        return rig.run_load(port, self.connections, server, **timed, **self.options)


SCENARIOS = (
    Scenario("1", 1),
    Scenario("16", 16),
    Scenario("64", 64),
    Scenario("16_60k", 16, {"body": LARGE_BYTES}, too_slow={LITELLM}),
    Scenario("sse", 64, {"sse_events": NUM_SSE_EVENTS}),
    # At 6,400 SSE events a second, LiteLLM would show what a queue does.
    Scenario(
        "paced",
        64,
        {"sse_events": PACED_SSE_EVENTS, "pace": PACE_MS, "answers": 1, "spread": PACE_MS},
        is_timed=False,
        too_slow={LITELLM},
    ),
    Scenario("stream_1", 1, {"sse_events": 20, "pace": 5, "answers": 8}, is_timed=False, too_slow={LITELLM}),
    Scenario("64_limits", 64, num_nodes=2, too_slow={LITELLM}),
    Scenario("stream_60k", 16, {**AGENT, "sse_events": 50}, num_nodes=2, too_slow={LITELLM}),
    # 13 streams of 100 tokens a second: 1,300 SSE events a second.
    Scenario(
        "stream_60k_paced",
        13,
        {**AGENT, "sse_events": 100, "pace": PACE_MS, "answers": 2, "spread": PACE_MS, "late": 2},
        is_timed=False,
        num_nodes=2,
        too_slow={LITELLM},
    ),
)


class Table:
    """Every run's figures, by gateway and scenario, a round after another."""

    def __init__(self) -> None:
        self._runs: dict[tuple[str, str], list[Figures]] = {}
        self.failures: list[str] = []

    def run(self, name: str, scenario: Scenario, port: int, server: Server | None, seconds: float) -> None:
        """Measure a gateway once, and record the figures."""
        try:
            figures = scenario.run(port, server, seconds)
        except RunError as error:
            self.failures.append(f"{name}, {scenario.name}: {error}")
            return
        self._runs.setdefault((name, scenario.name), []).append(figures)

    def has(self, name: str, scenario: str) -> bool:
        """Return whether every run of it succeeded."""
        failed = any(failure.startswith(f"{name}, {scenario}: ") for failure in self.failures)
        return not failed and (name, scenario) in self._runs

    def values(self, name: str, scenario: str, figure: str) -> list[float]:
        """Return a figure of each round."""
        return [getattr(figures, figure) for figures in self._runs[name, scenario]]

    def median(self, name: str, scenario: str, figure: str) -> float | None:
        """Return a figure's median over the rounds, or ``None`` where a run failed or there was none."""
        return statistics.median(self.values(name, scenario, figure)) if self.has(name, scenario) else None

    def added(self, name: str, scenario: str, figure: str) -> float | None:
        """Return what a gateway adds to a figure over asking directly."""
        if name == DIRECT or not self.has(name, scenario) or not self.has(DIRECT, scenario):
            return None
        pairs = zip(self.values(name, scenario, figure), self.values(DIRECT, scenario, figure), strict=True)
        return statistics.median(own - direct for own, direct in pairs)

    def ratio(self, over: str, under: str, scenario: str, figure: str) -> float | None:
        """Return the median over the rounds of one gateway's figure over another's."""
        if not self.has(over, scenario) or not self.has(under, scenario):
            return None
        pairs = zip(self.values(over, scenario, figure), self.values(under, scenario, figure), strict=True)
        return statistics.median(one / other for one, other in pairs)

    def scenario_ratio(self, name: str, over: str, under: str, figure: str) -> float | None:
        """Return the median over the rounds of a gateway's figure in one scenario over that in another."""
        if not self.has(name, over) or not self.has(name, under):
            return None
        pairs = zip(self.values(name, over, figure), self.values(name, under, figure), strict=True)
        return statistics.median(one / other for one, other in pairs)


def rows(table: Table, names: Sequence[str], idle: Mapping[str, Memory]) -> list[dict[str, object]]:
    """Return the table that is printed: one figure a row, one gateway a column, medians of the rounds."""
    found: list[dict[str, object]] = []

    def add(figure: str, value: Callable[[str], float | None]) -> None:
        values = {name: value(name) for name in names}
        if any(value is not None for value in values.values()):
            found.append({"figure": figure, **values})

    def add_median(figure: str, scenario: str, attribute: str) -> None:
        add(figure, lambda name: table.median(name, scenario, attribute))

    def add_added(figure: str, scenario: str, attribute: str) -> None:
        add(figure, lambda name: table.added(name, scenario, attribute))

    def memory(name: str, attribute: str) -> float | None:
        return getattr(idle[name], attribute) / 2**20 if name in idle else None

    add_median("requests/s, 1 connection", "1", "answers_per_s")
    add_median("requests/s, 16", "16", "answers_per_s")
    add_median("requests/s, 64", "64", "answers_per_s")
    add_median("requests/s, 16, 60 KB asked", "16_60k", "answers_per_s")
    add_median("SSE events/s, 64 streams", "sse", "sse_events_per_s")
    add_median("CPU us a request, 16", "16", "cpu_answer_us")
    add_median("CPU us a request, 64", "64", "cpu_answer_us")
    add_median("CPU us a request, 60 KB", "16_60k", "cpu_answer_us")
    add_median("CPU us an SSE event, 64 streams", "sse", "cpu_sse_event_us")
    add_median("CPU us an SSE event, 64 paced", "paced", "cpu_sse_event_us")
    add_added("added ms, 1 connection", "1", "latency_ms")
    add_added("p99", "1", "latency_p99_ms")
    add_added("added ms, first token of 64", "paced", "first_ms")
    add_added("added ms, each token of 64", "paced", "delay_ms")
    add_added("p99", "paced", "delay_p99_ms")
    add_added("added ms, first token of 1", "stream_1", "first_ms")
    add_median("late SSE events of 160, 1 stream", "stream_1", "late")
    add_median("CPU us a request, 64, 2 nodes, limits", "64_limits", "cpu_answer_us")
    add_median("agents' streams/s, 16", "stream_60k", "answers_per_s")
    add_median("CPU us a stream", "stream_60k", "cpu_answer_us")
    add_median("CPU us an SSE event, 13 paced", "stream_60k_paced", "cpu_sse_event_us")
    add_added("added ms, first token of 13", "stream_60k_paced", "first_ms")
    add_added("added ms, each token of 13", "stream_60k_paced", "delay_ms")
    add_median("SSE events of 2,600 later than 2 ms", "stream_60k_paced", "late")
    add("idle RSS MiB, largest process", lambda name: memory(name, "largest_bytes"))
    add("idle PSS MiB, all processes", lambda name: memory(name, "total_bytes"))
    return found


def ratios(table: Table, subject: str, idle: Mapping[str, Memory]) -> dict[str, float]:
    """Return the figures that the targets bound; what could not be measured is left out."""
    added_1 = [table.added(name, "1", "latency_ms") for name in (subject, VLLM)]
    ttft_60k = [table.added(name, "stream_60k_paced", "first_ms") for name in (subject, VLLM)]
    found = {
        "rps_1": table.ratio(subject, VLLM, "1", "answers_per_s"),
        "rps_16": table.ratio(subject, VLLM, "16", "answers_per_s"),
        "rps_64": table.ratio(subject, VLLM, "64", "answers_per_s"),
        "rps_16_60k": table.ratio(subject, VLLM, "16_60k", "answers_per_s"),
        "sse": table.ratio(subject, SMG, "sse", "sse_events_per_s"),
        "rps_16_litellm": table.ratio(subject, LITELLM, "16", "answers_per_s"),
        "rps_16_nginx": table.ratio(subject, NGINX, "16", "answers_per_s"),
        "asgi_over_rsgi": table.ratio(ASGI, RSGI, "16", "answers_per_s"),
        "cpu_16": table.ratio(VLLM, subject, "16", "cpu_answer_us"),
        "cpu_64": table.ratio(VLLM, subject, "64", "cpu_answer_us"),
        "cpu_sse_event": table.ratio(VLLM, subject, "paced", "cpu_sse_event_us"),
        "latency_1": added_1[0] / added_1[1] if added_1[0] is not None and added_1[1] else None,
        "ttft_64_ms": table.added(subject, "paced", "first_ms"),
        "late_sse_events_1": table.median(subject, "stream_1", "late"),
        "stream_60k_rps": table.ratio(subject, VLLM, "stream_60k", "answers_per_s"),
        "stream_60k_cpu": table.ratio(VLLM, subject, "stream_60k", "cpu_answer_us"),
        "stream_60k_cpu_smg": table.ratio(SMG, subject, "stream_60k", "cpu_answer_us"),
        "stream_60k_cpu_nginx": table.ratio(subject, NGINX, "stream_60k", "cpu_answer_us"),
        "stream_60k_event_cpu": table.ratio(VLLM, subject, "stream_60k_paced", "cpu_sse_event_us"),
        "stream_60k_event_cpu_nginx": table.ratio(subject, NGINX, "stream_60k_paced", "cpu_sse_event_us"),
        "stream_60k_ttft_ms": ttft_60k[0] - ttft_60k[1]
        if ttft_60k[0] is not None and ttft_60k[1] is not None
        else None,
        "stream_60k_late": table.median(subject, "stream_60k_paced", "late"),
        "replicas_limits_cost": table.scenario_ratio(subject, "64_limits", "64", "cpu_answer_us"),
        "idle_rss_mib": idle[subject].largest_bytes / 2**20 if subject in idle else None,
    }
    return {name: value for name, value in found.items() if value is not None}


Running = dict[str, tuple[int, Server | None]]
"""Port and process of each gateway that runs, by its name."""


@contextlib.contextmanager
def started(chosen: Sequence[Gateway], nodes: Sequence[int], folder: pathlib.Path, table: Table) -> Iterator[Running]:
    """Run the gateways, all of them on the gateways' core; the idle ones only look after their nodes' health."""
    with contextlib.ExitStack() as stack:
        running: Running = {DIRECT: (nodes[0], None)}
        for gateway in chosen:
            own = folder / f"{gateway.name.replace(' ', '-')}-{len(nodes)}"
            own.mkdir()
            port = rig.free_ports()
            command = gateway.command(port, nodes, own)
            log = rig.BUILD / "logs" / f"{own.name}.log"
            server = Server(command.arguments, pinned=rig.cores()[:1], log=log, environment=command.environment)
            try:
                stack.enter_context(server).wait_for(port)
            except RunError as error:
                table.failures.append(f"{gateway.name}, start: {error}")
            else:
                running[gateway.name] = port, server
        yield running


def measure(
    chosen: Sequence[Gateway], scenarios: Sequence[Scenario], *, rounds: int, seconds: float
) -> tuple[Table, dict[str, Memory]]:
    """Start everything, run all rounds, and return the figures and what each gateway holds when idle."""
    table = Table()
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder = pathlib.Path(temporary)
        first_node = stack.enter_context(rig.mock(folder, num_ports=max(scenario.num_nodes for scenario in scenarios)))
        running: dict[int, Running] = {}
        for num_nodes in sorted({scenario.num_nodes for scenario in scenarios}):
            alike = [scenario for scenario in scenarios if scenario.num_nodes == num_nodes]
            needed = [gateway for gateway in chosen if any(gateway.name not in each.too_slow for each in alike)]
            nodes = range(first_node, first_node + num_nodes)
            running[num_nodes] = stack.enter_context(started(needed, nodes, folder, table))
        time.sleep(1.0)
        idle = {name: server.memory() for name, (_, server) in running[min(running)].items() if server}
        for number in range(rounds):
            for scenario in scenarios:
                for name, (port, server) in running[scenario.num_nodes].items():
                    if name not in scenario.too_slow:
                        table.run(name, scenario, port, server, seconds)
            print(f"round {number + 1} of {rounds} done", file=sys.stderr)
        if wrk := shutil.which("wrk"):
            check_with_wrk(wrk, first_node, table)
    return table, idle


def check_with_wrk(wrk: str, node: int, table: Table) -> None:
    """Compare the load with wrk, before the mock node: a wrong count of either would differ."""
    script = rig.BUILD / "wrk.lua"
    body = rig.chat_request(node).data
    assert isinstance(body, bytes)
    script.write_text(
        f"wrk.method = 'POST'\nwrk.path = '/v1/chat/completions'\nwrk.body = '{body.decode()}'\n"
        "wrk.headers['Content-Type'] = 'application/json'\n"
    )
    asked: list[rig.Word] = [wrk, "-t1", "-c16", "-d2s", "-s", script, f"http://127.0.0.1:{node}"]
    command = rig.on_cores(rig.cores()[1:], asked)
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rate = float(printed.partition("Requests/sec:")[2].split()[0])
    own = table.median(DIRECT, "16", "answers_per_s")
    print(f"direct, 16 connections: wrk {rate:,.0f} requests/s, the load {own or 0:,.0f}", file=sys.stderr)


def choose(options: argparse.Namespace) -> tuple[list[Gateway], list[str]]:
    """Return the gateways to run, and notes about the others."""
    chosen, notes = [], []
    for gateway in GATEWAYS:
        if options.only and gateway.name not in options.only:
            continue
        why = gateway.missing()
        if why:
            notes.append(f"{gateway.name} is left out: {why}")
        else:
            chosen.append(gateway)
    return chosen, notes


def main() -> None:
    """Measure and print."""
    parser = report.arguments(__doc__)
    names = [gateway.name for gateway in GATEWAYS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--scenario", nargs="+", choices=[scenario.name for scenario in SCENARIOS], metavar="NAME")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each run that is timed")
    parser.add_argument("--quick", action="store_true", help="one short round: to see that all works")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds = 1, 0.5
    chosen, notes = choose(options)
    scenarios = [scenario for scenario in SCENARIOS if not options.scenario or scenario.name in options.scenario]
    onlookers = rig.Onlookers()
    started_at = time.perf_counter()
    table, idle = measure(chosen, scenarios, rounds=options.rounds, seconds=options.seconds)
    seconds = time.perf_counter() - started_at
    own_cores = rig.cores()
    notes.append(f"{seconds:.0f} s; gateways on core {own_cores[0]}, load and mock node on core {own_cores[1]}")
    notes += onlookers.notes()
    running = [gateway.name for gateway in chosen]
    subject = RSGI if RSGI in running else ASGI
    if subject == ASGI:
        notes.append("The ratios are of cortex asgi: cortex rsgi was not measured.")
    notes += [f"FAILED {failure}" for failure in table.failures]
    report.write(
        "gateway",
        rows(table, [DIRECT, *running], idle),
        question="What does a gateway cost, one core for it, beside the others?",
        packages=["granian", "uvloop"],
        peers={gateway.name: gateway.version() for gateway in chosen if "cortex" not in gateway.name},
        ratios=ratios(table, subject, idle) if running else {},
        notes=notes,
        keep=options.keep,
    )
    if any(failure.startswith("cortex") for failure in table.failures):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
