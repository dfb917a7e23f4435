"""The shipped loop over a driver made of counters: order, faults, back-pressure, the watchdog, and leaks.

Over 450 lines: all tests share one rig, a loop on a thread over the fake driver.
"""

import contextlib
import ctypes
import logging
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import msgspec
import pytest

from neuron.device import _fake_driver as fake  # type: ignore[attr-defined]
from neuron.device.channel import Channel, ChannelClosed, MessageTooLong, socket_pair
from neuron.device.driver import DeviceFault, DriverError
from neuron.device.jobs import EXIT_CRASHED, EXIT_POISONED, EXIT_WEDGED, Poisoned
from neuron.device.loop import DeviceLoop, Handler

GRAPH = 0x77
PENDING = -2


class Script:
    """Handler made of two functions, for a message and for a step."""

    def __init__(
        self, handle: Callable[[bytes], object] = lambda message: None, step: Callable[[], object] = lambda: None
    ) -> None:
        self.handle = handle  # type: ignore[method-assign, assignment]
        self.step = step  # type: ignore[method-assign, assignment]
        self.busy = False

    def handle(self, message: bytes) -> None: ...
    def step(self) -> None: ...


def nothing(loop: DeviceLoop) -> Handler:
    return Script()


class Running:
    """Loop on a thread of its own, as in a worker; the test is the daemon."""

    def __init__(self, make: Callable[[DeviceLoop], Handler], **options: object) -> None:
        theirs, ours = socket_pair()
        self.daemon = Channel(ours)
        self.fd = theirs
        self.make = make
        self.options: dict[str, object] = {"driver": fake.capsule(), "ordinal": 0, "name": "cuda-dev-0"} | options
        self.status: int | None = None
        self.counts: tuple[int, ...] = ()
        self.seen = SimpleNamespace()
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._main)
        self.thread.start()

    def _main(self) -> None:
        try:
            with DeviceLoop(channel_fd=self.fd, **self.options) as loop:  # type: ignore[arg-type]
                self.seen.loop = loop
                self.status = loop.run(self.make(loop))
                self.seen.steps, self.seen.launches, self.seen.fault = loop.steps, loop.launches, loop.fault
            driver = loop.driver
            self.counts = driver.num_contexts, driver.num_streams, driver.num_events, driver.num_graph_execs
            self.seen.loop = None
        except Exception as error:  # noqa: BLE001 - raised again by join()
            self.error = error

    def join(self) -> int:
        self.thread.join(30)
        assert not self.thread.is_alive()
        if self.error is not None:
            raise self.error
        assert self.status is not None
        assert self.counts == (0, 0, 0, 0)
        return self.status

    def end(self) -> int:
        """Close the channel, as a daemon that died."""
        self.daemon.close()
        return self.join()


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    fake.reset()
    running: list[Running] = []

    def start_one(make: Callable[[DeviceLoop], Handler] = nothing, **options: object) -> Running:
        running.append(Running(make, **options))
        return running[-1]

    yield start_one
    for one in running:
        one.daemon.close()
        one.thread.join(30)
    assert fake.alive() == {"contexts": 0, "streams": 0, "events": 0}
    assert fake.misuse() == 0


# ------------------------------------------------------------------ the device and its thread


def test_order_of_a_life(start: Callable[..., Running]) -> None:
    running = start(lambda loop: Script(lambda message: loop.send(b"%d" % loop.replay(GRAPH, 2))))
    running.daemon.send(b"go")
    assert running.daemon.recv(30) == b"2"
    assert running.end() == 0
    assert fake.calls() == [
        "cuInit",
        "cuDeviceGet",
        "cuDevicePrimaryCtxRetain",
        "cuCtxSetCurrent",
        "cuStreamCreate",
        "cuEventCreate",
        "cuEventCreate",
        "cuGraphLaunch",
        "cuGraphLaunch",
        "cuStreamSynchronize",
        "cuEventDestroy_v2",
        "cuEventDestroy_v2",
        "cuStreamDestroy_v2",
        "cuCtxSetCurrent",
        "cuDevicePrimaryCtxRelease_v2",
    ]


def test_the_context_is_current_on_the_loops_thread_only(start: Callable[..., Running]) -> None:
    running = start(lambda loop: Script(lambda message: loop.send(b"%d" % fake.current_context())))
    running.daemon.send(b"?")
    assert int(running.daemon.recv(30)) != 0
    assert fake.current_context() == 0
    running.end()


def test_the_thread_has_the_devices_name(start: Callable[..., Running], wait_for: Callable[..., None]) -> None:
    def names() -> list[str]:
        found = []
        for task in pathlib.Path("/proc/self/task").glob("*/comm"):
            with contextlib.suppress(OSError):  # a thread that ends meanwhile
                found.append(task.read_text().strip())
        return found

    running = start(name="cuda-dev-1", ordinal=1, step_limit_s=60.0)
    wait_for(lambda: "cuda-dev-1" in names(), "the thread's name")
    wait_for(lambda: "watchdog" in names(), "the watchdog's name")
    running.end()
    wait_for(lambda: not {"cuda-dev-1", "watchdog"} & set(names()), "both to end")


@pytest.mark.parametrize("call", ["cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuStreamCreate"])
def test_a_device_that_cannot_be_taken_is_given_back(start: Callable[..., Running], call: str) -> None:
    fake.reset(faults_stick=False)
    fake.fail(call, 1, 2)
    running = start()
    with pytest.raises(DriverError, match=f"{call} returned 2"):
        running.join()
    with pytest.raises(ChannelClosed):
        running.daemon.recv(30)


@pytest.mark.parametrize("options", [{"name": ""}, {"name": "a-name-of-16-chr"}, {"step_limit_s": -1.0}])
def test_options_that_cannot_be(start: Callable[..., Running], options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"bytes|negative"):
        start(**options).join()


def test_memory(start: Callable[..., Running]) -> None:
    fake.reset(free=123, total=456)
    running = start(lambda loop: Script(lambda message: loop.send(repr(loop.memory()).encode())))
    running.daemon.send(b"?")
    assert running.daemon.recv(30) == b"(123, 456)"
    running.end()


def test_the_loop_is_its_threads_own(start: Callable[..., Running]) -> None:
    running = start(lambda loop: Script(lambda message: loop.send(message)))
    running.daemon.send(b"up")
    running.daemon.recv(30)
    loop: DeviceLoop = running.seen.loop
    for use in (loop.memory, lambda: loop.replay(GRAPH), lambda: loop.send(b""), lambda: loop.run(Script())):
        with pytest.raises(RuntimeError, match="cuda-dev-0 is used from another thread"):
            use()
    running.end()


def test_a_cpu_device(start: Callable[..., Running]) -> None:
    def handle(loop: DeviceLoop, message: bytes) -> None:
        for use in (lambda: loop.replay(GRAPH), lambda: loop.launch(GRAPH), lambda: loop.wait_for_words(0, 1, PENDING)):
            with pytest.raises(ValueError, match="no graphs"):
                use()
        free, total = loop.memory()
        assert 0 < free <= total
        assert (loop.stream, loop.driver.is_host) == (0, True)
        loop.send(b"fine")

    running = start(lambda loop: Script(lambda message: handle(loop, message)), driver=None, name="cpu-dev-0")
    running.daemon.send(b"?")
    assert running.daemon.recv(30) == b"fine"
    assert running.end() == 0
    assert fake.calls() == []


# ------------------------------------------------------------------ messages and steps


def test_messages_are_handled_in_order_and_between_steps(start: Callable[..., Running]) -> None:
    log: list[str] = []

    def make(loop: DeviceLoop) -> Handler:
        def handle(message: bytes) -> None:
            log.append(message.decode())
            script.busy = message not in (b"stop", b"idle")
            if message == b"idle":
                loop.send(b"received")

        def step() -> None:
            log.append("step")
            loop.send(b"stepped")

        script = Script(handle, step)
        return script

    running = start(make)
    running.daemon.send(b"go")
    for _ in range(3):
        assert running.daemon.recv(30) == b"stepped"
    running.daemon.send(b"still")
    running.daemon.send(b"stop")
    running.daemon.send(b"idle")
    while running.daemon.recv(30) != b"received":
        pass
    running.end()
    assert [entry for entry in log if entry != "step"] == ["go", "still", "stop", "idle"]
    assert log.count("step") == running.seen.steps >= 3
    assert log[log.index("stop") :] == ["stop", "idle"], "no step once it is not busy"


def test_a_flood_of_messages_does_not_starve_the_steps(start: Callable[..., Running]) -> None:
    log: list[bytes] = []
    released = threading.Event()

    def make(loop: DeviceLoop) -> Handler:
        def handle(message: bytes) -> None:
            released.wait(30)
            script.busy = True
            log.append(message)
            if message == b"last":
                loop.stop()

        script = Script(handle, lambda: log.append(b"step"))
        return script

    running = start(make)
    for _ in range(200):
        running.daemon.send(b"m")
    running.daemon.send(b"last")
    released.set()
    assert running.join() == 0
    assert log.index(b"step") == 64


def test_an_idle_loop_sleeps(start: Callable[..., Running]) -> None:
    cost: list[float] = []

    def make(loop: DeviceLoop) -> Handler:
        def handle(message: bytes) -> None:
            cost.append(time.thread_time())
            loop.send(b"ok")

        return Script(handle)

    running = start(make)
    running.daemon.send(b"before")
    running.daemon.recv(30)
    with pytest.raises(TimeoutError):
        running.daemon.recv(0.2)
    running.daemon.send(b"after")
    running.daemon.recv(30)
    running.end()
    assert cost[1] - cost[0] < 0.1


def test_stop_sends_queued_messages_first(start: Callable[..., Running]) -> None:
    long = bytes(5_000_000)
    running = start(lambda loop: Script(lambda message: (loop.send(long), loop.send(b"bye"), loop.stop())))
    running.daemon.send(b"end")
    assert [running.daemon.recv(30), running.daemon.recv(30)] == [long, b"bye"]
    assert running.join() == 0


def test_a_stop_before_the_loop_runs_is_not_forgotten(start: Callable[..., Running]) -> None:
    def make(loop: DeviceLoop) -> Handler:
        loop.stop()
        return Script()

    assert start(make).join() == 0


@pytest.mark.parametrize("busy", [False, True])
def test_a_daemon_that_is_gone_ends_the_loop(start: Callable[..., Running], busy: bool) -> None:
    def make(loop: DeviceLoop) -> Handler:
        script = Script(step=lambda: loop.send(b"a row"))
        script.busy = busy
        return script

    running = start(make)
    if busy:
        running.daemon.recv(30)
    assert running.end() == 0


def test_a_daemon_that_does_not_read_stops_the_steps(
    start: Callable[..., Running], wait_for: Callable[..., None]
) -> None:
    pending: list[int] = []  # after each row

    def make(loop: DeviceLoop) -> Handler:
        def step() -> None:
            loop.send(b"%d" % (len(pending) + 1) + bytes(10_000))
            pending.append(loop.channel.pending_bytes)
            script.busy = len(pending) < 1000

        script = Script(lambda message: loop.send(b"received"), step)
        script.busy = True
        return script

    running = start(make, queue_limit_bytes=100_000)
    wait_for(lambda: pending and pending[-1] > 100_000, "the queue to fill")
    stat = pathlib.Path(f"/proc/self/task/{running.thread.native_id}/stat")
    wait_for(lambda: stat.read_text().rpartition(")")[2].split()[0] == "S", "the loop to sleep")
    assert pending[-1] < 100_000 + 2 * 10_000, "one row over the limit at the most"
    assert len(pending) < 100
    for row in range(1, 1001):
        assert running.daemon.recv(30).startswith(b"%d\0" % row)
    running.daemon.send(b"?")
    assert running.daemon.recv(30) == b"received"
    running.end()


def test_a_daemon_that_dies_without_reading_ends_the_loop(start: Callable[..., Running]) -> None:
    def make(loop: DeviceLoop) -> Handler:
        script = Script(step=lambda: loop.send(bytes(100_000)))
        script.busy = True
        return script

    running = start(make, queue_limit_bytes=1000)
    running.daemon.recv(30)
    assert running.end() == 0


def test_a_message_over_the_bound_is_the_handlers_error(start: Callable[..., Running]) -> None:
    def make(loop: DeviceLoop) -> Handler:
        def handle(message: bytes) -> None:
            with pytest.raises(MessageTooLong):
                loop.send(bytes((64 << 20) + 1))
            loop.send(b"short")

        return Script(handle)

    running = start(make)
    running.daemon.send(b"?")
    assert running.daemon.recv(30) == b"short"
    running.end()


def test_an_exception_of_the_handler_ends_the_process_with_its_own_status(
    start: Callable[..., Running], caplog: pytest.LogCaptureFixture
) -> None:
    def handle(message: bytes) -> None:
        raise KeyError("seeded")

    running = start(lambda loop: Script(handle))
    running.daemon.send(b"?")
    assert running.join() == EXIT_CRASHED
    with pytest.raises(ChannelClosed):
        running.daemon.recv(30)
    assert "KeyError: 'seeded'" in caplog.text


# ------------------------------------------------------------------ replay and faults


def replayer(count: int, stop_on_message: bool = False) -> Callable[[DeviceLoop], Handler]:
    def make(loop: DeviceLoop) -> Handler:
        def handle(message: bytes) -> None:
            if message == b"go":
                loop.send(b"done %d" % loop.replay(GRAPH, count, stop_on_message=stop_on_message))

        return Script(handle)

    return make


@pytest.mark.parametrize("count", [0, 1, 2, 3, 1000])
@pytest.mark.parametrize("stop_on_message", [False, True])
def test_replay_counts(start: Callable[..., Running], count: int, stop_on_message: bool) -> None:
    running = start(replayer(count, stop_on_message))
    running.daemon.send(b"go")
    assert running.daemon.recv(30) == b"done %d" % count
    running.end()
    assert running.seen.launches == fake.count("cuGraphLaunch") == count
    assert fake.count("cuStreamSynchronize") == 1
    assert fake.most_under_way() == (min(count, 2) if stop_on_message else count)


def words(count: int, pending: int) -> "ctypes.Array[ctypes.c_int]":
    return (ctypes.c_int * count)(*[pending] * count)


@pytest.mark.parametrize(
    "form", ["replay", "replay that messages stop", "replay that the device stops", "single steps"]
)
def test_a_step_costs_no_call_beyond_its_launch(start: Callable[..., Running], form: str) -> None:
    """A graph ends with the sampled tokens in pinned memory, so the loop makes no further call of the driver."""
    rows = 64
    tokens = words(2 * rows, PENDING)
    all_ended = words(1, 0)

    def make(loop: DeviceLoop) -> Handler:
        def single() -> None:
            for step in range(1, 1001):
                tokens[(step - 1) % 2 * rows] = PENDING
                loop.launch(GRAPH)
                loop.wait_for_words(ctypes.addressof(tokens) + (step - 1) % 2 * rows * 4, rows, PENDING)

        def handle(message: bytes) -> None:
            if form == "single steps":
                single()
            else:
                stop_word = ctypes.addressof(all_ended) if "device" in form else 0
                stops = "messages" in form
                assert loop.replay(GRAPH, 1000, stop_on_message=stops, stop_word=stop_word) == 1000
            loop.send(b"done")

        return Script(handle)

    fake.publish_to(ctypes.addressof(tokens), 2, rows)
    running = start(make)
    running.daemon.send(b"go")
    assert running.daemon.recv(30) == b"done"
    running.end()
    assert fake.count("cuGraphLaunch") == 1000
    if form == "single steps":
        assert fake.count("cuEventRecord") == fake.count("cuStreamSynchronize") == 0
    else:
        assert fake.count("cuStreamSynchronize") == 1
        assert fake.count("cuEventRecord") == fake.count("cuEventSynchronize") + (form != "replay")


def test_tokens_are_read_before_the_step_behind_them_is_done(start: Callable[..., Running]) -> None:
    tokens = words(3 * 4, PENDING)
    seen: list[object] = []

    def make(loop: DeviceLoop) -> Handler:
        def handle(message: bytes) -> None:
            for _ in range(3):
                loop.launch(GRAPH)
            for row in range(2):
                loop.wait_for_words(ctypes.addressof(tokens) + 16 * row, 4, PENDING)
                seen.append((fake.num_finished(), list(tokens[4 * row : 4 * row + 4])))
            loop.wait_for_words(ctypes.addressof(tokens), 8, PENDING)  # which are there
            loop.send(b"done")

        return Script(handle)

    fake.publish_to(ctypes.addressof(tokens), 3, 4)
    running = start(make)
    running.daemon.send(b"go")
    assert running.daemon.recv(30) == b"done"
    running.end()
    assert seen == [(1, [1] * 4), (2, [2] * 4)]
    assert list(tokens[8:]) == [PENDING] * 4
    assert fake.calls().count("cuStreamQuery") == 2
    assert "cuStreamSynchronize" not in fake.calls()


@pytest.mark.parametrize(("at", "code"), [(1, 719), (3, 700)])
def test_a_fault_while_tokens_are_waited_for_poisons(start: Callable[..., Running], at: int, code: int) -> None:
    tokens = words(1, PENDING)

    def make(loop: DeviceLoop) -> Handler:
        def handle(message: bytes) -> None:
            for _ in range(9):
                loop.launch(GRAPH)
            loop.wait_for_words(ctypes.addressof(tokens), 1, PENDING)

        return Script(handle)

    fake.fail("cuStreamQuery", at, code)
    running = start(make)
    running.daemon.send(b"go")
    assert msgspec.msgpack.decode(running.daemon.recv(30), type=Poisoned).reason.startswith(
        f"cuStreamQuery returned {code}"
    )
    assert running.join() == EXIT_POISONED
    assert fake.count("cuStreamQuery") == at


def test_a_device_that_is_done_without_a_token_is_not_waited_for(start: Callable[..., Running]) -> None:
    tokens = words(1, PENDING)

    def make(loop: DeviceLoop) -> Handler:
        def handle(message: bytes) -> None:
            loop.launch(GRAPH)
            loop.wait_for_words(ctypes.addressof(tokens), 1, PENDING)

        return Script(handle)

    running = start(make)
    running.daemon.send(b"go")
    assert b"has not published its tokens" in running.daemon.recv(30)
    assert running.join() == EXIT_POISONED


def test_replay_stops_for_a_message(start: Callable[..., Running], wait_for: Callable[..., None]) -> None:
    fake.delay("cuEventSynchronize", 1000)  # a step
    running = start(replayer(1_000_000, stop_on_message=True))
    running.daemon.send(b"go")
    wait_for(lambda: fake.count("cuGraphLaunch") > 10, "the replay")
    running.daemon.send(b"cancel")
    assert 10 < int(running.daemon.recv(30).split()[1]) < 1_000_000
    running.end()


def test_a_message_that_waits_lets_one_step_run(start: Callable[..., Running]) -> None:
    released = threading.Event()

    def make(loop: DeviceLoop) -> Handler:
        def handle(message: bytes) -> None:
            released.wait(30)
            if message == b"go":
                loop.send(b"%d" % loop.replay(GRAPH, 1000, stop_on_message=True))

        return Script(handle)

    running = start(make)
    for message in (b"go", b"cancel"):
        running.daemon.send(message)
    released.set()
    assert running.daemon.recv(30) == b"1"
    running.end()


@pytest.mark.parametrize("stop_on_message", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_word_of_the_device_stops_a_run_of_steps(
    start: Callable[..., Running], steps: int, stop_on_message: bool
) -> None:
    """As when all sequences have ended: the step that writes the word and the one queued behind it are the last."""
    word = fake.stop_word_after(steps)

    def make(loop: DeviceLoop) -> Handler:
        def handle(message: bytes) -> None:
            done = loop.replay(GRAPH, 1000, stop_on_message=stop_on_message, stop_word=word)
            loop.send(b"done %d" % done)

        return Script(handle)

    running = start(make)
    running.daemon.send(b"go")
    assert running.daemon.recv(30) == b"done %d" % (steps + 1)
    running.end()
    assert running.seen.launches == fake.count("cuGraphLaunch") == steps + 1
    assert fake.most_under_way() == 2


def test_a_captured_graph_is_made_ready_and_owned(start: Callable[..., Running]) -> None:
    """Too little memory for a graph leaves the device as it was; any other failure does not."""
    errors: list[str] = []

    def make(loop: DeviceLoop) -> Handler:
        def handle(message: bytes) -> None:
            if message == b"more":
                loop.instantiate(0x51)
            graph = loop.instantiate(0x50)
            assert loop.driver.num_graph_execs == 1
            assert loop.replay(graph, 3) == 3
            try:
                loop.instantiate(0x51)
            except DriverError as error:
                errors.append(str(error))
                assert not isinstance(error, DeviceFault)
            assert loop.driver.num_graph_execs == 1
            loop.driver.destroy_graph_exec(graph)
            loop.send(b"%d" % loop.replay(graph, 2))

        return Script(handle)

    fake.reset(faults_stick=False)
    fake.fail("cuGraphInstantiateWithFlags", 2, 2)
    running = start(make)
    running.daemon.send(b"go")
    assert running.daemon.recv(30) == b"2"
    assert errors == ["cuGraphInstantiateWithFlags returned 2 (CUDA_ERROR_OUT_OF_MEMORY)"]
    assert running.seen.loop is not None
    fake.fail("cuGraphInstantiateWithFlags", 3, 719)
    running.daemon.send(b"more")
    assert b"cuGraphInstantiateWithFlags returned 719" in running.daemon.recv(30)
    assert running.join() == EXIT_POISONED


@pytest.mark.parametrize("at", [1, 2, 7])
@pytest.mark.parametrize("call", ["cuGraphLaunch", "cuStreamSynchronize", "cuEventRecord", "cuEventSynchronize"])
def test_a_fault_poisons(start: Callable[..., Running], caplog: pytest.LogCaptureFixture, call: str, at: int) -> None:
    fake.fail(call, at, 719)
    running = start(replayer(5, stop_on_message=True))
    answer = b"done 5"
    while answer == b"done 5":
        running.daemon.send(b"go")
        answer = running.daemon.recv(30)
    poisoned = msgspec.msgpack.decode(answer, type=Poisoned)
    assert poisoned.reason == f"{call} returned 719 (CUDA_ERROR_LAUNCH_FAILED)"
    assert running.join() == EXIT_POISONED
    with pytest.raises(ChannelClosed):
        running.daemon.recv(30)
    after = fake.calls()[[i for i, name in enumerate(fake.calls()) if name == call][at - 1] + 1 :]
    assert not [name for name in after if "Destroy" not in name and "Ctx" not in name], "nothing runs after a fault"
    assert isinstance(running.seen.fault, DeviceFault)
    assert "device fault" in caplog.text


def test_a_poisoned_loop_refuses_at_once(start: Callable[..., Running]) -> None:
    refusals: list[str] = []

    def make(loop: DeviceLoop) -> Handler:
        def handle(message: bytes) -> None:
            for use in (lambda: loop.replay(GRAPH, 3), loop.memory, lambda: loop.replay(GRAPH)):
                try:
                    use()
                except DeviceFault as fault:  # a handler that swallows it does not save the device
                    refusals.append(str(fault))

        return Script(handle)

    fake.fail("cuGraphLaunch", 2, 700)
    running = start(make)
    running.daemon.send(b"go")
    assert running.join() == EXIT_POISONED
    assert refusals == ["cuGraphLaunch returned 700 (CUDA_ERROR_ILLEGAL_ADDRESS)"] * 3
    assert (running.seen.launches, fake.count("cuGraphLaunch"), fake.count("cuMemGetInfo_v2")) == (1, 2, 0)


def test_a_failed_query_of_memory_poisons(start: Callable[..., Running]) -> None:
    fake.fail("cuMemGetInfo_v2", 1, 700)
    running = start(lambda loop: Script(lambda message: loop.memory()))
    running.daemon.send(b"?")
    assert running.join() == EXIT_POISONED


@pytest.mark.parametrize("error", [DeviceFault("torch", 700, "illegal memory access"), DriverError("cuX", 1, "y")])
def test_a_fault_that_the_handler_saw_poisons(start: Callable[..., Running], error: DriverError) -> None:
    def handle(message: bytes) -> None:
        raise error

    running = start(lambda loop: Script(handle))
    running.daemon.send(b"?")
    assert msgspec.msgpack.decode(running.daemon.recv(30), type=Poisoned).reason == str(error)
    assert running.join() == EXIT_POISONED


def test_graphs_go_with_the_loop(start: Callable[..., Running]) -> None:
    running = start(lambda loop: Script(lambda message: loop.driver.adopt_graph_exec(int(message))))
    for graph in (b"1", b"2", b"3"):
        running.daemon.send(graph)
    running.end()
    assert fake.count("cuGraphExecDestroy") == 3


# ------------------------------------------------------------------ the watchdog

WATCHED = """
import sys, time
from neuron.device.channel import Channel, socket_pair
from neuron.device.loop import DeviceLoop

class Handler:
    busy = False
    def handle(self, message):
        word = message.decode()
        if word == "long":
            loop.limit_s = 60.0
            time.sleep(0.4)
            loop.send(b"%g" % loop.limit_s)
        elif word == "unlimited":
            loop.limit_s = 0.0
            time.sleep(0.4)
        elif word == "short":
            loop.send(b"%g" % loop.limit_s)
        elif word == "step":
            self.busy = True
        elif word == "stop":
            loop.stop()
        else:
            time.sleep(60.0)
    def step(self):
        time.sleep(60.0)

ours, theirs = socket_pair()
daemon = Channel(ours)
for word in sys.argv[2:]:
    daemon.send(word.encode())
with DeviceLoop(None, 0, theirs, name="cpu-dev-0", step_limit_s=float(sys.argv[1])) as loop:
    sys.exit(loop.run(Handler()))
"""


@pytest.mark.parametrize("words", [["wedge"], ["step"], ["long", "wedge"], ["unlimited", "short", "step"]])
def test_the_watchdog_ends_a_wedged_process(words: list[str]) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", WATCHED, "0.1", *words], capture_output=True, text=True, timeout=50, check=False
    )
    assert ran.returncode == EXIT_WEDGED
    assert "cpu-dev-0: a step outlasted its limit, exiting with status 71" in ran.stderr


@pytest.mark.parametrize("limit_s", ["0.1", "0"])
def test_a_job_with_a_limit_of_its_own_is_left_alone(limit_s: str) -> None:
    command = [sys.executable, "-c", WATCHED, limit_s, "long", "short", "unlimited", "stop"]
    assert subprocess.run(command, timeout=50, check=False).returncode == 0


def test_waiting_is_not_watched(start: Callable[..., Running]) -> None:
    running = start(lambda loop: Script(lambda message: loop.send(message)), step_limit_s=0.01)
    for _ in range(3):
        with pytest.raises(TimeoutError):
            running.daemon.recv(0.05)
        running.daemon.send(b"still there")
        assert running.daemon.recv(30) == b"still there"
    running.end()


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
