"""Steps as graphs: the same tokens, the right graph, and what is left without memory for one.

There is no GPU here, so a graph is the captured function, called again: what it reads and writes are the same tensors.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from neuron.device import jobs
from neuron.device.driver import DeviceFault, DriverError
from neuron.engine.graph_runner import GraphRunner, buckets
from neuron.triton_kernels import dispatch, reference
from neuron.triton_kernels.batch import Batch


class ByDefinition(dispatch.EagerOperations):
    """Attention by the page table, as the kernels read it: the eager one wants the step's parts, which no graph has."""

    def attention(
        self,
        qkv: torch.Tensor,
        qk_norm: torch.Tensor | None,
        eps: float,
        rotary: dispatch.Rotary,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: Batch,
        scale: float,
        window: int,
    ) -> torch.Tensor:
        return reference.rope_decode_attention(
            qkv, qk_norm, eps, rotary, key_cache, value_cache, batch, scale, window=window
        )


class Recorded:
    """Graphs that keep what they captured; ``room`` is for how many there is memory."""

    def __init__(self, room: int = 99, error: Exception | None = None) -> None:
        self.room = room
        self.error = error or torch.OutOfMemoryError("CUDA out of memory")
        self.steps: dict[int, Callable[[], None]] = {}
        self.sizes: dict[int, int] = {}
        self.launched: list[int] = []
        self.fail_at = 0
        self._next = 1

    def capture(self, step: Callable[[], None]) -> int:
        if len(self.steps) == self.room:
            raise self.error
        step()
        graph, self._next = self._next, self._next + 1
        self.steps[graph] = step
        # What the step reads is a closure: its first tensor's rows are the bucket's.
        cells = dict(zip(step.__wrapped__.__code__.co_freevars, step.__wrapped__.__closure__, strict=True))  # type: ignore[attr-defined]
        self.sizes[graph] = len(cells["inputs"].cell_contents)
        return graph

    def launch(self, graph: int) -> None:
        if len(self.launched) + 1 == self.fail_at:
            raise DeviceFault("cuGraphLaunch", 719, "CUDA_ERROR_LAUNCH_FAILED")
        self.launched.append(self.sizes[graph])
        self.steps[graph]()

    def drop(self, graph: int) -> None:
        del self.steps[graph]


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURON_CPU_KERNELS", "off")
    monkeypatch.setenv("NEURON_SPECULATION", "off")


@pytest.fixture
def with_graphs(
    harness: Callable[..., Any], tiny_llama: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    def make(graphs: Recorded, **spec: object) -> Any:
        driver = harness()
        driver.engine._graphs = graphs
        driver.load(tiny_llama, dtype="float32", max_sequences=6, **spec)
        monkeypatch.setattr(dispatch, "operations_for", lambda device, dtype: ByDefinition())
        assert isinstance(driver.engine._models["m"].runner, GraphRunner)
        return driver

    return make


def ask(driver: Any, num_tokens: int = 20, count: int = 5, **settings: object) -> dict[int, list[int]]:
    for number in range(count):
        driver.generate(number, list(range(3 + number, 9 + 7 * number)), num_tokens - 3 * number, **settings)
    driver.run()
    assert not driver.failures()
    found: dict[int, list[int]] = driver.outputs()
    return found


def expected(harness: Callable[..., Any], tiny_llama: pathlib.Path, **settings: object) -> dict[int, list[int]]:
    plain = harness()
    plain.load(tiny_llama, dtype="float32", max_sequences=6)
    return ask(plain, **settings)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 7, "top_k": 20}])
def test_graphs_give_the_tokens_of_single_launches(
    harness: Callable[..., Any], tiny_llama: pathlib.Path, with_graphs: Callable[..., Any], settings: dict[str, object]
) -> None:
    graphs = Recorded()
    wanted = expected(harness, tiny_llama, **settings)
    driver = with_graphs(graphs)
    assert ask(driver, **settings) == wanted
    # Captured while steps went by, the largest first; a step took the smallest there was that held its rows.
    assert list(graphs.sizes.values()) == [6, 4, 2, 1] == buckets(6)
    assert graphs.launched[0] == 6
    assert set(graphs.launched) >= {6, 4, 2}
    runner = driver.engine._models["m"].runner
    assert not runner._keys[:, 0].any(), "page 0 pads page tables and stays zero"
    driver.tell(jobs.Unload(9, "m"))
    assert not graphs.steps


def test_a_step_launched_ahead_takes_its_tokens_from_the_device(
    harness: Callable[..., Any], tiny_llama: pathlib.Path, with_graphs: Callable[..., Any]
) -> None:
    wanted = expected(harness, tiny_llama)
    driver = with_graphs(Recorded())
    driver.engine._models["m"].runner.overlaps = True
    assert ask(driver) == wanted


@pytest.mark.parametrize("room", [0, 1])
@pytest.mark.parametrize(
    "error", [None, DriverError("cuGraphInstantiateWithFlags", 2, "CUDA_ERROR_OUT_OF_MEMORY")], ids=["torch", "driver"]
)
def test_no_memory_for_a_graph_leaves_single_launches(
    harness: Callable[..., Any],
    tiny_llama: pathlib.Path,
    with_graphs: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
    room: int,
    error: Exception | None,
) -> None:
    wanted = expected(harness, tiny_llama)
    graphs = Recorded(room, error)
    driver = with_graphs(graphs)
    assert ask(driver) == wanted
    assert list(graphs.sizes.values()) == [6][:room]
    assert set(graphs.launched) == {6} if room else not graphs.launched
    assert "no memory for a graph of" in caplog.text


def test_a_fault_of_a_launch_is_the_devices(with_graphs: Callable[..., Any]) -> None:
    graphs = Recorded()
    graphs.fail_at = 3
    driver = with_graphs(graphs)
    driver.generate(1, [3, 4, 5], 20)
    with pytest.raises(DeviceFault, match="cuGraphLaunch returned 719"):
        driver.run()


def test_graphs_can_be_turned_off(with_graphs: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURON_GRAPHS", "off")
    graphs = Recorded()
    assert len(ask(with_graphs(graphs))) == 5
    assert not graphs.launched


def test_a_cancelled_sequence_leaves_the_others_graphs(
    harness: Callable[..., Any], tiny_llama: pathlib.Path, with_graphs: Callable[..., Any]
) -> None:
    wanted = expected(harness, tiny_llama)
    driver = with_graphs(Recorded())
    for number in range(5):
        driver.generate(number, list(range(3 + number, 9 + 7 * number)), 20 - 3 * number)
    for _ in range(6):
        driver.engine.step()
    driver.tell(jobs.Cancel(2))
    driver.run()
    found = driver.outputs()
    assert {n: found[n] for n in (0, 1, 3, 4)} == {n: wanted[n] for n in (0, 1, 3, 4)}
