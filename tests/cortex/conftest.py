"""Coroutine tests run on uvloop, as the gateway does, and must leave no task behind; and a Valkey server for all."""

import asyncio
import gc
import inspect
import logging
import pathlib
import types
from collections.abc import Awaitable, Iterator
from typing import Any

import daemons
import pytest
import uvloop
from daemons import INTERFACE
from gateway_rig import rig


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
    unhandled: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
    await test
    for _ in range(200):
        left = asyncio.all_tasks() - {asyncio.current_task()}
        if not left:
            gc.collect(0)  # a future whose exception was never retrieved reports it when collected
            assert not unhandled, unhandled
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"tasks left behind: {left}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Over ASGI, keep only tests of a gateway in this process that do not choose the interface themselves."""
    if INTERFACE == "rsgi":
        return
    here = pathlib.Path(__file__).parent
    items[:] = [item for item in items if here not in item.path.parents or asks(getattr(item, "module", None))]


def asks(module: types.ModuleType | None) -> bool:
    """Return whether a module of tests has a gateway in this process, by whichever interface."""
    return any(value is rig for value in vars(module).values()) and not hasattr(module, "by_each")


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
