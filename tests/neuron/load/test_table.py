"""The table of models: one load for many callers, draining, recovery, and the status of each state."""

import asyncio
import pathlib

import pytest
from scripted_model import ScriptedHarness

from cortex.wire.errors import ModelNotFoundError, UnavailableError, UnprocessableError
from cortex.wire.node import ModelSpec, ModelState
from neuron.errors import ModelConflictError, ModelFailedError, ModelNotReadyError, TooManyModelsError
from neuron.harness import Model
from neuron.load.entry import Entry
from neuron.load.table import ModelTable

SPEC = ModelSpec("m", "/models/m")


def table() -> ModelTable:
    async def load(entry: Entry) -> Model:
        def progress(fraction: float) -> None:
            entry.progress = fraction

        return await entry.harness.load(entry.spec, pathlib.Path(entry.spec.source), progress)

    return ModelTable(load)


def state(models: ModelTable) -> ModelState:
    return models.find("m").state


def test_fifty_callers_share_one_load() -> None:
    async def story() -> None:
        models, harness = table(), ScriptedHarness()
        harness.waits = asyncio.Event()
        callers = [asyncio.ensure_future(models.load(SPEC, harness)) for _ in range(50)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert state(models) is ModelState.LOADING
        assert models.statuses()[0].progress == 0.5
        callers[0].cancel()
        harness.waits.set()
        statuses = await asyncio.gather(*callers[1:])
        assert {status.state for status in statuses} == {ModelState.READY}
        assert harness.loads == [SPEC]

    asyncio.run(story())


def test_a_failed_load_fails_all_callers_and_can_be_retried() -> None:
    async def story() -> None:
        models, harness = table(), ScriptedHarness()
        harness.fails = UnprocessableError("too big")
        outcomes = await asyncio.gather(*(models.load(SPEC, harness) for _ in range(3)), return_exceptions=True)
        assert [str(outcome) for outcome in outcomes] == ["too big"] * 3
        assert (state(models), models.statuses()[0].error) == (ModelState.FAILED, "too big")
        with pytest.raises(ModelFailedError, match="too big"), models.use("m"):
            pass
        harness.fails = None
        assert (await models.load(SPEC, harness)).state is ModelState.READY
        assert models.statuses()[0].error is None

    asyncio.run(story())


def test_another_spec_under_the_same_name_is_a_conflict() -> None:
    async def story() -> None:
        models, harness = table(), ScriptedHarness()
        await models.load(SPEC, harness)
        with pytest.raises(ModelConflictError):
            await models.load(ModelSpec("m", "/models/other"), harness)

    asyncio.run(story())


def test_an_unload_waits_for_running_requests() -> None:
    async def story() -> None:
        models, harness = table(), ScriptedHarness()
        await models.load(SPEC, harness)
        with models.use("m"):
            unload = asyncio.ensure_future(models.unload("m", 30))
            await asyncio.sleep(0)
            assert state(models) is ModelState.DRAINING
            with pytest.raises(UnavailableError) as caught, models.use("m"):
                pass
            assert caught.value.retry_after_s
            assert not harness.unloads
        assert (await unload).state is ModelState.AVAILABLE
        assert harness.unloads == ["m"]
        with pytest.raises(ModelNotFoundError), models.use("m"):
            pass

    asyncio.run(story())


def test_an_unload_does_not_wait_for_ever() -> None:
    async def story() -> None:
        models, harness = table(), ScriptedHarness()
        await models.load(SPEC, harness)
        with models.use("m"):
            await models.unload("m", 0.01)
        assert harness.unloads == ["m"]

    asyncio.run(story())


def test_an_unload_ends_a_load() -> None:
    async def story() -> None:
        models, harness = table(), ScriptedHarness()
        harness.waits = asyncio.Event()
        load = asyncio.ensure_future(models.load(SPEC, harness))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (await models.unload("m", 1)).state is ModelState.AVAILABLE
        with pytest.raises(UnavailableError, match="ended by an unload"):
            await load

    asyncio.run(story())


def test_a_lost_device_and_its_return() -> None:
    async def story() -> None:
        models, harness = table(), ScriptedHarness()
        await models.load(SPEC, harness)
        models.lose("cpu:0")
        models.lose("cuda:7")
        assert state(models) is ModelState.RECOVERING
        with pytest.raises(UnavailableError) as caught, models.use("m"):
            pass
        assert caught.value.retry_after_s
        await models.recover("cpu:0")
        assert state(models) is ModelState.READY
        assert harness.loads == [SPEC, SPEC]

    asyncio.run(story())


def specs(count: int) -> list[ModelSpec]:
    return [ModelSpec(f"m{number}", "/models/m") for number in range(count)]


def test_failed_loads_do_not_grow_the_table() -> None:
    async def story() -> None:
        left: list[str] = []
        models, harness = ModelTable(table()._load, on_leave=left.append, max_models=4), ScriptedHarness()
        models.add(SPEC, harness)
        harness.fails = UnprocessableError("no")
        for spec in specs(50):
            with pytest.raises(UnprocessableError):
                await models.load(spec, harness)
        assert [status.id for status in models.statuses()] == ["m", "m47", "m48", "m49"]
        assert left == [f"m{number}" for number in range(47)]
        harness.fails = None
        for spec in specs(3):
            await models.load(spec, harness)
        with pytest.raises(TooManyModelsError) as caught:
            await models.load(ModelSpec("x", "/models/m"), harness)
        assert (caught.value.status, caught.value.code) == (503, "too_many_models")
        assert caught.value.retry_after_s
        await models.unload("m1", 1)
        assert (await models.load(ModelSpec("x", "/models/m"), harness)).state is ModelState.READY
        assert [status.id for status in models.statuses()] == ["m", "m0", "m2", "x"]

    asyncio.run(story())


def test_a_failed_load_is_forgotten_after_a_while_and_a_configured_model_never() -> None:
    async def story() -> None:
        models, harness = ModelTable(table()._load, failed_kept_s=0.0), ScriptedHarness()
        models.add(SPEC, harness)
        harness.fails = UnprocessableError("no")
        for spec in (SPEC, *specs(2)):
            with pytest.raises(UnprocessableError):
                await models.load(spec, harness)
        assert models.forget_failed() == ["m0", "m1"]
        assert [(status.id, status.error) for status in models.statuses()] == [("m", "no")]
        harness.fails = None
        assert (await models.load(SPEC, harness)).state is ModelState.READY
        with pytest.raises(ModelNotReadyError):
            models.forget("m")

    asyncio.run(story())


def test_use_is_counted() -> None:
    async def story() -> None:
        models, harness = table(), ScriptedHarness()
        models.add(SPEC, harness)
        assert state(models) is ModelState.AVAILABLE
        await models.load(SPEC, harness)
        with models.use("m"), models.use("m"):
            assert models.statuses()[0].running == 2
        assert models.statuses()[0].running == 0
        assert models.statuses()[0].last_used_at > 0

    asyncio.run(story())
