"""One load, from a spec to a ready model: find the weights, measure them, get room, have the harness load them.

Says how far it is as one fraction: the first half is the download where there is one, the rest the load. Which loads
happen, and that each happens once, is the table's (:mod:`neuron.load.table`). Only an ``ApiError`` leaves it: whatever
else a model's files make a reader of them raise is about those files, and is not to be tried on another node.
"""

import asyncio
import logging
import pathlib
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import msgspec

from cortex.wire.errors import ApiError
from neuron.harness import Model
from neuron.load import source
from neuron.load.table import Entry, GiveRoom
from neuron.models.errors import LoadFailedError

_log = logging.getLogger("neuron.models")

_FETCH_SHARE = 0.5
MAX_FETCHES: Final = 8
"""Sources that are downloaded or hashed at a time. They have threads of their own: a slow one holds up nothing else."""


class Loader:
    """Brings entries up; :meth:`load` is what a table is given."""

    def __init__(self, cache: pathlib.Path) -> None:
        self._cache = cache
        self._threads = ThreadPoolExecutor(MAX_FETCHES, "fetch")

    async def load(self, entry: Entry, room: GiveRoom) -> Model:
        """Fetch the weights of ``entry`` and load them where ``room`` says.

        Raises:
            ApiError: the source, the fit or the weights are wrong; see :func:`neuron.load.source.fetch`,
                :meth:`neuron.harness.Harness.measure` and :meth:`neuron.harness.Harness.load`.
            LoadFailedError: something of the files was foreseen by no reader.
        """
        try:
            return await self._load(entry, room)
        except ApiError:
            raise
        except Exception as error:
            _log.exception("load of model=%s raised", entry.spec.id)
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise LoadFailedError(f"The files of '{entry.spec.id}' cannot be loaded: {reason}") from error

    async def _load(self, entry: Entry, room: GiveRoom) -> Model:
        def fetched(done_bytes: int, total_bytes: int) -> None:
            entry.progress = _FETCH_SHARE * done_bytes / total_bytes if total_bytes else 0.0

        def loaded(fraction: float) -> None:
            entry.progress = _FETCH_SHARE + (1.0 - _FETCH_SHARE) * fraction

        def fetch(name: str, sha256: str = "") -> pathlib.Path:
            return source.fetch(name, cache=self._cache, sha256=sha256, progress=fetched)

        loop, spec = asyncio.get_running_loop(), entry.spec
        path = await loop.run_in_executor(self._threads, fetch, spec.source, spec.sha256)
        if spec.draft:
            draft = await loop.run_in_executor(self._threads, fetch, spec.draft)
            spec = msgspec.structs.replace(spec, draft=str(draft))
        need = await entry.harness.measure(spec, path)
        async with room(entry, need) as devices:
            start = time.monotonic()
            model = await entry.harness.load(
                msgspec.structs.replace(spec, devices=devices) if devices else spec, path, loaded
            )
            entry.load_s = time.monotonic() - start
            return model
