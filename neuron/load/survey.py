"""A repository's choices measured from afar: the headers of its files are read by ranges, and no weights.

The header of one GGUF file, up to some megabytes, tells nearly what all choices take. That of the chosen one is read
then, until a choice stands on its own figures.
"""

import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping

from cortex.wire.errors import ApiError
from cortex.wire.node import Fit, ModelSpec
from neuron.errors import DiskFullError, SourceUnavailableError
from neuron.load.choices import SAFETENSORS, Choice, RepositoryFile, choose, find_choices
from neuron.load.download import RemoteFile, disk_errors, get, read_range
from neuron.load.fit import Candidate, estimated, fit
from neuron.load.hub import Hub, HubSource, Listing
from neuron.models.config import read_config
from neuron.models.errors import CorruptWeightsError, UnsupportedArchitectureError
from neuron.models.files import MAX_CONFIG_BYTES, MAX_INDEX_BYTES
from neuron.models.gguf import read_header_of
from neuron.models.safetensors import INDEX, MAX_HEADER_BYTES
from neuron.models.schemes import is_quantised


def survey(
    hub: Hub,
    source: HubSource,
    free_bytes: Mapping[str, int],
    spec: ModelSpec,
    *,
    evictable_bytes: Mapping[str, int] | None = None,
    cpu_kernels: bool = True,
) -> Fit:
    """Return the choice of a repository, or of ``source`` alone, that fits best. Blocks.

    Where the hub does not answer, the choices are those in the cache. Raises :class:`SourceNotFoundError` where there
    is none, :class:`UnsupportedArchitectureError`, and as :func:`neuron.load.download.download`.
    """
    try:
        candidates, read = _remote_candidates(hub, source)
    except SourceUnavailableError:
        cached = hub.cached_choices(source)
        if not cached:
            raise
        chosen = tuple(cached) if source.choice is None else (choose(tuple(cached), source.choice, source.repository),)
        candidates, read = {choice.name: _cached_candidate(cached[choice], choice) for choice in chosen}, None
    while True:
        found = fit(
            list(candidates.values()), free_bytes, spec, evictable_bytes=evictable_bytes, cpu_kernels=cpu_kernels
        )
        best = None if found.chosen is None else candidates[found.chosen.choice]
        if best is None or not best.is_estimate:
            return found
        assert read is not None
        candidates[best.choice.name] = read(best.choice)


def candidate_at(path: pathlib.Path, choice: Choice | None = None) -> Candidate:
    """Return the weights at a path of this host as a candidate; by default they are its only choice."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    alone = Choice("", tuple(RepositoryFile(file.name, file.stat().st_size) for file in files), path.name)
    return Candidate(choice or alone, read_config(path))


def _cached_candidate(path: pathlib.Path, choice: Choice) -> Candidate:
    try:
        return candidate_at(path, choice)
    except ApiError as error:
        return Candidate(choice, None, error.message)


def _remote_candidates(hub: Hub, source: HubSource) -> tuple[dict[str, Candidate], Callable[[Choice], Candidate]]:
    """Return the candidates of a repository by name, and the function that reads one as it is."""
    if hub.offline:
        raise SourceUnavailableError(f"{source.repository} cannot be listed: HF_HUB_OFFLINE is set.")
    listing = hub.list_files(source)
    choices = find_choices(listing.files)
    if source.choice is not None or not choices:
        choices = (choose(choices, source.choice, source.repository),)
    return _candidates(hub, listing, choices), lambda choice: _read(hub, listing, choice)


def _candidates(hub: Hub, listing: Listing, choices: tuple[Choice, ...]) -> dict[str, Candidate]:
    """Return the choices by name: the smallest GGUF file and the safetensors as they are, others estimated."""
    found: dict[str, Candidate] = {}
    known: Candidate | None = None
    for choice in reversed(choices):
        candidate = None if known is None or choice.tag == SAFETENSORS else estimated(known, choice)
        found[choice.name] = candidate = candidate or _read(hub, listing, choice)
        if choice.tag != SAFETENSORS and candidate.config is not None and not candidate.is_estimate:
            known = candidate
    return {choice.name: found[choice.name] for choice in choices}


def _read(hub: Hub, listing: Listing, choice: Choice) -> Candidate:
    """Return a choice with the configuration that its files have."""
    with tempfile.TemporaryDirectory(prefix="neuron-survey-") as name, disk_errors(pathlib.Path(name)):
        folder = pathlib.Path(name)
        try:
            if choice.tag == SAFETENSORS:
                _write_settings(hub, listing, choice, folder)
                return Candidate(choice, read_config(folder))
            paths = [folder / pathlib.PurePosixPath(file.path).name for file in choice.files]
            for file, path in zip(choice.files, paths, strict=True):
                _write_head(hub.remote(listing, file), file.size_bytes, path, _read_gguf)
            return Candidate(choice, read_config(paths[0]))
        except (SourceUnavailableError, DiskFullError, UnsupportedArchitectureError):
            raise
        except ApiError as error:
            return Candidate(choice, None, error.message.replace(f"{folder}/", ""))


def _write_settings(hub: Hub, listing: Listing, choice: Choice, folder: pathlib.Path) -> None:
    """Write the settings of safetensors, and the heads of their files where the settings do not tell what they hold."""
    weights = []
    for file in choice.files:
        path = folder / file.path
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".safetensors":
            weights.append(file)
        elif path.suffix == ".json" and (file.size_bytes <= MAX_CONFIG_BYTES or file.path == INDEX):
            path.write_bytes(get(hub.remote(listing, file), MAX_INDEX_BYTES)[0])
    if len(weights) == 1 or is_quantised(folder):
        for file in weights:
            _write_head(hub.remote(listing, file), file.size_bytes, folder / file.path, _read_safetensors)


def _write_head(
    remote: RemoteFile, size_bytes: int, path: pathlib.Path, read: Callable[["_RemoteHead", pathlib.Path], object]
) -> None:
    """Write a file's bytes as far as ``read`` reads them, and a hole of the rest."""
    head = _RemoteHead(remote, size_bytes)
    read(head, path)
    path.write_bytes(head.data)
    try:
        os.truncate(path, size_bytes)
    except (OSError, OverflowError) as error:
        raise CorruptWeightsError(path, f"{size_bytes} bytes are no file's size here: {error}") from error


def _read_gguf(head: "_RemoteHead", path: pathlib.Path) -> None:
    read_header_of(path, head, head.size_bytes)


def _read_safetensors(head: "_RemoteHead", _: pathlib.Path) -> None:
    """Read the header, whose length is before it; one that is none is left to its reader."""
    head.read(min(MAX_HEADER_BYTES, int.from_bytes(head.read(8), "little")))


class _RemoteHead:
    """The bytes of a file on a server from its start, read as they are needed."""

    def __init__(self, remote: RemoteFile, size_bytes: int) -> None:
        self._remote, self.size_bytes = remote, size_bytes
        self.data = bytearray()

    def read(self, size: int, /) -> bytes:
        """Return the next ``size`` bytes, or what is left of the file."""
        start = len(self.data)
        stop = min(start + size, self.size_bytes)
        data = read_range(self._remote, start, stop) if stop > start else b""
        self.data += data
        return data
