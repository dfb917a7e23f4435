"""Background tasks: a task that fails is started again and reported."""

import asyncio

import pytest
from fake_node import FakeNode
from gateway_rig import rig, until

from cortex.supervise import Supervisor


async def test_a_task_that_fails_is_started_again_and_is_degraded_until_it_runs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    failures: list[str] = []
    supervisor = Supervisor(failures.append, first_pause_s=0.001, healthy_after_s=0.02)
    num_begun, goes_well = 0, asyncio.Event()

    async def work() -> None:
        nonlocal num_begun
        num_begun += 1
        if not goes_well.is_set():
            raise RecursionError("too deep")
        await asyncio.Event().wait()

    task = supervisor.start("work", work)
    assert supervisor.degraded == ()
    await until(lambda: num_begun > 2)
    assert supervisor.degraded == ("work",)
    goes_well.set()
    await until(lambda: supervisor.degraded == ())
    assert len(failures) == num_begun - 1
    assert "background task 'work' failed" in caplog.text
    assert "too deep" in caplog.text
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()


async def test_a_cancellation_from_within_does_not_end_a_task() -> None:
    supervisor = Supervisor(first_pause_s=0.001)
    awaited: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    num_begun = 0

    async def work() -> None:
        nonlocal num_begun
        num_begun += 1
        if num_begun == 1:
            await awaited
        await asyncio.Event().wait()

    task = supervisor.start("work", work)
    await until(lambda: num_begun == 1)
    awaited.cancel()
    await until(lambda: num_begun == 2)
    assert supervisor.degraded == ("work",)
    task.cancel()
    await asyncio.wait({task})
    assert supervisor.degraded == ()


async def test_a_task_that_cannot_be_restarted_stays_degraded() -> None:
    supervisor = Supervisor(first_pause_s=0.001, healthy_after_s=0.001)

    async def work() -> None:
        raise ValueError("once")

    task = supervisor.start("work", work, is_restarted=False)
    await until(lambda: supervisor.degraded)
    await asyncio.sleep(0.01)
    assert supervisor.degraded == ("work",)
    task.cancel()
    await asyncio.wait({task})


async def test_health_and_metrics_name_the_failed_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    async with rig(FakeNode().ready("m")) as gateway:
        fold = gateway.gateway.metrics.fold
        failing = True

        def breaks() -> None:
            if failing:
                raise ValueError("negative")
            fold()

        monkeypatch.setattr(gateway.gateway.metrics, "fold", breaks)
        monkeypatch.setattr("cortex.metrics.FOLD_INTERVAL_S", 0.01)
        await until(lambda: gateway.gateway.supervisor.degraded)
        health = (await gateway.call("GET", "/health").end()).json()
        assert health["degraded"] == ["metrics"]
        failing = False
        assert gateway.metric("cortex_background_failures_total", task="metrics") == 1
        assert (await gateway.chat().end()).status == 200
        await until(
            lambda: gateway.metric("cortex_requests_total", model="m", node="a", dialect="openai-chat", status="200")
        )
