"""Grammars in compilation, on a thread, while the steps of all other sequences go on.

A grammar takes up to a second, and the first of a model builds its vocabulary as well, seconds where that is large. A
text process has compiled each of them before, with less stack than this thread has. No torch here.
"""

import concurrent.futures
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from neuron.device.jobs import Generate
from neuron.engine.sequence import Sequence

if TYPE_CHECKING:
    from neuron.engine.constraint import Constraint
    from neuron.engine.model_engine import ModelEngine

STACK_BYTES: Final = 32 << 20
"""Stack of the thread, more than a text process has (:data:`neuron.text.limits.STACK_BYTES`)."""


class Compiling:
    """The sequences that wait for their grammar."""

    def __init__(self) -> None:
        self._thread: concurrent.futures.ThreadPoolExecutor | None = None
        self._waiting: dict[int, tuple[ModelEngine, Sequence, Generate, concurrent.futures.Future[Constraint]]] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def start(self, model: "ModelEngine", sequence: Sequence, job: Generate) -> None:
        """Begin to compile the grammar of ``sequence``, which ``job`` names."""
        assert job.constraint is not None
        self._thread = self._thread or concurrent.futures.ThreadPoolExecutor(1, "grammars")
        before = threading.stack_size(STACK_BYTES)  # for the first, which starts the thread
        try:
            future = self._thread.submit(model.constrain, job.constraint)
        finally:
            threading.stack_size(before)
        self._waiting[sequence.number] = model, sequence, job, future

    def count(self, model: "ModelEngine") -> int:
        """Return how many sequences of ``model`` wait here."""
        return sum(waiting[0] is model for waiting in self._waiting.values())

    def numbers(self, model: "ModelEngine") -> list[int]:
        """Return the numbers of the sequences of ``model`` that wait here."""
        return [number for number, waiting in self._waiting.items() if waiting[0] is model]

    def drop(self, number: int) -> None:
        """Drop a sequence, if it waits here."""
        waiting = self._waiting.pop(number, None)
        if waiting is not None:
            waiting[3].cancel()

    def wait(self, timeout_s: float) -> None:
        """Wait until a grammar is done."""
        futures = [waiting[3] for waiting in self._waiting.values()]
        concurrent.futures.wait(futures, timeout_s, concurrent.futures.FIRST_COMPLETED)

    def take_done(self) -> Iterator[tuple["ModelEngine", Sequence, Generate, "Constraint | BaseException"]]:
        """Yield the sequences whose grammar is done, each with its constraint or its error."""
        for number in [number for number, waiting in self._waiting.items() if waiting[3].done()]:
            model, sequence, job, future = self._waiting.pop(number)
            yield model, sequence, job, future.exception() or future.result()

    def close(self) -> None:
        """Drop all sequences, and end the thread without waiting for it."""
        for number in list(self._waiting):
            self.drop(number)
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
            self._thread = None
