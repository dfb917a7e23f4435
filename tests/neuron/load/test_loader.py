"""A load that downloads: its progress while it runs, and what an unload leaves of it."""

import asyncio
import pathlib
import threading
from collections.abc import Callable

import pytest
from file_server import publish_repository, serve_files
from scripted_model import GIB, ScriptedHarness, describe

from cortex.wire.errors import UnavailableError
from cortex.wire.node import Eviction, ModelSpec, ModelState
from neuron import metrics
from neuron.errors import ModelConflictError, ModelNotReadyError, SourceNotFoundError
from neuron.harness import Requirement
from neuron.load import source
from neuron.load.entry import Entry
from neuron.load.eviction import EvictionTimeouts, Evictor
from neuron.load.loader import Loader
from neuron.load.table import ModelTable

WEIGHTS = bytes(range(256)) * 16_000
FILES = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": WEIGHTS}
SIZE_BYTES = sum(map(len, FILES.values()))
SPEC = ModelSpec("m", "hf:tiny/model")


def test_a_download_is_reported_and_ends_with_its_load(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    first_came, goes_on, ended = threading.Event(), threading.Event(), threading.Event()

    async def story() -> None:
        async def load(entry: Entry) -> object:
            return await loader.load(entry)

        models, harness = ModelTable(load), ScriptedHarness()  # type: ignore[arg-type]
        loader = Loader(tmp_path, Evictor(models))
        waiting = asyncio.ensure_future(models.load(SPEC, harness))
        await asyncio.to_thread(first_came.wait, 10)
        status = models.statuses()[0]
        assert status.state is ModelState.LOADING
        assert 0 < status.downloaded_bytes < status.download_bytes == SIZE_BYTES
        assert status.progress == status.downloaded_bytes / status.download_bytes / 2
        text = metrics.render(models.statuses(), (), ()).decode()
        assert f'neuron_model_download_bytes{{model="m",state="done"}} {float(status.downloaded_bytes)}' in text
        await models.unload("m", 0)
        goes_on.set()
        with pytest.raises(UnavailableError, match="ended by an unload"):
            await waiting
        await asyncio.to_thread(ended.wait, 10)
        assert models.statuses()[0].download_bytes == 0
        assert [path.suffix for path in tmp_path.glob("hub/*/blobs/*")] == [".incomplete"]
        site.ranges.clear()
        await models.load(SPEC, harness)
        assert models.statuses()[0].state is ModelState.READY
        assert not site.ranges[0].startswith("bytes=0-")

    def watched(report: Callable[[int, int], None]) -> Callable[[int, int], None]:
        def report_and_wait(done: int, total: int) -> None:
            try:
                report(done, total)
            except UnavailableError:
                ended.set()
                raise
            first_came.set()
            goes_on.wait(10)

        return report_and_wait

    fetch = source.fetch
    monkeypatch.setattr(source, "fetch", lambda name, report, **rest: fetch(name, report=watched(report), **rest))
    with serve_files() as site:
        publish_repository(site, FILES)
        monkeypatch.setenv("HF_ENDPOINT", site.address)
        asyncio.run(story())


def test_files_are_downloaded_without_a_load(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    first_came, goes_on = threading.Event(), threading.Event()

    async def story() -> None:
        async def load(entry: Entry) -> object:
            return await loader.load(entry)

        async def fetch(entry: Entry) -> None:
            await loader.fetch(entry)

        models, harness = ModelTable(load, fetch=fetch), ScriptedHarness()  # type: ignore[arg-type]
        loader = Loader(tmp_path, Evictor(models))
        pulls = [asyncio.ensure_future(models.pull(SPEC, harness)) for _ in range(2)]
        await asyncio.to_thread(first_came.wait, 10)
        status = models.statuses()[0]
        assert status.state is ModelState.AVAILABLE
        assert 0 < status.downloaded_bytes < status.download_bytes == SIZE_BYTES
        with pytest.raises(ModelNotReadyError):
            models.forget("m")
        with pytest.raises(ModelConflictError):
            await models.pull(ModelSpec("m", "hf:tiny/other"), harness)
        loading = asyncio.ensure_future(models.load(SPEC, harness))
        goes_on.set()
        assert [status.download_bytes for status in await asyncio.gather(*pulls)] == [0, 0]
        hits = len(site.hits)
        assert (await loading).state is ModelState.READY
        assert not harness.unloads
        assert len(site.hits) == hits, "the load finds the files there"
        assert (await models.pull(SPEC, harness)).state is ModelState.READY

        with pytest.raises(SourceNotFoundError):
            await models.pull(ModelSpec("n", "hf:tiny/none"), harness)
        assert [status.id for status in models.statuses()] == ["m"], "what cannot be downloaded is not listed"
        first_came.clear()
        goes_on.clear()
        publish_repository(site, {**FILES, "model.safetensors": WEIGHTS + b"x"}, "tiny/more")
        ended = asyncio.ensure_future(models.pull(ModelSpec("o", "hf:tiny/more"), harness))
        await asyncio.to_thread(first_came.wait, 10)
        await models.unload("o", 0)
        goes_on.set()
        with pytest.raises(UnavailableError, match="ended by an unload"):
            await ended

    def watched(report: Callable[[int, int], None]) -> Callable[[int, int], None]:
        def report_and_wait(done: int, total: int) -> None:
            report(done, total)
            first_came.set()
            goes_on.wait(10)

        return report_and_wait

    fetch_source = source.fetch
    monkeypatch.setattr(
        source, "fetch", lambda name, report, **rest: fetch_source(name, report=watched(report), **rest)
    )
    with serve_files() as site:
        publish_repository(site, FILES)
        monkeypatch.setenv("HF_ENDPOINT", site.address)
        asyncio.run(story())


def test_models_are_evicted_for_the_context_that_is_worth_it(tmp_path: pathlib.Path) -> None:
    """A load that demands no context gets by with the least, unless its evictions are for more."""

    class Harness(ScriptedHarness):
        async def measure(self, spec: ModelSpec, path: pathlib.Path) -> Requirement:
            need = await super().measure(spec, path)
            return Requirement(
                {device: least + spec.context_tokens * (GIB >> 10) for device, least in need.bytes_on.items()}
            )

    async def story() -> None:
        models, harness = ModelTable(lambda entry: loader.load(entry)), Harness(total_bytes={"cuda:0": 10 * GIB})
        loader = Loader(tmp_path, Evictor(models, EvictionTimeouts(0, 0, 0)))

        def spec(name: str, gib: float) -> ModelSpec:
            return ModelSpec(name, str(describe(tmp_path, name, gib, load_s=0)))

        def ready() -> set[str]:
            return {status.id for status in models.statuses() if status.state is ModelState.READY}

        await models.load(spec("old", 4), harness)
        await models.load(spec("new", 4), harness, evict=Eviction(context_tokens=1024))
        assert ready() == {"old", "new"}, "there is room for both"
        await models.unload("new", 0)
        status = await models.load(spec("new", 4), harness, evict=Eviction(context_tokens=4096))
        assert ready() == {"new"}
        assert status.required_bytes == 4 * GIB, "what it needs at least"
        await models.load(spec("other", 4), harness, evict=Eviction())
        assert ready() == {"new", "other"}

    asyncio.run(story())
