"""A repository's choices measured from afar: the headers of its files are read by ranges, and no weights.

The header of one GGUF file, up to some megabytes, tells nearly what all choices take. That of the chosen one is read
then, until a choice stands on its own figures.
"""

import io
import os
import pathlib
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from cortex.wire.errors import ApiError
from cortex.wire.node import Fit, ModelSpec
from neuron.errors import SourceUnavailableError
from neuron.load.choices import SAFETENSORS, Choice, choose, find_choices
from neuron.load.download import RemoteFile, get, read_range
from neuron.load.fit import Candidate, estimated, fit
from neuron.load.hub import Hub, HubSource, Listing
from neuron.models.config import config_from_gguf, read_config
from neuron.models.errors import CorruptWeightsError, UnsupportedArchitectureError
from neuron.models.files import MAX_INDEX_BYTES, is_name
from neuron.models.gguf import read_header_of
from neuron.models.model import ModelConfig
from neuron.models.safetensors import MAX_HEADER_BYTES
from neuron.models.schemes import is_quantised

_CONFIG_NAMES: Final = (
    "config.json",
    "generation_config.json",
    "modules.json",
    "model.safetensors.index.json",
    "hf_quant_config.json",
)


def survey(
    hub: Hub, source: HubSource, free_bytes: Mapping[str, int], spec: ModelSpec, *, cpu_kernels: bool = True
) -> Fit:
    """Return the choice of a repository, or of ``source`` alone, that fits best. Blocks.

    Raises :class:`SourceNotFoundError` where there is none, :class:`UnsupportedArchitectureError`, and as
    :func:`neuron.load.download.download`.
    """
    if hub.offline:
        raise SourceUnavailableError(f"{source.repository} cannot be listed: HF_HUB_OFFLINE is set.")
    listing = hub.list_files(source)
    choices = find_choices(listing.files)
    if source.choice is not None or not choices:
        choices = (choose(choices, source.choice, source.repository),)
    candidates = _candidates(hub, listing, choices)
    while True:
        found = fit(list(candidates.values()), free_bytes, spec, cpu_kernels=cpu_kernels)
        best = None if found.chosen is None else candidates[found.chosen.choice]
        if best is None or not best.is_estimate:
            return found
        candidates[best.choice.name] = _read(hub, listing, best.choice)


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
    try:
        read = _folder_config if choice.tag == SAFETENSORS else _gguf_config
        return Candidate(choice, read(hub, listing, choice))
    except (SourceUnavailableError, UnsupportedArchitectureError):
        raise
    except ApiError as error:
        return Candidate(choice, None, error.message)


def _gguf_config(hub: Hub, listing: Listing, choice: Choice) -> ModelConfig:
    headers = [
        read_header_of(file.path, _RemoteHead(hub.remote(listing, file), file.size_bytes), file.size_bytes)
        for file in choice.files
    ]
    tensors = tuple(tensor for header in headers for tensor in header.tensors)
    return config_from_gguf(pathlib.Path(choice.files[0].path), replace(headers[0], tensors=tensors))


def _folder_config(hub: Hub, listing: Listing, choice: Choice) -> ModelConfig:
    with tempfile.TemporaryDirectory(prefix="neuron-config-") as folder:
        for file in choice.files:
            if file.path in _CONFIG_NAMES or file.path.startswith("1_Pooling/"):
                path = pathlib.Path(folder, file.path)
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(get(hub.remote(listing, file), MAX_INDEX_BYTES)[0])
        if is_quantised(pathlib.Path(folder)):
            # The forms of the weights are in the files' headers: each file is one with a hole in place of the weights.
            for file in choice.files:
                if file.path.endswith(".safetensors") and is_name(file.path):
                    _write_header(hub.remote(listing, file), file.size_bytes, pathlib.Path(folder, file.path))
        return read_config(pathlib.Path(folder))


def _write_header(remote: RemoteFile, size_bytes: int, path: pathlib.Path) -> None:
    head = _RemoteHead(remote, size_bytes)
    length = head.read(8)
    num_bytes = min(int.from_bytes(length, "little"), MAX_HEADER_BYTES)
    path.write_bytes(length + head.read(num_bytes))
    try:
        os.truncate(path, size_bytes)
    except (OSError, OverflowError) as error:
        raise CorruptWeightsError(path.name, f"{size_bytes} bytes are no file's size here: {error}") from error


class _RemoteHead(io.RawIOBase):
    """The bytes of a file on a server from its start, read as they are needed."""

    def __init__(self, remote: RemoteFile, size_bytes: int) -> None:
        self._remote, self._size_bytes, self._place = remote, size_bytes, 0

    def read(self, size: int = -1, /) -> bytes:
        """Return the next ``size`` bytes, or what is left of the file."""
        left = self._size_bytes - self._place
        stop = self._place + (left if size < 0 else min(size, left))
        data = read_range(self._remote, self._place, stop) if stop > self._place else b""
        self._place += len(data)
        return data
