"""Coroutine tests run on uvloop, as the gateway does, and must leave no task behind."""

import asyncio
import inspect
from collections.abc import Awaitable

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
