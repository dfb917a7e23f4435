"""One load, from a spec to a ready model: find the weights, measure them, get room, have the harness load them.

Says how far it is as one fraction: the first half is the download where there is one, the rest the load. Which loads
happen, and that each happens once, is the table's (:mod:`neuron.load.table`).
"""

import asyncio
import pathlib
import time

import msgspec

from neuron.harness import Model
from neuron.load import source
from neuron.load.table import Entry, GiveRoom

_FETCH_SHARE = 0.5


class Loader:
    """Brings entries up; :meth:`load` is what a table is given."""

    def __init__(self, cache: pathlib.Path) -> None:
        self._cache = cache

    async def load(self, entry: Entry, room: GiveRoom) -> Model:
        """Fetch the weights of ``entry`` and load them where ``room`` says.

        Raises:
            ApiError: the source, the fit or the weights are wrong; see :func:`neuron.load.source.fetch`,
                :meth:`neuron.harness.Harness.measure` and :meth:`neuron.harness.Harness.load`.
        """

        def fetched(done_bytes: int, total_bytes: int) -> None:
            entry.progress = _FETCH_SHARE * done_bytes / total_bytes if total_bytes else 0.0

        def loaded(fraction: float) -> None:
            entry.progress = _FETCH_SHARE + (1.0 - _FETCH_SHARE) * fraction

        spec = entry.spec
        path = await asyncio.to_thread(
            source.fetch, spec.source, cache=self._cache, sha256=spec.sha256, progress=fetched
        )
        if spec.draft:
            draft = await asyncio.to_thread(source.fetch, spec.draft, cache=self._cache, progress=fetched)
            spec = msgspec.structs.replace(spec, draft=str(draft))
        need = await entry.harness.measure(spec, path)
        async with room(entry, need) as devices:
            start = time.monotonic()
            model = await entry.harness.load(
                msgspec.structs.replace(spec, devices=devices) if devices else spec, path, loaded
            )
            entry.load_s = time.monotonic() - start
            return model
