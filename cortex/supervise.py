"""Supervision of background tasks: a task that fails is logged, counted and started again, in both daemons.

A task that dies silently is worse than a crash: the state it kept current is stale for ever. So no background task is a
bare ``create_task``; a :class:`Supervisor` runs it, and starts it again with back-off. Until it has run for a while,
its name is in :attr:`Supervisor.degraded`, which ``/health`` shows. Its owner cancels it.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

log = logging.getLogger("cortex.supervise")

FIRST_PAUSE_S, MAX_PAUSE_S = 0.5, 30.0
HEALTHY_AFTER_S = 10.0
"""Time that a task must run after a failure before it counts as healthy."""

Work = Callable[[], Coroutine[Any, Any, None]]


class EndedFromWithinError(Exception):
    """A task was cancelled by something that it awaited, and not by its owner."""


class Supervisor:
    """The background tasks of one daemon process."""

    def __init__(
        self,
        on_failure: Callable[[str], None] = lambda name: None,
        *,
        first_pause_s: float = FIRST_PAUSE_S,
        healthy_after_s: float = HEALTHY_AFTER_S,
    ) -> None:
        """``on_failure`` is called with the name of each task that has failed, to count it."""
        self.on_failure = on_failure
        self._first_pause_s = first_pause_s
        self._healthy_after_s = healthy_after_s
        self._failing: dict[str, int] = {}
        self._marked: set[str] = set()

    @property
    def degraded(self) -> tuple[str, ...]:
        """Names of the tasks that have failed and are not healthy yet, and of marked components, in order."""
        return tuple(sorted(self._marked.union(self._failing)))

    def mark(self, name: str, *, is_degraded: bool) -> None:
        """Mark a component that is no task as degraded, or as healthy."""
        (self._marked.add if is_degraded else self._marked.discard)(name)

    def start(self, name: str, work: Work, *, is_restarted: bool = True) -> "asyncio.Task[None]":
        """Run ``work`` until it returns or the task is cancelled; start it again when it raises.

        With ``is_restarted`` false, a task that has raised stays ended, and degraded.
        """
        return asyncio.create_task(self._run(name, work, is_restarted=is_restarted), name=name)

    async def _run(self, name: str, work: Work, *, is_restarted: bool) -> None:
        pause_s = self._first_pause_s
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        failed: Exception | None = None
        try:
            while True:
                begun = loop.time()
                recovery = loop.call_later(self._healthy_after_s, self._failing.pop, name, None) if failed else None
                try:
                    await work()
                    return
                except asyncio.CancelledError:
                    if task.cancelling():
                        raise
                    failed = EndedFromWithinError(f"{name} was cancelled from within")
                except Exception as error:  # noqa: BLE001 - after any failure the task is started again
                    failed = error
                finally:
                    if recovery is not None:
                        recovery.cancel()
                if loop.time() - begun >= self._healthy_after_s:
                    pause_s = self._first_pause_s
                self._record(name, failed, pause_s if is_restarted else None)
                if not is_restarted:
                    await loop.create_future()  # it stays degraded until its owner ends it
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, MAX_PAUSE_S)
        finally:
            self._failing.pop(name, None)

    def _record(self, name: str, error: Exception, pause_s: float | None) -> None:
        self._failing[name] = self._failing.get(name, 0) + 1
        then = "and stays ended" if pause_s is None else f"and is started again in {pause_s:g} s"
        with suppress(Exception):  # the task is started again in any case
            log.critical("background task %r failed %s", name, then, exc_info=error)
        with suppress(Exception):
            self.on_failure(name)
