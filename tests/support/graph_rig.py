"""Graphs without a GPU: a captured step is kept, and called again where a device would run it.

It reads and writes the same tensors each time, as on a device.
"""

from collections.abc import Callable
from typing import Any

import torch

from neuron.device import _fake_driver as fake  # type: ignore[attr-defined]
from neuron.device.driver import DeviceFault
from neuron.device.loop import DeviceLoop
from neuron.engine.step_inputs import StepInputs
from neuron.triton_kernels.decode_attention import rope_decode_attention
from neuron.triton_kernels.operations import EAGER


class ByDefinition:
    """Eager operations that pass for kernels: attention by the page table, as theirs.

    Eager attention takes the step's parts, which no graph has.
    """

    by_kernels = True
    attention = staticmethod(rope_decode_attention.eager)

    def __getattr__(self, name: str) -> Any:
        return getattr(EAGER, name)


def captured(step: Callable[[], None]) -> dict[str, Any]:
    """Return the variables that a step reads from its closure."""
    function = step.__wrapped__  # type: ignore[attr-defined]
    cells = zip(function.__code__.co_freevars, function.__closure__, strict=True)
    return {name: cell.cell_contents for name, cell in cells}


KEEP = -99
"""Value that no step publishes."""


class Recorded:
    """Graphs that keep their captures; there is memory for ``capacity`` of them.

    With ``late`` the host sees what a step has published when it waits for it, or when the one after the next is
    launched, as of a device that takes its time; a message of the daemon arrives after step ``message_after`` of a
    multi-step decode.
    """

    def __init__(self, capacity: int = 99, error: Exception | None = None, *, late: bool = False) -> None:
        self.capacity = capacity
        self.error = error or torch.OutOfMemoryError("CUDA out of memory")
        self.steps: dict[int, Callable[[], None]] = {}
        self.sizes: dict[int, int] = {}
        self.launched: list[int] = []
        self.replays: list[tuple[int, int]] = []
        """Steps requested of each multi-step decode, and steps run."""
        self.fail_at = 0
        self.message_after = 0
        self.late = late
        self._next = 0
        self._unseen: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        """Values that each step has published, and their tensors, not yet visible to the host."""

    def capture(self, step: Callable[[], None]) -> int:
        step()
        if len(self.steps) == self.capacity:
            raise self.error
        graph = self.instantiate()
        self.steps[graph] = step
        self.sizes[graph] = self.inputs(graph).num_rows
        return graph

    def instantiate(self) -> int:
        self._next += 1
        return self._next

    def inputs(self, graph: int) -> StepInputs:
        found: StepInputs = captured(self.steps[graph])["inputs"]
        return found

    def launch(self, graph: int) -> None:
        if len(self.launched) + 1 == self.fail_at:
            raise DeviceFault("cuGraphLaunch", 719, "CUDA_ERROR_LAUNCH_FAILED")
        self.compute(graph)
        self.show(but=2 if self.late else 0)

    def compute(self, graph: int) -> None:
        """Run a step, whose results the host does not see yet."""
        self.launched.append(self.sizes[graph])
        state = self.inputs(graph).state
        host_tensors = (state.published, state.all_ended)
        before = [tensor.clone() for tensor in host_tensors]
        self.steps[graph]()
        self._unseen.append([(tensor, tensor.clone()) for tensor in host_tensors])
        for (tensor, after), old in zip(self._unseen[-1], before, strict=True):
            # Places that it has not written keep the host's later values.
            after[after == old] = KEEP
            tensor.copy_(old)

    def replay(self, graph: int, count: int, all_ended: torch.Tensor) -> int:
        done = 0
        while done < count and not all_ended[0] and (not done or done != self.message_after):
            self.launch(graph)
            self.show()
            done += 1
        self.replays.append((count, done))
        return done

    def wait(self, words: torch.Tensor, pending: int) -> None:
        while (words == pending).any():
            self.show(but=len(self._unseen) - 1)

    def show(self, but: int = 0) -> None:
        """Let the host see the results of all steps but the last ``but``."""
        assert but >= 0, "no step is left to wait for"
        while len(self._unseen) > but:
            for tensor, host_tensors in self._unseen.pop(0):
                tensor.copy_(torch.where(host_tensors == KEEP, tensor, host_tensors))

    def close(self) -> None:
        self.show()
        self.steps.clear()


class OnTheLoop(Recorded):
    """Graphs that the shipped loop makes and launches, through the fake driver, which runs them here.

    A step is computed when it is launched, and its results appear when the device has finished it.
    """

    def __init__(self, loop: DeviceLoop) -> None:
        super().__init__()
        self._loop = loop
        self._graph = 0
        fake.hooks(lambda: self.compute(self._graph), lambda: self.show(but=len(self._unseen) - 1))

    def instantiate(self) -> int:
        return self._loop.instantiate(super().instantiate())

    def launch(self, graph: int) -> None:
        self._graph = graph
        self._loop.launch(graph)

    def replay(self, graph: int, count: int, all_ended: torch.Tensor) -> int:
        self._graph = graph
        done = self._loop.replay(graph, count, stop_on_message=True, stop_word=all_ended.data_ptr())
        self.replays.append((count, done))
        return done

    def wait(self, words: torch.Tensor, pending: int) -> None:
        self._loop.wait_for_words(words.data_ptr(), words.numel(), pending)

    def close(self) -> None:
        graphs = list(self.steps)
        super().close()
        for graph in graphs:
            self._loop.driver.destroy_graph_exec(graph)
