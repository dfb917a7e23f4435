"""A load, from a spec to a ready model: fetch the weights, measure them, free memory, have the harness load them.

Progress is one fraction: the first half is the download where there is one, the rest the load. The table
(:mod:`neuron.load.table`) decides on loads and runs each once. Every exception that a model's files cause becomes an
``ApiError``, so that the load is not retried on another node.
"""

import asyncio
import contextlib
import logging
import pathlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import msgspec

from cortex.wire.errors import ApiError
from cortex.wire.node import ModelSpec
from neuron.errors import SourceUnavailableError
from neuron.harness import Model
from neuron.load import source
from neuron.load.entry import Entry
from neuron.load.eviction import Evictor
from neuron.models.errors import LoadFailedError

_log = logging.getLogger("neuron.models")

_FETCH_SHARE = 0.5
MAX_FETCHES: Final = 8
"""Number of sources downloaded or hashed at a time, in threads of their own: a slow one delays nothing else."""


class Loader:
    """Loads the models of entries; :meth:`load` is the function that a table takes."""

    def __init__(self, cache: pathlib.Path, evictor: Evictor) -> None:
        self._cache, self._evictor = cache, evictor
        self._threads = ThreadPoolExecutor(MAX_FETCHES, "fetch")

    async def load(self, entry: Entry) -> Model:
        """Fetch the weights of ``entry`` and load them on the devices that the evictor gives.

        Raises:
            ApiError: the source, the fit or the weights are wrong; see :func:`neuron.load.source.fetch`,
                :meth:`neuron.harness.Harness.measure` and :meth:`neuron.harness.Harness.load`.
            LoadFailedError: the files cause an error that no reader foresees.
        """
        with _foreseen(entry):
            return await self._load(entry)

    async def fetch(self, entry: Entry) -> None:
        """Fetch the weights of ``entry``, so that a load finds them here. Raises as :meth:`load`."""
        with _foreseen(entry):
            await self._fetch(entry)

    async def _load(self, entry: Entry) -> Model:
        def loaded(fraction: float) -> None:
            entry.progress = _FETCH_SHARE + (1.0 - _FETCH_SHARE) * fraction

        path, spec = await self._fetch(entry)
        need = least = await entry.harness.measure(spec, path)
        if entry.evict is not None and entry.evict.context_tokens and not spec.context_tokens:
            roomy = msgspec.structs.replace(spec, context_tokens=entry.evict.context_tokens)
            need = await entry.harness.measure(roomy, path)
        async with self._evictor.devices_for(entry, need) as devices:
            entry.need = least
            start = time.monotonic()
            model = await entry.harness.load(
                msgspec.structs.replace(spec, devices=devices) if devices else spec, path, loaded
            )
            entry.load_s = time.monotonic() - start
            return model

    async def _fetch(self, entry: Entry) -> tuple[pathlib.Path, ModelSpec]:
        """Return the path of the weights, and the specification with that of the draft model's."""
        is_over = threading.Event()

        def fetched(done_bytes: int, total_bytes: int) -> None:
            if is_over.is_set():
                raise SourceUnavailableError(f"The load of '{spec.id}' was ended; what has come is kept.")
            entry.downloaded_bytes, entry.download_bytes = done_bytes, total_bytes
            entry.progress = _FETCH_SHARE * done_bytes / total_bytes if total_bytes else 0.0

        def fetch(name: str, sha256: str = "") -> pathlib.Path:
            return source.fetch(name, cache=self._cache, sha256=sha256, report=fetched)

        loop, spec = asyncio.get_running_loop(), entry.spec
        try:
            path = await loop.run_in_executor(self._threads, fetch, spec.source, spec.sha256)
            if spec.draft:
                draft = await loop.run_in_executor(self._threads, fetch, spec.draft)
                spec = msgspec.structs.replace(spec, draft=str(draft))
        finally:
            is_over.set()  # a thread cannot be cancelled
            entry.downloaded_bytes = entry.download_bytes = 0
        return path, spec


@contextlib.contextmanager
def _foreseen(entry: Entry) -> Iterator[None]:
    """Make every exception that files cause an :class:`ApiError`."""
    try:
        yield
    except ApiError:
        raise
    except Exception as error:
        _log.exception("load of model=%s raised", entry.spec.id)
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise LoadFailedError(f"The files of '{entry.spec.id}' cannot be loaded: {reason}") from error
