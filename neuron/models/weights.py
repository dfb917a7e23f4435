"""Reading of a checkpoint's tensors by their safetensors names, from any file format.

Files are memory-mapped, and a tensor is converted during the copy to its final memory: only the current piece is held
twice. Names and shapes are checked against the configuration before any copy.
"""

import contextlib
import dataclasses
import mmap
import os
import pathlib
from typing import Any, Final, Protocol

import gguf
import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from neuron.layers.parameters import Tensor
from neuron.models.config import config_from_gguf, read_config
from neuron.models.errors import CorruptWeightsError, UnsupportedQuantizationError
from neuron.models.fields import MAX_EXPERTS
from neuron.models.files import MAX_INDEX_BYTES, is_name, open_regular, read_json_object
from neuron.models.gguf import TensorInfo, TensorKind, read_header
from neuron.models.model import ModelConfig
from neuron.models.transfer import ON_HOST, Transfer, from_file

PIECE_ELEMENTS: Final = 1 << 18
"""Number of elements dequantised at a time, a multiple of every block: 1 MiB of float32 stays in the cache between
passes."""
DERIVED_TENSORS: Final = ("rotary_emb.inv_freq", "rope_freqs.weight")
"""Constants that some exporters store; here they come from the configuration."""
MAX_HEADER_BYTES: Final = 16 << 20
"""Bound on the header of a safetensors file: 100 bytes a tensor; the largest checkpoints have 91,000 in 163 files."""
SAFETENSORS_DTYPES: Final = ("F64", "F32", "F16", "BF16")
STORED_KINDS: Final = {
    torch.float32: TensorKind.F32,
    torch.float16: TensorKind.F16,
    torch.bfloat16: TensorKind.BF16,
}

FLOATS: Final = {kind: dtype for dtype, kind in STORED_KINDS.items()}
"""Kinds that are read without dequantising."""

PackedBytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """View of a tensor's stored bytes."""

    kind: TensorKind
    packed: PackedBytes
    head_dim: int = 0
    """Size of each head, where its rows are stored as pairs of its halves; else 0."""

    def rows(self, num_rows: int, start: int, stop: int) -> PackedBytes:
        """Return rows ``start`` to ``stop`` of ``num_rows`` as bytes ``[rows, bytes]``, in rotate-half order.

        Llama's GGUF export interleaves the two halves of each query and key head for llama.cpp's rotary embedding. Rows
        are packed one by one, so they are reordered before they are dequantised, at a quarter of the bytes.
        """
        packed, head_dim = self.packed.reshape(num_rows, -1), self.head_dim
        if not head_dim:
            return packed[start:stop]
        wanted = np.arange(start, stop)
        place = wanted % head_dim
        chosen: PackedBytes = packed[wanted - place + place % (head_dim // 2) * 2 + place // (head_dim // 2)]
        return chosen


class WeightSource(Protocol):
    """Open checkpoint."""

    config: ModelConfig

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors, by safetensors name."""

    def read_into(
        self,
        name: str,
        destination: torch.Tensor,
        *,
        transfer: Transfer = ON_HOST,
        first_row: int = 0,
        first_column: int = 0,
    ) -> None:
        """Copy a part of a tensor into ``destination``, of any float dtype and device.

        ``destination`` is contiguous, and has the part's shape.
        """

    def read_stored(self, name: str) -> "StoredTensor | None":
        """Return a tensor as stored in the file, without a copy; ``None`` if it is not in a GGUF kind."""

    def close(self) -> None:
        """Unmap the files. No stored tensor may be in use."""


def open_weights(path: pathlib.Path) -> WeightSource:
    """Open the checkpoint at ``path`` and check it against its configuration.

    Raises :class:`CorruptWeightsError` and the errors of :func:`neuron.models.config.read_config`.
    """
    if not path.exists():
        raise CorruptWeightsError(path, "no such file or folder")
    source = SafetensorsSource(path) if path.is_dir() else GgufSource(path)
    try:
        check_shapes(path, source.config.tensor_shapes(), source.shapes(), source.config.head.tied)
    except BaseException:
        source.close()
        raise
    return source


def check_shapes(
    path: pathlib.Path, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], tied: bool
) -> None:
    """Raise :class:`CorruptWeightsError` unless ``found`` is ``expected``; a tied head may be stored as well."""
    extra = set(found) - set(expected) - ({"lm_head.weight"} if tied else set())
    for what, names in (("lacks", set(expected) - set(found)), ("has unexpected", extra)):
        if names:
            some = ", ".join(sorted(names)[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            raise CorruptWeightsError(path, f"the checkpoint {what} {some}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise CorruptWeightsError(
                path, f"{name} has shape {list(found[name])}, the configuration says {list(shape)}"
            )


class _SafetensorsFile(Protocol):
    """Interface of ``safetensors.safe_open``, which carries no types."""

    def keys(self) -> list[str]: ...
    def get_slice(self, name: str) -> Any: ...
    def get_tensor(self, name: str) -> torch.Tensor: ...


class SafetensorsSource:
    """Checkpoint in a folder with ``config.json`` and ``.safetensors`` files."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.config = read_config(folder)
        self._declared = self.config.tensors()
        self._folder = folder
        self._files: dict[str, _SafetensorsFile] = {}
        file_of = _read_index(folder / "model.safetensors.index.json")
        if file_of is not None:
            self._file_of = file_of
            there: dict[str, set[str]] = {}
            for name, file_name in self._file_of.items():
                if file_name not in there:
                    there[file_name] = set(self._open(file_name).keys())
                if name not in there[file_name]:
                    raise CorruptWeightsError(folder / file_name, f"the index promises {name}")
        else:
            self._file_of = dict.fromkeys(self._open("model.safetensors").keys(), "model.safetensors")
        self._file_of = {name: file for name, file in self._file_of.items() if not name.endswith(DERIVED_TENSORS)}
        # A model that was saved without a head has no `model.` before its names.
        bare = "embed_tokens.weight" in self._file_of
        self._stored = {f"model.{name}" if bare and name != "lm_head.weight" else name: name for name in self._file_of}

    def _open(self, file_name: str) -> _SafetensorsFile:
        if file_name not in self._files:
            path = self._folder / file_name
            _check_header(path)
            try:
                self._files[file_name] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CorruptWeightsError(path, str(error)) from error
        return self._files[file_name]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors."""
        return {
            name: tuple(self._files[self._file_of[stored]].get_slice(stored).get_shape())
            for name, stored in self._stored.items()
        }

    def read_into(
        self,
        name: str,
        destination: torch.Tensor,
        *,
        transfer: Transfer = ON_HOST,
        first_row: int = 0,
        first_column: int = 0,
    ) -> None:
        """Copy from the mapped file, with conversion, in one pass."""
        stored_name = self._stored[name]
        file_name = self._file_of[stored_name]
        tensor = self._files[file_name].get_slice(stored_name)
        stored = tensor.get_dtype()
        if stored not in SAFETENSORS_DTYPES:
            raise UnsupportedQuantizationError(f"{self._folder / file_name}: {stored_name} is stored as {stored}")
        if list(destination.shape) == tensor.get_shape():
            # A view of the mapping; a slice would be a copy of it.
            transfer.copy(self._files[file_name].get_tensor(stored_name), destination)
        elif destination.ndim == 1:
            transfer.copy(tensor[first_row : first_row + len(destination)], destination)
        else:
            rows, columns = destination.shape
            transfer.copy(tensor[first_row : first_row + rows, first_column : first_column + columns], destination)
        if self._declared[name].less_one:
            destination.add_(1)

    def read_stored(self, name: str) -> StoredTensor | None:
        """Return the mapped tensor."""
        stored = self._stored[name]
        tensor = self._files[self._file_of[stored]].get_tensor(stored)
        kind = STORED_KINDS.get(tensor.dtype)
        return None if kind is None else StoredTensor(kind, tensor.view(torch.uint8).reshape(-1).numpy())

    def close(self) -> None:
        """Unmap the files."""
        self._files.clear()


class GgufSource:
    """Checkpoint in a GGUF file, dequantised piece by piece."""

    def __init__(self, path: pathlib.Path) -> None:
        header = read_header(path)
        self.config = config_from_gguf(path, header)
        self._path = path
        self._declared: dict[str, Tensor] = self.config.tensors()
        known = {tensor.gguf: name for name, tensor in self._declared.items()}
        self._tensors = {
            known.get(part.name, part.name): part
            for tensor in header.tensors
            if not tensor.name.endswith(DERIVED_TENSORS)
            for part in _experts(tensor)
        }
        with path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors; a tensor without a safetensors name keeps its own."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def read_into(
        self,
        name: str,
        destination: torch.Tensor,
        *,
        transfer: Transfer = ON_HOST,
        first_row: int = 0,
        first_column: int = 0,
    ) -> None:
        """Dequantise into ``destination``, piece by piece."""
        tensor = self._tensors[name]
        if len(tensor.shape) == 1:
            packed = self.read_stored(name).rows(tensor.shape[0], 0, tensor.shape[0])
            values = self._values(tensor, packed)
            transfer.copy(values[first_row : first_row + len(destination)], destination)
            return
        stored, (num_rows, num_columns) = self.read_stored(name), tensor.shape
        step = len(destination) if tensor.kind in FLOATS else max(1, PIECE_ELEMENTS // num_columns)
        for start in range(0, len(destination), step):
            part = destination[start : start + step]
            first = first_row + start
            packed = stored.rows(num_rows, first, first + len(part))
            values = self._values(tensor, packed).view(len(part), num_columns)
            transfer.copy(values[:, first_column : first_column + part.shape[1]], part)

    def read_stored(self, name: str) -> StoredTensor:
        """Return the mapped blocks."""
        tensor = self._tensors[name]
        packed = np.frombuffer(self._data, np.uint8, tensor.nbytes, tensor.offset)
        return StoredTensor(tensor.kind, packed, self._declared[name].head_dim)

    def _values(self, tensor: TensorInfo, blocks: PackedBytes) -> torch.Tensor:
        """Return the elements of ``blocks`` as one vector: floats as stored, others in float32."""
        if tensor.kind in FLOATS:
            return from_file(np.ascontiguousarray(blocks).reshape(-1)).view(FLOATS[tensor.kind])
        try:
            # As one row: the library would walk over groups of 16 rows, in small passes.
            kind = gguf.GGMLQuantizationType(tensor.kind)
            return torch.from_numpy(
                np.asarray(gguf.quants.dequantize(blocks.reshape(1, -1), kind), np.float32).reshape(-1)
            )
        except NotImplementedError as error:
            raise UnsupportedQuantizationError(
                f"{self._path}: {tensor.name} is stored as {tensor.kind.name}"
            ) from error

    def close(self) -> None:
        """Unmap the file; later, if a raised exception still holds a view of it."""
        with contextlib.suppress(BufferError):
            self._data.close()


def _experts(tensor: TensorInfo) -> list[TensorInfo]:
    """Return a layer's experts one by one, as ``ffn_up_exps.7``; any other tensor unchanged."""
    stem = tensor.name.removesuffix(".weight")
    if not stem.endswith("_exps") or len(tensor.shape) != 3 or tensor.shape[0] > MAX_EXPERTS:
        return [tensor]
    count, *shape = tensor.shape
    nbytes = tensor.nbytes // count
    return [
        dataclasses.replace(
            tensor, name=f"{stem}.{i}", shape=tuple(shape), offset=tensor.offset + i * nbytes, nbytes=nbytes
        )
        for i in range(count)
    ]


def _check_header(path: pathlib.Path) -> None:
    """Raise CorruptWeightsError unless a safetensors file begins with a header of a sane size that fits into it.

    Format: https://huggingface.co/docs/safetensors#format. The library takes up to 100 MB, a million tensors, and waits
    for ever to open a pipe.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
    except FileNotFoundError:
        raise CorruptWeightsError(path, "no such file") from None
    if size < 8 or length > size - 8:
        raise CorruptWeightsError(path, f"a header of {length} bytes cannot be in {size}")
    if length > MAX_HEADER_BYTES:
        raise CorruptWeightsError(path, f"a header of {length} bytes; at most {MAX_HEADER_BYTES} are read")


def _read_index(path: pathlib.Path) -> dict[str, str] | None:
    """Return the file name of each tensor in a sharded checkpoint, ``None`` for one without an index."""
    try:
        file_of = read_json_object(path, MAX_INDEX_BYTES)["weight_map"]
        # Only names within the folder: an index is as untrusted as the weights.
        sound = all(is_name(file) for file in file_of.values())
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptWeightsError(path, f"not an index of weights: {error!r}") from error
    if not sound:
        raise CorruptWeightsError(path, "the index names a file outside of its folder")
    return dict(file_of)
