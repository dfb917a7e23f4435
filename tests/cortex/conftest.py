"""Coroutine tests run on uvloop, as the gateway does, and must leave no task behind; and a Valkey server for all."""

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Iterator

import daemons
import pytest
import uvloop


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    test = pyfuncitem.obj
    if not inspect.iscoroutinefunction(test):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(test(**arguments)))
    return True


async def _run(test: Awaitable[None]) -> None:
    await test
    for _ in range(200):
        left = asyncio.all_tasks() - {asyncio.current_task()}
        if not left:
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"tasks left behind: {left}")


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server of its own."""
    with daemons.valkey(tmp_path_factory.mktemp("valkey")) as address:
        yield address


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Undo what starting the application does to its logger."""
    logger = logging.getLogger("cortex")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)
