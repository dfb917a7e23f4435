"""The bench's rig: its two C programs, pinned processes, and what processes cost.

A gateway runs on one core, the load and the mock node on another, so that neither takes the other's time. CPU time is
of a gateway's whole tree of processes, read around a run and divided by all answers of that run.
"""

import contextlib
import ctypes
import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import psutil

from cortex.wire.node import (
    Capability,
    Device,
    DeviceKind,
    Discovery,
    Health,
    ModelList,
    ModelState,
    ModelStatus,
    NodeState,
    WorkerState,
)

Word = str | os.PathLike[str]
"""Word of a command line."""

HERE = pathlib.Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "gateway"
CFLAGS = ("-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror")

KEY = "sk-bench-0123456789abcdef0123456789abcdef"
"""API key that the load presents, and the only key that cortex and LiteLLM accept."""

GIB = 1024**3
DEVICE = Device("cpu:0", DeviceKind.CPU, "mock", 32 * GIB, 16 * GIB, worker=WorkerState.READY)
MODEL = ModelStatus(
    "m", ModelState.READY, source="/m", devices=("cpu:0",), capabilities=(Capability.CHAT,), context_tokens=65536
)
OPENAI_MODELS = {"object": "list", "data": [{"id": "m", "object": "model", "created": 1, "owned_by": "mock"}]}
SERVER_INFO = {"model_path": "m", "model_id": "m", "served_model_name": "m", "tp_size": 1, "dp_size": 1}
DISCOVERY = Discovery("mock", "0", "mock", "linux", None, None, (DEVICE,), ("torch",), ("openai-chat",))
HEALTH = Health(NodeState.READY, 0.0, ())
PAGES: Mapping[str, object] = {
    # Answers of a neuron to its gateway,
    "/discovery": DISCOVERY,
    "/health": HEALTH,
    "/models": ModelList((MODEL,)),
    # and of a worker to the other routers.
    "/v1/models": OPENAI_MODELS,
    "/get_server_info": SERVER_INFO,
    "/server_info": SERVER_INFO,
    "/get_model_info": {"model_path": "m", "is_generation": True},
    "/model_info": {"model_path": "m", "is_generation": True},
    "/version": {"version": "0"},
}


class RunError(Exception):
    """A run gave no figure: a gateway answered wrong or not at all, or did not start."""


def build(name: str) -> pathlib.Path:
    """Compile ``NAME.c`` if it has changed, and return the program."""
    source, program = HERE / f"{name}.c", BUILD / name
    sources = (source, HERE / "shared.h")
    if not program.exists() or program.stat().st_mtime < max(path.stat().st_mtime for path in sources):
        BUILD.mkdir(parents=True, exist_ok=True)
        subprocess.run([os.environ.get("CC", "gcc"), *CFLAGS, "-o", program, source], check=True)
    return program


def cores() -> tuple[int, int]:
    """Return the core for gateways and the core for the load: the first and the last that may be used."""
    usable = sorted(os.sched_getaffinity(0))
    return usable[0], usable[-1]


def on_cores(pinned: Sequence[int], command: Sequence[Word]) -> list[Word]:
    """Return a command that runs ``command`` on these cores alone."""
    return ["taskset", "--cpu-list", ",".join(map(str, pinned)), *command]


def free_ports(count: int = 1) -> int:
    """Return the first of ``count`` ports of 127.0.0.1 that are free and follow one another."""
    while True:
        with contextlib.ExitStack() as stack:
            first = 0
            try:
                for i in range(count):
                    trial = stack.enter_context(socket.socket())
                    trial.bind(("127.0.0.1", first + i if first else 0))
                    first = first or int(trial.getsockname()[1])
            except (OSError, OverflowError):
                continue
            return first


def cpu_s(pid: int) -> float:
    """Return a process's CPU seconds, by ``clock_getcpuclockid`` of the C library, which Python does not wrap.

    It counts nanoseconds, where ``/proc`` counts hundredths of a second.
    """
    clock = ctypes.c_int()
    if error := ctypes.CDLL(None).clock_getcpuclockid(pid, ctypes.byref(clock)):
        raise ProcessLookupError(error, os.strerror(error))
    return time.clock_gettime(clock.value)


@dataclass(frozen=True)
class Memory:
    """Memory of a gateway: its largest process, and all of them with shared pages counted once."""

    largest_bytes: int
    total_bytes: int


class Server:
    """A process, with what it has started itself, pinned to cores and stopped at the end of the block."""

    def __init__(
        self,
        command: Sequence[Word],
        *,
        pinned: Sequence[int],
        log: pathlib.Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._command = command
        self._name = pathlib.Path(command[0]).name
        self._cores = pinned
        self._environment = {**os.environ, **(environment or {})}
        self.log = log

    def __enter__(self) -> "Server":
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self._running = subprocess.Popen(
                on_cores(self._cores, self._command),
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        self._process = psutil.Process(self._running.pid)
        return self

    def __exit__(self, *exc_info: object) -> None:
        tree = self.processes()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._running.pid, signal.SIGTERM)
        _, left = psutil.wait_procs(tree, timeout=10)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._running.wait()

    def processes(self) -> list[psutil.Process]:
        """Return the process and all that descend from it."""
        try:
            return [self._process, *self._process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def check(self) -> None:
        """Raise :class:`RunError` if the process has ended."""
        if self._running.poll() is not None:
            tail = self.log.read_text(errors="replace")[-2000:]
            raise RunError(f"{self._name} ended with status {self._running.returncode}:\n{tail}")

    def cpu_s(self) -> float:
        """Return the CPU seconds of all processes."""
        return sum(cpu_s(process.pid) for process in self.processes())

    def memory(self) -> "Memory":
        """Return what the processes hold now."""
        found = [process.memory_full_info() for process in self.processes()]
        return Memory(max(int(info.rss) for info in found), sum(int(info.pss) for info in found))

    def wait_for(self, port: int, request: urllib.request.Request | None = None, *, limit_s: float = 90.0) -> None:
        """Wait until ``request`` (a chat request, if none is given) is answered with 200."""
        request = request or chat_request(port)
        deadline = time.monotonic() + limit_s
        while True:
            self.check()
            try:
                with urllib.request.urlopen(request, timeout=5) as reply:
                    reply.read()
                    return
            except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
                if time.monotonic() > deadline:
                    tail = self.log.read_text(errors="replace")[-2000:]
                    raise RunError(f"{self._name} does not answer: {error}\n{tail}") from None
            time.sleep(0.1)


def chat_request(port: int) -> urllib.request.Request:
    """Return a request as the load's, without a stream."""
    marker = "#" + "0" * 16
    body = {"model": "m", "messages": [{"role": "user", "content": marker}]}
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    return urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", msgspec.json.encode(body), headers)


@contextlib.contextmanager
def mock(folder: pathlib.Path, *, num_ports: int = 1) -> Iterator[int]:
    """Run the mock node on the load's core; give its first port."""
    arguments = []
    for path, page in PAGES.items():
        file = folder / f"page{path.replace('/', '-')}.json"
        file.write_bytes(msgspec.json.encode(page))
        arguments.append(f"{path}={file}")
    port = free_ports(num_ports)
    command: list[Word] = [build("mock"), str(port), str(num_ports), *arguments]
    with Server(command, pinned=cores()[1:], log=folder / "mock.log") as server:
        server.wait_for(port)
        yield port


def counts(port: int) -> dict[str, int]:
    """Return what the mock node has served."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/counts", timeout=5) as reply:
        return msgspec.json.decode(reply.read(), type=dict[str, int])


@dataclass(frozen=True)
class Figures:
    """Figures of one run: times in ms, CPU in us per answer and per SSE event; 0 where not measured."""

    answers_per_s: float
    sse_events_per_s: float
    latency_ms: float
    latency_p99_ms: float
    first_ms: float
    first_p99_ms: float
    delay_ms: float
    """From an SSE event's leaving the node to its being read."""
    delay_p99_ms: float
    cpu_answer_us: float
    cpu_sse_event_us: float
    late: float
    """SSE events that took more than 35 ms."""
    load_share: float
    """Share of its core that the load took: near 1 together with the mock's, the gateway was not the bottleneck."""

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of all figures."""
        return [field.name for field in dataclasses.fields(cls)]


def load_command(port: int, connections: int, **options: float | str) -> list[str]:
    """Return the load's command line."""
    command = [str(build("load")), str(port), str(connections), "--key", KEY]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    return command


def read_figures(stdout: str, stderr: str, status: int) -> dict[str, float]:
    """Return what the load printed.

    Raises:
        RunError: it ended otherwise.
    """
    if status:
        raise RunError(stderr.strip())
    return msgspec.json.decode(stdout, type=dict[str, float])


def run_load(port: int, connections: int, server: Server | None, **options: float | str) -> Figures:
    """Ask a gateway, whose tree of processes is ``server``, and return what it did.

    Raises:
        RunError: an answer was wrong, or there was none.
    """
    command = load_command(port, connections, **options)
    before_s = server.cpu_s() if server else 0.0
    started = time.perf_counter()
    try:
        done = subprocess.run(on_cores(cores()[1:], command), capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        raise RunError("the load did not end within 180 s") from None
    elapsed_s = time.perf_counter() - started
    if server:
        server.check()
    used_s = server.cpu_s() - before_s if server else 0.0
    found = read_figures(done.stdout, done.stderr, done.returncode)
    return Figures(
        answers_per_s=found["answers"] / found["seconds"],
        sse_events_per_s=found["sse_events"] / found["seconds"],
        latency_ms=found.get("latency_p50_us", 0.0) / 1e3,
        latency_p99_ms=found.get("latency_p99_us", 0.0) / 1e3,
        first_ms=found.get("first_p50_us", 0.0) / 1e3,
        first_p99_ms=found.get("first_p99_us", 0.0) / 1e3,
        delay_ms=found.get("delay_p50_us", 0.0) / 1e3,
        delay_p99_ms=found.get("delay_p99_us", 0.0) / 1e3,
        cpu_answer_us=used_s * 1e6 / found["total_answers"],
        cpu_sse_event_us=used_s * 1e6 / found["total_sse_events"] if found["total_sse_events"] else 0.0,
        late=found["late"],
        load_share=found["cpu_s"] / elapsed_s,
    )


class Onlookers:
    """CPU time of other processes while the bench ran, which the notes report."""

    def __init__(self) -> None:
        self._others_s, self._started = self._others(), time.perf_counter()

    def notes(self) -> list[str]:
        """Return the notes, once all processes of the bench have ended."""
        elapsed_s = (time.perf_counter() - self._started) * (os.cpu_count() or 1)
        share = (self._others() - self._others_s) / elapsed_s
        if share < 0.03:
            return []
        return [f"Others took {share:.0%} of the machine meanwhile: compare CPU times, and ratios with care."]

    @staticmethod
    def _others() -> float:
        all_, own = psutil.cpu_times(), os.times()
        busy_s = sum(all_) - all_.idle - all_.iowait - all_.guest - all_.guest_nice
        return float(busy_s - own.user - own.system - own.children_user - own.children_system)


def save(path: pathlib.Path, value: object) -> pathlib.Path:
    """Write ``value`` as JSON, which is YAML too."""
    path.write_text(json.dumps(value))
    return path
