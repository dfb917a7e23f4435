"""Real worker processes: answers, deaths of every kind, replacement, and a bounded end.

Over 450 lines: all tests share one rig, a worker process with faults on request.
"""

import array
import asyncio
import contextlib
import logging
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine

import psutil
import pytest
import uvloop
from row_queue import RowQueue

from cortex.wire.errors import ApiError, OverloadedError, RemoteError
from cortex.wire.node import ModelSpec, WorkerHealth, WorkerState
from neuron.device import worker as worker_module
from neuron.device.jobs import Generate, LoadedModel, SamplerSettings, SequenceEnd, TokenRow
from neuron.device.process import reason_of
from neuron.device.worker import RestartPolicy, Worker
from neuron.errors import DeviceWorkerLostError, DeviceWorkerNotReadyError

ECHO = [sys.executable, str(pathlib.Path(__file__).parent / "echo_worker.py")]
QUICK = RestartPolicy(first_delay_s=0.01, max_delay_s=0.08, ready_timeout_s=60.0)
PROMPT = array.array("i", [11, 22, 33])
ENDLESS = 1 << 30

S = WorkerState


class StateReceiver:
    """Receiver of a worker's states."""

    def __init__(self) -> None:
        self.reported: list[WorkerHealth] = []
        self.changed = asyncio.Event()

    def __call__(self, health: WorkerHealth) -> None:
        self.reported.append(health)
        self.changed.set()

    def states(self) -> list[WorkerState]:
        return [health.state for health in self.reported]

    async def until(self, *states: WorkerState) -> None:
        """Wait until the last states were ``states``."""
        async with asyncio.timeout(60):
            while self.states()[-len(states) :] != list(states):
                self.changed.clear()
                await self.changed.wait()


@contextlib.asynccontextmanager
async def echo(
    device: str = "cpu:0", *, policy: RestartPolicy = QUICK, **environment: str
) -> AsyncIterator[tuple[Worker, StateReceiver]]:
    receiver = StateReceiver()
    worker = Worker(device, ECHO, environment=environment, on_state=receiver, policy=policy)
    await worker.start()
    try:
        yield worker, receiver
    finally:
        await worker.stop(30)


def run(
    main: Callable[[], Coroutine[object, object, None]],
    loops: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop,
) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(100):
            await main()

    with asyncio.Runner(loop_factory=loops) as runner:
        runner.run(bounded())


async def nothing() -> None: ...


@pytest.fixture(scope="session", autouse=True)
def uvloop_is_warm() -> None:
    """Run a loop once: uvloop's first loop opens a pipe for forks and keeps it, which would be counted as a leak."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(nothing())


def spec(source: str = "here") -> ModelSpec:
    return ModelSpec("m", source)


def generate(worker: Worker, max_tokens: int, sink: Callable[[TokenRow | ApiError], None], model: str = "m") -> int:
    return worker.run(Generate(0, model, PROMPT.tobytes(), max_tokens, (), SamplerSettings()), sink)


def pid_of(worker: Worker) -> int:
    assert worker.ready is not None
    return worker.ready.pid


async def collect(queue: RowQueue) -> tuple[list[int], SequenceEnd | None]:
    ids, end = array.array("i"), None
    async for rows in queue:
        for row in rows:
            ids.frombytes(row.ids)
            end = row.end
    return list(ids), end


# ------------------------------------------------------------------ jobs and sequences


def test_a_life_without_incident() -> None:
    async def main() -> None:
        async with echo() as (worker, receiver):
            assert worker.ready is not None
            assert worker.ready.device == "cpu:0"
            assert psutil.Process(pid_of(worker)).ppid() == os.getpid()
            assert os.getpgid(pid_of(worker)) == pid_of(worker)
            steps: list[float] = []
            loaded = await worker.load(spec(), "progress", progress=steps.append)
            assert loaded == LoadedModel("m", "echo", "none", 64, 8, 1000, 2000)
            assert steps == [0.0, 0.5, 1.0]
            assert (await worker.memory()).free_bytes > 0
            queue = RowQueue()
            generate(worker, 5, queue)
            assert await collect(queue) == ([11, 22, 33, 11, 22], SequenceEnd.LENGTH)
            await worker.unload("m")
            assert worker.health() == WorkerHealth("cpu:0", S.READY, 0, generated=5)
        assert receiver.states() == [S.STARTING, S.READY, S.STOPPED]

    run(main)


def test_errors_of_one_request_are_its_own() -> None:
    async def main() -> None:
        async with echo() as (worker, receiver):
            with pytest.raises(RemoteError, match=r"needs 18\.2 GiB") as refused:
                await worker.load(spec(), "refuse")
            assert (refused.value.status, refused.value.code) == (422, "does_not_fit")
            queue = RowQueue()
            generate(worker, 5, queue, model="broken")
            with pytest.raises(RemoteError, match="no such thing"):
                await collect(queue)
            assert receiver.states() == [S.STARTING, S.READY]

    run(main)


def test_many_sequences_are_woken_once_a_message() -> None:
    async def main() -> None:
        async with echo() as (worker, _):
            rows: dict[int, list[TokenRow]] = {}

            def sink_of(n: int) -> Callable[[TokenRow | ApiError], None]:
                rows[n] = []

                def sink(item: TokenRow | ApiError) -> None:
                    assert isinstance(item, TokenRow)
                    rows[n].append(item)

                return sink

            numbers = [generate(worker, 20, sink_of(n)) for n in range(50)]
            queue = RowQueue()
            generate(worker, 100, queue)
            await collect(queue)
            assert len(set(numbers)) == 50
            for n, number in enumerate(numbers):
                assert [row.sequence for row in rows[n]] == [number] * 20
                assert [row.prompt_cached for row in rows[n]] == [0] + [None] * 19
                assert [row.end for row in rows[n]] == [None] * 19 + [SequenceEnd.LENGTH]

    run(main)


def test_a_row_queue_gives_all_that_came() -> None:
    async def main() -> None:
        queue = RowQueue()
        first, second, last = (TokenRow(1, bytes(4)), TokenRow(1, bytes(4)), TokenRow(1, b"", SequenceEnd.STOP))
        reader = asyncio.ensure_future(anext(queue))
        await asyncio.sleep(0)
        queue(first)
        queue(second)
        assert await reader == [first, second]
        reader = asyncio.ensure_future(anext(queue))
        await asyncio.sleep(0)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        queue(last)
        assert [rows async for rows in queue] == [[last]]
        failed = RowQueue()
        failed(first)
        failed(DeviceWorkerLostError("gone"))
        assert await anext(failed) == [first]
        with pytest.raises(DeviceWorkerLostError):
            await anext(failed)

    run(main)


def test_a_cancelled_sequence_sends_nothing_more() -> None:
    async def main() -> None:
        async with echo() as (worker, _):
            rows: list[object] = []
            first = asyncio.Event()

            def sink(item: object) -> None:
                rows.append(item)
                first.set()

            number = generate(worker, ENDLESS, sink)
            await first.wait()
            worker.cancel(number)
            worker.cancel(number)
            worker.cancel(12345)
            seen = len(rows)
            await worker.memory()  # answered after the cancellation
            assert len(rows) == seen
            queue = RowQueue()
            generate(worker, 1, queue)
            await collect(queue)
            assert worker.running == 0, "the worker has let go of it too"

    run(main)


def test_a_sink_that_fails_affects_no_other_sequence(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with echo() as (worker, _):

            def broken(item: object) -> None:
                raise KeyError("seeded")

            generate(worker, ENDLESS, broken)
            queue = RowQueue()
            generate(worker, 3, queue)
            assert (await collect(queue))[0] == [11, 22, 33]

    run(main)
    assert "sink of sequence 1 failed" in caplog.text


def test_a_cancelled_wait_leaves_the_worker_well() -> None:
    async def main() -> None:
        async with echo() as (worker, _):
            waiting = asyncio.ensure_future(worker.load(spec(), "progress"))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await worker.memory()

    run(main)


def test_a_worker_that_does_not_read_is_not_buried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "MAX_PENDING_BYTES", 1_000_000)

    async def main() -> None:
        async with echo() as (worker, _):
            lost = asyncio.ensure_future(worker.load(spec(), "wedge"))
            await asyncio.sleep(0)
            many = [Generate(0, "m", bytes(100_000), 1, (), SamplerSettings())] * 100
            with pytest.raises(OverloadedError, match="does not read"):
                _ = [worker.run(asked, lambda item: None) for asked in many]
            await worker.stop(0)
            with pytest.raises(DeviceWorkerLostError, match="was stopped"):
                await lost

    run(main)


def test_a_long_prompt_goes_through_in_pieces() -> None:
    async def main() -> None:
        async with echo() as (worker, _):
            queue = RowQueue()
            prompt = array.array("i", range(1_000_000))
            worker.run(Generate(0, "m", prompt.tobytes(), 2, (), SamplerSettings()), queue)
            assert (await collect(queue))[0] == [0, 1]

    run(main)


# ------------------------------------------------------------------ death and replacement

DEATHS = [
    ("die", "killed by SIGABRT"),
    ("exit", "exited with status 9"),
    ("leave", "exited by itself"),
    ("crash", "its engine crashed; the log has the traceback"),
    ("fault", "device fault: cuGraphLaunch returned 719 (CUDA_ERROR_LAUNCH_FAILED)"),
    ("wedge", "a step outlasted its limit"),
    ("garbage", "sent a message that does not parse: MessagePack data is malformed: invalid opcode '\\xc1' (byte 0)"),
    ("shut", "closed its channel and did not exit"),
]


@pytest.mark.parametrize(("how", "reason"), DEATHS, ids=[how for how, _ in DEATHS])
def test_a_death_fails_running_work_and_the_process_is_replaced(how: str, reason: str) -> None:
    async def main() -> None:
        async with echo("cuda:0", ECHO_LIMIT_S="0.5" if how == "wedge" else "0") as (worker, receiver):
            before = pid_of(worker)
            queue = RowQueue()
            generate(worker, ENDLESS, queue)
            await anext(queue)
            for doomed in (worker.load(spec(), how), collect(queue)):
                with pytest.raises(DeviceWorkerLostError) as lost:
                    await doomed
                assert (lost.value.status, lost.value.code) == (503, "device_worker_lost")
                assert lost.value.retry_after_s is not None
                assert reason in lost.value.message
            await receiver.until(S.READY, S.POISONED, S.RECOVERING, S.READY)
            assert [health.fault for health in receiver.reported] == [None, None, reason, reason, reason]
            assert (worker.restarts, pid_of(worker) != before) == (1, True)
            again = RowQueue()
            generate(worker, 3, again)
            assert (await collect(again))[0] == [11, 22, 33]

    run(main)


@pytest.mark.parametrize("loops", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_killed_in_the_middle_of_a_stream(loops: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def main() -> None:
        async with echo() as (worker, receiver):
            queues = [RowQueue() for _ in range(20)]
            numbers = [generate(worker, ENDLESS, queue) for queue in queues]
            for queue in queues:
                await anext(queue)
            os.kill(pid_of(worker), signal.SIGKILL)
            for queue in queues:
                with pytest.raises(DeviceWorkerLostError, match="killed by SIGKILL"):
                    await collect(queue)
            assert S.POISONED in receiver.states()
            assert (worker.running, worker.waiting) == (0, 0)
            with pytest.raises(DeviceWorkerNotReadyError) as refused:
                generate(worker, 1, queues[0])
            assert refused.value.status == 503
            with pytest.raises(DeviceWorkerNotReadyError):
                await worker.memory()
            await receiver.until(S.RECOVERING, S.READY)
            again = RowQueue()
            assert generate(worker, 1, again) > max(numbers), "numbers are never used twice"
            await collect(again)

    run(main, loops)


def test_the_owner_reloads_before_sequences_are_taken() -> None:
    async def main() -> None:
        async with echo() as (worker, receiver):
            reloaded: list[str] = []

            async def reload() -> None:
                assert worker.state is S.RECOVERING
                with pytest.raises(DeviceWorkerNotReadyError, match="is recovering"):
                    generate(worker, 1, lambda item: None)
                reloaded.append((await worker.load(spec(), "ok")).model)
                assert worker.state is S.RECOVERING

            worker.on_restarted = reload
            os.kill(pid_of(worker), signal.SIGKILL)
            await receiver.until(S.RECOVERING, S.READY)
            assert reloaded == ["m"]

    run(main)


def test_a_reload_that_fails_leaves_a_worker_without_models(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with echo() as (worker, receiver):

            async def reload() -> None:
                await worker.load(spec(), "refuse")

            worker.on_restarted = reload
            os.kill(pid_of(worker), signal.SIGKILL)
            await receiver.until(S.RECOVERING, S.READY)

    run(main)
    assert "reloading after a restart failed" in caplog.text


def test_a_death_while_reloading_is_another_death() -> None:
    async def main() -> None:
        async with echo() as (worker, receiver):
            tries = 0
            cancelled = False

            async def reload() -> None:
                nonlocal tries, cancelled
                tries += 1
                if tries == 1:
                    await worker.load(spec(), "die")
                elif tries == 2:
                    os.kill(pid_of(worker), signal.SIGKILL)
                    try:
                        await asyncio.Event().wait()
                    finally:
                        cancelled = True

            worker.on_restarted = reload
            os.kill(pid_of(worker), signal.SIGKILL)
            await receiver.until(S.RECOVERING, S.READY)
            assert receiver.states() == [S.STARTING, S.READY, *[S.POISONED, S.RECOVERING] * 3, S.READY]
            assert (tries, cancelled, worker.restarts) == (3, True, 3)

    run(main)


def test_replacements_that_do_not_start_are_retried(tmp_path: pathlib.Path) -> None:
    async def main() -> None:
        async with echo(ECHO_START=f"count:{tmp_path / 'starts'}:3") as (worker, receiver):
            os.kill(pid_of(worker), signal.SIGKILL)
            await receiver.until(S.RECOVERING, S.READY)
            assert (tmp_path / "starts").stat().st_size == 5
            assert worker.restarts == 1
            assert [health.fault for health in receiver.reported if health.state is S.POISONED] == [
                "killed by SIGKILL",
                *["exited with status 5"] * 3,
            ]

    run(main)


def test_a_program_that_vanishes_is_retried(tmp_path: pathlib.Path) -> None:
    program = tmp_path / "program"
    program.write_text(f'#!/bin/sh\nexec {ECHO[0]} {ECHO[1]} "$@"\n')
    program.chmod(0o755)

    async def main() -> None:
        receiver = StateReceiver()
        worker = Worker("cpu:0", [str(program)], on_state=receiver, policy=QUICK)
        await worker.start()
        program.rename(tmp_path / "gone")
        os.kill(pid_of(worker), signal.SIGKILL)
        async with asyncio.timeout(30):
            while not (worker.fault or "").startswith("cannot be started"):
                await asyncio.sleep(0)
        (tmp_path / "gone").rename(program)
        await receiver.until(S.RECOVERING, S.READY)
        await worker.stop()

    run(main)


def test_the_pause_grows_and_is_bounded() -> None:
    policy = RestartPolicy(first_delay_s=0.5, max_delay_s=30.0)
    assert [policy.delay_s(n) for n in (1, 2, 3, 6, 7, 8, 10_000)] == [0.5, 1.0, 2.0, 16.0, 30.0, 30.0, 30.0]


@pytest.mark.parametrize(("healthy_after_s", "expected"), [(0.0, ["0.02", "0.02"]), (3600.0, ["0.02", "0.04"])])
def test_a_healthy_life_is_forgiven(
    healthy_after_s: float, expected: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        policy = RestartPolicy(first_delay_s=0.02, healthy_after_s=healthy_after_s)
        async with echo(policy=policy) as (worker, receiver):
            for deaths in (1, 2):
                os.kill(pid_of(worker), signal.SIGKILL)
                await receiver.until(S.STARTING, S.READY, *[S.POISONED, S.RECOVERING, S.READY] * deaths)

    run(main)
    assert re.findall(r"restart in ([\d.]+) s", caplog.text) == expected


@pytest.mark.parametrize("how", ["exit:3", "other"])
def test_a_failed_first_start_reports_the_reason(how: str) -> None:
    async def main() -> None:
        receiver = StateReceiver()
        worker = Worker("cpu:0", ECHO, environment={"ECHO_START": how}, on_state=receiver, policy=QUICK)
        with pytest.raises(DeviceWorkerLostError, match=r"exited with status 3|reported ready for cuda:9"):
            await worker.start()
        assert receiver.states() == [S.STARTING, S.STOPPED]
        await worker.stop()

    run(main)


def test_a_worker_that_is_never_ready_is_given_up() -> None:
    async def main() -> None:
        policy = RestartPolicy(ready_timeout_s=0.3)
        worker = Worker("cpu:0", ECHO, environment={"ECHO_START": "sleep"}, policy=policy)
        with pytest.raises(DeviceWorkerLostError, match=r"was not ready within 0\.3 s"):
            await worker.start()

    run(main)


def test_no_such_program() -> None:
    async def main() -> None:
        with pytest.raises(DeviceWorkerLostError, match=r"cannot be started: .*no-such-program"):
            await Worker("cpu:0", ["/no-such-program"]).start()

    run(main)


def test_an_answer_of_the_wrong_kind_is_the_end_of_it() -> None:
    async def main() -> None:
        async with echo() as (worker, receiver):
            with pytest.raises(DeviceWorkerLostError, match="answered a load with NoneType"):
                await worker.load(spec(), "mislead")
            await receiver.until(S.POISONED, S.RECOVERING, S.READY)
            assert worker.fault == "answered a load with NoneType"

    run(main)


def test_reasons() -> None:
    assert reason_of(-signal.SIGKILL) == "killed by SIGKILL"
    assert reason_of(-60) == "killed by signal 60"
    assert reason_of(4) == "exited with status 4"


# ------------------------------------------------------------------ the end


def test_stop_fails_running_work() -> None:
    async def main() -> None:
        async with echo() as (worker, receiver):
            queue = RowQueue()
            generate(worker, ENDLESS, queue)
            await anext(queue)
            job = asyncio.ensure_future(worker.load(spec(), "ok"))
            await job
            await worker.stop(30)
            with pytest.raises(DeviceWorkerLostError, match="was stopped"):
                await collect(queue)
            for _ in range(2):
                await worker.stop()
            assert receiver.states() == [S.STARTING, S.READY, S.STOPPED]
            with pytest.raises(DeviceWorkerNotReadyError, match="is stopped"):
                await worker.memory()
            await worker.start()
            await worker.memory()

    run(main)


def test_a_deaf_worker_is_killed_in_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "TERMINATE_GRACE_S", 0.1)

    async def main() -> None:
        async with echo() as (worker, _):
            await worker.load(spec(), "deaf")
            pid = pid_of(worker)
            began = time.monotonic()
            await worker.stop(0.1)
            assert time.monotonic() - began < 10
            assert not psutil.pid_exists(pid)

    run(main)


def test_a_cancelled_stop_still_ends_the_process() -> None:
    async def main() -> None:
        async with echo() as (worker, _):
            await worker.load(spec(), "deaf")
            pid = pid_of(worker)
            stopping = asyncio.ensure_future(worker.stop(600))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            stopping.cancel()
            with pytest.raises(asyncio.CancelledError):
                await stopping
            assert not psutil.pid_exists(pid)
            assert worker.state is S.STOPPED

    run(main)


@pytest.mark.parametrize("moment", ["starting", "pausing", "restarting", "reloading"])
def test_stopped_at_any_moment(moment: str) -> None:
    others = psutil.Process().children()  # what fixtures of the whole session have started

    async def main() -> None:
        policy = RestartPolicy(first_delay_s=600.0 if moment == "pausing" else 0.001)
        receiver = StateReceiver()
        worker = Worker("cpu:0", ECHO, on_state=receiver, policy=policy)
        if moment == "starting":
            starting = asyncio.ensure_future(worker.start())
            await asyncio.sleep(0.0)
            starting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await starting
        else:
            await worker.start()
            reloading = asyncio.Event()

            async def reload() -> None:
                reloading.set()
                await asyncio.Event().wait()

            worker.on_restarted = reload
            os.kill(pid_of(worker), signal.SIGKILL)
            await receiver.until(S.POISONED, S.RECOVERING)
            if moment == "restarting":
                while psutil.Process().children() == others:
                    await asyncio.sleep(0)
            elif moment == "reloading":
                await reloading.wait()
        await worker.stop(30)
        assert worker.state is S.STOPPED
        assert psutil.Process().children() == others
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(main)


def test_started_twice() -> None:
    async def main() -> None:
        async with echo() as (worker, _):
            with pytest.raises(RuntimeError, match="already started"):
                await worker.start()

    run(main)


def test_child_processes_of_a_worker_end_with_it(tmp_path: pathlib.Path, wait_for: Callable[..., None]) -> None:
    async def main() -> None:
        async with echo() as (worker, receiver):
            await worker.load(spec(str(tmp_path / "pid")), "parent")
            os.kill(pid_of(worker), signal.SIGKILL)
            await receiver.until(S.POISONED, S.RECOVERING, S.READY)

    run(main)
    pid = int((tmp_path / "pid").read_text())
    wait_for(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie", "the grandchild to end")


DAEMON = """
import asyncio, sys
from cortex.wire.node import ModelSpec
from neuron.device.worker import Worker

async def main():
    worker = Worker("cpu:0", sys.argv[2:])
    ready = await worker.start()
    if sys.argv[1] == "busy":
        asyncio.ensure_future(worker.load(ModelSpec("m", "s"), "busy", progress=lambda _: print(ready.pid, flush=True)))
    else:
        print(ready.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_a_worker_does_not_outlive_its_daemon(state: str, wait_for: Callable[..., None]) -> None:
    with subprocess.Popen([sys.executable, "-c", DAEMON, state, *ECHO], stdout=subprocess.PIPE, text=True) as daemon:
        assert daemon.stdout is not None
        pid = int(daemon.stdout.readline())
        daemon.kill()
    wait_for(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie", "the worker to end")


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
