"""Steps of a model on the shipped loop, through the fake driver: the order of launches and of results.

The daemon's messages come by a channel, the loop runs on a thread of its own, and a graph is the captured step, which
the driver runs when it is launched and reports when it is done.
"""

import array
import collections
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from graph_rig import ByDefinition, OnTheLoop

from cortex.wire.node import ModelSpec
from neuron.device import _fake_driver as fake  # type: ignore[attr-defined]
from neuron.device import jobs
from neuron.device.channel import Channel, socket_pair
from neuron.device.loop import DeviceLoop
from neuron.engine import multi_step
from neuron.engine.engine import Engine
from neuron.engine.step_timer import StepTimer
from neuron.engine_settings import EngineSettings
from neuron.triton_kernels import dispatch

PROMPT = list(range(3, 43))


class Running:
    """A worker with one model; the test is the daemon."""

    def __init__(self, model: pathlib.Path, *, overlaps: bool) -> None:
        theirs, ours = socket_pair()
        self.daemon = Channel(ours)
        self._fd = theirs
        self._decoder = msgspec.msgpack.Decoder(jobs.FromWorker)
        self.outputs: dict[int, list[int]] = collections.defaultdict(list)
        self.rows: list[jobs.TokenRow] = []
        self.status: int | None = None
        self._settings = EngineSettings(cpu_kernels=False, speculation=False, overlap_steps=overlaps)
        self.thread = threading.Thread(target=self._main)
        self.thread.start()
        self.post(jobs.Load(1, ModelSpec("m", "test", dtype="float32", max_sequences=4), str(model)))
        while not isinstance(self.receive(), jobs.Done):
            pass

    def _main(self) -> None:
        with DeviceLoop(fake.capsule(), 0, self._fd, name="cuda-dev-0") as loop:
            self.graphs = OnTheLoop(loop)
            self.engine: Any = Engine(
                "cpu:0",
                loop.send,
                loop.memory,
                loop.stop,
                channel_fd=loop.channel.fileno(),
                graphs=lambda: self.graphs,
                settings=self._settings,
            )
            self.status = loop.run(self.engine)

    def post(self, *messages: jobs.ToWorker) -> None:
        for message in messages:
            self.daemon.send(msgspec.msgpack.encode(message))

    def generate(
        self,
        number: int,
        max_tokens: int,
        eos: tuple[int, ...] = (),
        thinking: jobs.ThinkingSettings | None = None,
        **settings: Any,
    ) -> None:
        sampler = jobs.SamplerSettings(**{"temperature": 0.0, **settings})
        ids = array.array("i", PROMPT[number:]).tobytes()
        self.post(jobs.Generate(number, "m", ids, max_tokens, eos, sampler, "", thinking=thinking))

    def receive(self) -> jobs.FromWorker:
        message: jobs.FromWorker = self._decoder.decode(self.daemon.recv(30))
        if isinstance(message, jobs.Tokens):
            self.rows += message.rows
            for row in message.rows:
                self.outputs[row.sequence].extend(array.array("i", row.ids))
        return message

    def receive_all(self, count: int) -> dict[int, list[int]]:
        """Receive until ``count`` sequences have ended; return the tokens of each."""
        self.outputs.clear()
        self.rows.clear()
        while sum(row.end is not None for row in self.rows) < count:
            self.receive()
        return dict(self.outputs)

    def end(self) -> int | None:
        self.daemon.close()
        self.thread.join(30)
        return self.status


@pytest.fixture
def start(tiny_llama: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Running]]:
    operations = ByDefinition()
    monkeypatch.setattr(dispatch, "operations_for", lambda *_, **__: operations)
    fake.reset()
    running: list[Running] = []

    def start_one(*, overlaps: bool = False) -> Running:
        running.append(Running(tiny_llama, overlaps=overlaps))
        return running[-1]

    yield start_one
    for one in running:
        one.end()
        assert not one.thread.is_alive()
    assert fake.alive() == {"contexts": 0, "streams": 0, "events": 0}
    assert fake.misuse() == 0
    fake.reset()


@pytest.fixture
def ten_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepTimer, "step_s", lambda *_: multi_step.MULTI_STEP_S / 10.5)


def since(seen: int) -> list[str]:
    names: list[str] = fake.calls()[seen:]
    return names


def test_a_step_is_launched_before_the_one_before_it_is_read(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multi_step, "is_worth_it", lambda *_: False)
    plain = start()
    plain.generate(0, 12)
    alone = plain.receive_all(1)
    assert plain.end() == 0
    running = start(overlaps=True)
    running.generate(0, 12)  # captures the graphs
    running.receive_all(1)
    seen = len(fake.calls())
    running.generate(0, 12)
    assert running.receive_all(1) == alone
    calls = since(seen)
    assert fake.most_under_way() == 2
    assert calls[:3] == ["cuGraphLaunch", "cuGraphLaunch", "cuStreamQuery"]
    assert calls.count("cuGraphLaunch") == 11, "the prompt's step has none, and a limit costs none"
    assert not {"cuStreamSynchronize", "cuEventSynchronize"} & set(calls)
    assert running.end() == 0


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_budget_of_reasoning_ends_steps_that_overlap(start: Callable[..., Running], overlaps: bool) -> None:
    """Beside a sequence without one; the tokens before the forced ones are those of a free sequence."""
    running = start(overlaps=overlaps)
    running.generate(0, 30)
    free = running.receive_all(1)[0]
    for budget in (0, 1, 2, 11):
        running.generate(0, 30, thinking=jobs.ThinkingSettings(budget, 7, (5, 6, 9), starts_inside=True))
        running.generate(1, 30)
        found = running.receive_all(2)[0]
        assert found[:budget] == free[:budget]
        assert found[budget : budget + 3] == [5, 6, 9]
        assert len(found) == 30


@pytest.mark.parametrize("overlaps", [False, True])
def test_multi_step_is_launched_by_the_loop_one_step_ahead(
    start: Callable[..., Running], ten_steps: None, monkeypatch: pytest.MonkeyPatch, overlaps: bool
) -> None:
    monkeypatch.setattr(multi_step, "is_worth_it", lambda *_: True)
    running = start(overlaps=overlaps)
    for number in range(2):
        running.generate(number, 32, temperature=1.0, seed=number)
    together = running.receive_all(2)
    assert running.graphs.replays
    assert max(len(row.ids) // 4 for row in running.rows) == 10
    seen = len(fake.calls())
    running.generate(0, 32, temperature=1.0, seed=0)
    assert running.receive_all(1)[0] == together[0]
    ten = ["cuGraphLaunch", "cuEventRecord"] * 2 + ["cuEventSynchronize", "cuGraphLaunch", "cuEventRecord"] * 7
    ten += ["cuEventSynchronize", "cuGraphLaunch", "cuStreamSynchronize"]
    calls = " ".join(since(seen))
    assert " ".join(ten) in calls
    assert fake.most_under_way() == 2
    assert running.end() == 0


def test_the_device_stops_multi_step_when_no_row_is_left(start: Callable[..., Running], ten_steps: None) -> None:
    running = start()
    running.generate(0, 30)
    plain = running.receive_all(1)[0]
    assert len(set(plain[:4])) == 4
    running.graphs.replays.clear()
    running.generate(0, 30, eos=(plain[3],))
    assert running.receive_all(1)[0] == plain[:3]
    assert running.rows[-1].end is jobs.SequenceEnd.STOP
    # The second step ends the rows; the one behind it was launched by then, and changes nothing.
    assert [asked for asked, _ in running.graphs.replays] == [10]
    assert running.graphs.replays[0][1] in (3, 4)
    running.generate(0, 30)
    assert running.receive_all(1)[0] == plain


def test_a_cancel_is_handled_between_two_steps(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, wait_for: Callable[..., None]
) -> None:
    monkeypatch.setattr(StepTimer, "step_s", lambda *_: multi_step.MULTI_STEP_S / 64.5)
    running = start()
    running.generate(0, 40)
    running.receive_all(1)
    fake.delay("cuEventSynchronize", 50_000)
    running.graphs.replays.clear()
    before = fake.count("cuEventSynchronize")
    running.generate(0, 300)
    wait_for(lambda: fake.count("cuEventSynchronize") > before + 2, "the multi-step decode")
    running.post(jobs.Cancel(0))
    running.receive_all(1)
    assert running.rows[-1] == jobs.TokenRow(0, b"", jobs.SequenceEnd.CANCELLED)
    assert running.graphs.replays[-1][0] == 64
    assert running.graphs.replays[-1][1] < 12
    assert running.end() == 0


@pytest.mark.parametrize("at", [1, 2, 7])
@pytest.mark.parametrize("call", ["cuGraphLaunch", "cuEventSynchronize", "cuStreamSynchronize"])
def test_a_fault_of_any_launch_poisons_the_worker(
    start: Callable[..., Running], ten_steps: None, call: str, at: int
) -> None:
    running = start()
    fake.fail(call, at, 719)
    for number in range(9):
        running.generate(number % 4, 60)
        while not isinstance(message := running.receive(), jobs.Poisoned):
            if isinstance(message, jobs.Tokens) and message.rows[-1].end is not None:
                break
        else:
            break
    assert message == jobs.Poisoned(f"{call} returned 719 (CUDA_ERROR_LAUNCH_FAILED)")
    running.thread.join(30)
    assert running.status == jobs.EXIT_POISONED
    after = fake.calls()[[i for i, name in enumerate(fake.calls()) if name == call][at - 1] + 1 :]
    assert not [name for name in after if "Destroy" not in name and "Ctx" not in name], "nothing runs after a fault"
