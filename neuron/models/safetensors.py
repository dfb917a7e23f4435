"""Reader of the headers of a checkpoint in safetensors: the tensors of its files, and their positions.

It reads the container, not models, and imports no torch: the daemon's preflight finds the form of quantised weights
with it. A header is untrusted: each length, shape and position is compared with the file. It is read, not mapped, as
:mod:`neuron.models.gguf`. Format: https://huggingface.co/docs/safetensors#format.
"""

import dataclasses
import itertools
import math
import os
import pathlib
from typing import Final

import msgspec

from neuron.models.errors import CorruptWeightsError
from neuron.models.files import MAX_INDEX_BYTES, is_name, open_regular, quoted, read_json_object
from neuron.models.wrappers import text_name

INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
MAX_HEADER_BYTES: Final = 16 << 20
"""Bound on the header of a file: 100 bytes a tensor; the largest checkpoints have 91,000 in 163 files."""
MAX_DIMENSIONS: Final = 8
DERIVED_TENSORS: Final = ("rotary_emb.inv_freq",)
"""Constants that some exporters store; here they come from the configuration."""
DTYPE_BYTES: Final = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 1),
}


FLOATS: Final = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""torch's names of the dtypes of floats, which are converted while they are copied."""


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


@dataclasses.dataclass(frozen=True, slots=True)
class TensorEntry:
    """Tensor of a file, by the name it has there; ``offset`` counts from the file's start."""

    file: pathlib.Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    strides: tuple[int, ...] = ()
    """Distances of rows and columns in elements, of a matrix that is part of another one; else it is contiguous."""


def read_tensors(folder: pathlib.Path) -> dict[str, TensorEntry]:
    """Return the tensors of the checkpoint in ``folder`` by their names in the model.

    Raises :class:`CorruptWeightsError`.
    """
    found = _in_files(folder)
    found = {name: entry for stored, entry in found.items() if (name := text_name(stored)) is not None}
    # A model that was saved without a head has no `model.` before its names.
    bare = "embed_tokens.weight" in found
    return {
        f"model.{name}" if bare and name != "lm_head.weight" else name: entry
        for name, entry in found.items()
        if not name.endswith(DERIVED_TENSORS)
    }


def _in_files(folder: pathlib.Path) -> dict[str, TensorEntry]:
    """Return the tensors of one file, or of the files that an index names."""
    file_of = _read_index(folder / INDEX)
    if file_of is None:
        return _read_header(folder / SINGLE)
    headers = {file: _read_header(folder / file) for file in dict.fromkeys(file_of.values())}
    found = {}
    for name, file in file_of.items():
        if name not in headers[file]:
            raise CorruptWeightsError(folder / file, f"the index promises {quoted(name)}")
        found[name] = headers[file][name]
    return found


def _read_header(path: pathlib.Path) -> dict[str, TensorEntry]:
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise CorruptWeightsError(path, f"a header of {length} bytes cannot be in {size}")
            if length > MAX_HEADER_BYTES:
                raise CorruptWeightsError(path, f"a header of {length} bytes; at most {MAX_HEADER_BYTES} are read")
            header = file.read(length)
    except FileNotFoundError:
        raise CorruptWeightsError(path, "no such file") from None
    try:
        entries = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        entries.pop("__metadata__", None)
        decoder = msgspec.json.Decoder(_Entry)
        found = {name: _checked(path, name, decoder.decode(raw), 8 + length, size) for name, raw in entries.items()}
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise CorruptWeightsError(path, f"not a header of safetensors: {error}") from error
    by_offset = sorted(found.values(), key=lambda tensor: tensor.offset)
    for before, tensor in itertools.pairwise(by_offset):
        if before.offset + before.nbytes > tensor.offset:
            raise CorruptWeightsError(path, f"{quoted(before.name)} and {quoted(tensor.name)} overlap")
    return found


def _checked(path: pathlib.Path, name: str, entry: _Entry, start: int, size: int) -> TensorEntry:
    """Return a tensor whose bytes are all in the file."""
    begin, end = entry.data_offsets
    nbytes = DTYPE_BYTES.get(entry.dtype, 0) * math.prod(entry.shape[:MAX_DIMENSIONS])
    if (
        entry.dtype not in DTYPE_BYTES
        or len(entry.shape) > MAX_DIMENSIONS
        or min(entry.shape, default=1) < 0
        or not 0 <= begin <= end <= size - start
        or end - begin != nbytes
    ):
        raise CorruptWeightsError(
            path,
            f"{quoted(name)} cannot be {quoted(entry.dtype)} of {quoted(entry.shape)} in bytes {begin} to {end}",
        )
    return TensorEntry(path, name, entry.dtype, tuple(entry.shape), start + begin, nbytes)


def _read_index(path: pathlib.Path) -> dict[str, str] | None:
    """Return the file name of each tensor in a sharded checkpoint, ``None`` for one without an index."""
    index = read_json_object(path, MAX_INDEX_BYTES)
    if index is None:
        return None
    try:
        file_of = index["weight_map"]
        # Only names within the folder: an index is as untrusted as the weights.
        sound = all(is_name(file) for file in file_of.values())
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptWeightsError(path, f"not an index of weights: {error!r}") from error
    if not sound:
        raise CorruptWeightsError(path, "the index names a file outside of its folder")
    return dict(file_of)
