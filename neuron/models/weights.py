"""Reading of a checkpoint's tensors by their safetensors names, from any file format.

Files are memory-mapped, and a tensor is converted during the copy to its final memory: only the current piece is held
twice. Names and shapes are checked against the configuration before any copy.
"""

import contextlib
import dataclasses
import mmap
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol

import gguf
import numpy as np
import torch

from neuron.formats.matrix import QuantizedMatrix, chosen_rows
from neuron.formats.registry import STORED_FORMATS
from neuron.formats.scheme import Scheme
from neuron.layers.parameters import Tensor
from neuron.layers.shard import Runs
from neuron.models import safetensors
from neuron.models.config import config_from_folder, config_from_gguf
from neuron.models.errors import CorruptWeightsError, UnsupportedQuantizationError
from neuron.models.fields import FACTORS
from neuron.models.files import quoted
from neuron.models.gguf import KINDS, TensorInfo, TensorKind, name_of
from neuron.models.gguf_parts import read_parts
from neuron.models.model import ModelConfig
from neuron.models.safetensors import DERIVED_TENSORS, TensorEntry, read_tensors
from neuron.models.schemes import by_module, places_of, unstacked_weights, whole_shapes
from neuron.models.stored import by_tensor, unstacked
from neuron.models.transfer import ON_HOST, Transfer, from_file

PIECE_ELEMENTS: Final = 1 << 18
"""Number of elements dequantised at a time, a multiple of every block: 1 MiB of float32 stays in the cache between
passes."""
STORED_KINDS: Final = {"F32": TensorKind.F32, "F16": TensorKind.F16, "BF16": TensorKind.BF16}
DTYPES: Final[dict[str, torch.dtype]] = {
    **{name: getattr(torch, dtype) for name, dtype in safetensors.FLOATS.items()},
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.uint8,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
}
"""Dtypes of tensors in safetensors; exponents are read as their bytes."""
FLOATS: Final = {kind: DTYPES[dtype] for dtype, kind in STORED_KINDS.items()}
"""Kinds that are read without dequantising."""

PackedBytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """View of a tensor's stored bytes."""

    kind: TensorKind
    packed: PackedBytes
    order: tuple[int, ...] = ()
    """Stored row of each row of a head; nothing if they are the same."""
    scale: float = 1.0
    """Number that multiplies all of it."""

    def rows(self, num_rows: int, start: int, stop: int) -> PackedBytes:
        """Return rows ``start`` to ``stop`` of ``num_rows`` as bytes ``[rows, bytes]``, in the order of the model.

        Rows are packed one by one, so they are reordered before they are dequantised, at a quarter of the bytes.
        """
        packed = self.packed.reshape(num_rows, -1)
        if not self.order:
            return packed[start:stop]
        chosen: PackedBytes = packed[stored_rows(self.order, start, stop)]
        return chosen

    def values(self, num_rows: int, start: int, stop: int) -> torch.Tensor:
        """Return the elements of these rows as one vector: floats as stored, others in float32."""
        packed = self.rows(num_rows, start, stop)
        if self.kind in FLOATS:
            return from_file(np.ascontiguousarray(packed).reshape(-1)).view(FLOATS[self.kind])
        # As one row: the library would walk over groups of 16 rows, in small passes.
        found = gguf.quants.dequantize(packed.reshape(1, -1), gguf.GGMLQuantizationType(self.kind))
        values = torch.from_numpy(np.asarray(found, np.float32).reshape(-1))
        return values if self.scale == 1 else values * self.scale


def stored_rows(order: tuple[int, ...], start: int, stop: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the stored rows of rows ``start`` to ``stop`` of heads whose rows are in ``order``."""
    wanted = np.arange(start, stop)
    place = wanted % len(order)
    stored: np.ndarray[Any, np.dtype[np.int64]] = wanted - place + np.array(order)[place]
    return stored


def chosen_columns(matrix: torch.Tensor, columns: Runs, width: int) -> torch.Tensor:
    """Return ``columns`` of a matrix, the first ``width`` unless given; a view where they are one run."""
    parts = [matrix[:, run.start : run.stop] for run in columns or (range(width),)]
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


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
        columns: Runs = (),
    ) -> None:
        """Copy a part of a tensor into ``destination``, of any float dtype and device.

        ``destination`` is contiguous, and has the part's shape. Unless given, ``columns`` of a matrix are its first.
        """

    def read_stored(self, name: str) -> "StoredTensor | None":
        """Return a tensor as stored in the file, without a copy; ``None`` if it is not in a GGUF kind."""

    def read_quantized(
        self, name: str, rows: range, columns: Runs, move: Callable[[torch.Tensor], torch.Tensor]
    ) -> QuantizedMatrix:
        """Return a part of a tensor that the device has in a quantised form; ``move`` copies stored bytes there."""

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
        check_shapes(path, source.config, source.shapes())
    except BaseException:
        source.close()
        raise
    return source


def check_shapes(path: pathlib.Path, config: ModelConfig, found: dict[str, tuple[int, ...]]) -> None:
    """Raise :class:`CorruptWeightsError` unless ``found`` are the model's tensors, or also ones that it leaves unused.

    A tied head may be stored as well.
    """
    expected = config.tensor_shapes()
    extra = {name for name in set(found) - set(expected) if not name.startswith(config.unused or ("\0",))}
    extra -= {"lm_head.weight"} if config.head.tied else set()
    for what, names in (("lacks", set(expected) - set(found)), ("has unexpected", extra)):
        if names:
            some = ", ".join(sorted(names)[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            raise CorruptWeightsError(path, f"the checkpoint {what} {some}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise CorruptWeightsError(
                path, f"{name} has shape {list(found[name])}, the configuration says {list(shape)}"
            )


class MappedFiles:
    """Files of a checkpoint, mapped when first read."""

    def __init__(self) -> None:
        self._files: dict[pathlib.Path, mmap.mmap] = {}

    def read(self, entry: TensorEntry | TensorInfo) -> PackedBytes:
        """Return the mapped bytes of a tensor; raise CorruptWeightsError if the file has become shorter."""
        if entry.file not in self._files:
            with entry.file.open("rb") as file:
                self._files[entry.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        mapped = self._files[entry.file]
        if entry.offset + entry.nbytes > len(mapped):
            raise CorruptWeightsError(entry.file, f"{quoted(entry.name)} ends beyond the file")
        return np.frombuffer(mapped, np.uint8, entry.nbytes, entry.offset)

    def close(self) -> None:
        """Unmap the files; later, if a raised exception still holds a view of one."""
        for mapped in self._files.values():
            with contextlib.suppress(BufferError):
                mapped.close()
        self._files.clear()


class SafetensorsSource(MappedFiles):
    """Checkpoint in a folder with ``config.json`` and ``.safetensors`` files, which are mapped when first read."""

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__()
        self._folder = folder
        stored = read_tensors(folder)
        self.config = config_from_folder(folder, stored)
        self._declared = self.config.tensors()
        self._schemes = {name: kind for name, kind in self.config.tensor_kinds.items() if isinstance(kind, Scheme)}
        self._stored = unstacked_weights(self.config, stored) if self._schemes else stored
        places = places_of(self.config, by_module(self._stored)) if self._schemes else {}
        self._places = {name: place for name, place in places.items() if name in self._schemes}
        self._entries = by_tensor(self.config, self._stored, folder)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors, of quantised weights as wholes."""
        found = whole_shapes(self._entries, self._places, self.config)
        # Packers of GPTQ write a bias of zeros for a layer without one.
        for name in {f"{place.module}.bias" for place in self._places.values()} & found.keys() - self._declared.keys():
            entry = self._entries[name]
            if entry.dtype in safetensors.FLOATS and not self._mapped(entry).any():
                del found[name]
        return found

    def read_into(
        self,
        name: str,
        destination: torch.Tensor,
        *,
        transfer: Transfer = ON_HOST,
        first_row: int = 0,
        columns: Runs = (),
    ) -> None:
        """Copy from the mapped file, with conversion, in one pass, or expand a quantised weight run by run."""
        if name in self._schemes:
            width = destination.shape[1]
            spans, step = columns or (range(width),), max(1, PIECE_ELEMENTS // width)
            for start in range(0, len(destination), step):
                part = destination[start : start + step]
                run, places = self._stored_run(name, range(first_row + start, first_row + start + len(part)))
                with self._naming(name):
                    parts = [self._schemes[name].expand(self._take(name), run, span) for span in spans]
                expanded = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
                transfer.copy(expanded if places is None else expanded[places], part)
            return
        entry = self._entries[name]
        if entry.dtype not in safetensors.FLOATS:
            raise UnsupportedQuantizationError(f"{entry.file}: {name} is stored as {entry.dtype}")
        tensor, order = self._mapped(entry), self._declared[name].order
        if order:
            part = tensor[stored_rows(order, first_row, first_row + len(destination))]
        else:
            part = tensor[first_row : first_row + len(destination)]
        transfer.copy(part if part.ndim == 1 else chosen_columns(part, columns, destination.shape[1]), destination)
        if self._declared[name].less_one:
            destination.add_(1)
        elif self._declared[name].log_of_negative:
            destination.exp_().neg_()

    def read_stored(self, name: str) -> StoredTensor | None:
        """Return the mapped tensor, or GGUF's blocks of a quantised weight that has such."""
        if name in self._schemes:
            scheme, (num_rows, num_columns) = self._schemes[name], self._declared[name].shape
            if not scheme.block_kind:
                return None
            step = max(1, PIECE_ELEMENTS // num_columns)
            first = self._places[name].first_row
            runs = [range(first + start, first + min(start + step, num_rows)) for start in range(0, num_rows, step)]
            with self._naming(name):
                blocks = torch.cat([scheme.blocks(self._take(name), run) for run in runs])
            return StoredTensor(TensorKind[scheme.block_kind], blocks.view(-1).numpy(), self._declared[name].order)
        entry = self._entries[name]
        kind = None if entry.strides else STORED_KINDS.get(entry.dtype)
        return None if kind is None else StoredTensor(kind, self.read(entry), self._declared[name].order)

    def read_quantized(
        self, name: str, rows: range, columns: Runs, move: Callable[[torch.Tensor], torch.Tensor]
    ) -> QuantizedMatrix:
        """Unpack a run of rows."""
        run, places = self._stored_run(name, rows)
        with self._naming(name):
            (span,) = columns
            matrix = self._schemes[name].read(self._take(name, move), run, span)
        if places is None:
            return matrix
        there = places.to(matrix.quants.device)
        return matrix.map(lambda array: chosen_rows(array, there))

    def _stored_run(self, name: str, rows: range) -> tuple[range, torch.Tensor | None]:
        """Return the module's rows that hold ``rows`` of a weight, and their places among these; None: the same."""
        order, shift = self._declared[name].order, self._places[name].first_row
        if not order:
            return range(shift + rows.start, shift + rows.stop), None
        first, last = rows.start // len(order) * len(order), -(-rows.stop // len(order)) * len(order)
        places = torch.from_numpy(stored_rows(order, rows.start, rows.stop) - first)
        return range(shift + first, shift + last), places

    def _take(
        self, name: str, move: Callable[[torch.Tensor], torch.Tensor] = lambda stored: stored
    ) -> Callable[..., torch.Tensor]:
        """Return a reader of the tensors of a quantised weight."""
        module = self._places[name].module
        return lambda suffix, *index: move(self._mapped(self._stored[f"{module}.{suffix}"])[index])

    @contextlib.contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """Name the weight whose tensors contradict themselves."""
        try:
            yield
        except ValueError as error:
            raise CorruptWeightsError(self._folder, f"{name}: {error}") from error

    def _mapped(self, entry: TensorEntry) -> torch.Tensor:
        """Return a tensor of the file's memory, to be read only."""
        dtype, packed = DTYPES[entry.dtype], self.read(entry)
        if packed.ctypes.data % dtype.itemsize:
            packed = packed.copy()
        values = from_file(packed).view(dtype)
        return values.as_strided(entry.shape, entry.strides) if entry.strides else values.view(entry.shape)


class GgufSource(MappedFiles):
    """Checkpoint in a GGUF file, or in several, dequantised piece by piece."""

    def __init__(self, path: pathlib.Path) -> None:
        super().__init__()
        header = read_parts(path)
        self.config = config_from_gguf(path, header)
        self._declared: dict[str, Tensor] = self.config.tensors()
        nvfp4 = {tensor.name.removesuffix(".weight") for tensor in header.tensors if tensor.kind == TensorKind.NVFP4}
        named = {tensor.name.removesuffix(".scale"): tensor for tensor in header.tensors}
        self._scales = {stem: tensor for stem, tensor in named.items() if stem in nvfp4}
        """Float32 numbers that multiply tensors of NVFP4, or each of their experts, by the names of those."""
        stored = unstacked(
            tensor
            for stem, tensor in named.items()
            if stem not in self._scales and not tensor.name.endswith((*DERIVED_TENSORS, *FACTORS))
        )
        self._tensors = by_tensor(self.config, stored, path, gguf=True)

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
        columns: Runs = (),
    ) -> None:
        """Dequantise into ``destination``, piece by piece."""
        tensor = self._tensors[name]
        if len(tensor.shape) == 1:
            if KINDS[tensor.kind] not in FLOATS:
                kind = name_of(tensor.kind)
                raise CorruptWeightsError(
                    tensor.file, f"{tensor.name} is a vector, and its elements are in {kind} blocks"
                )
            values = self.read_stored(name).values(tensor.shape[0], 0, tensor.shape[0])
            transfer.copy(values[first_row : first_row + len(destination)], destination)
            return
        stored, (num_rows, num_columns) = self.read_stored(name), tensor.shape
        in_place = stored.kind in FLOATS and len(columns) < 2
        step = len(destination) if in_place else max(1, PIECE_ELEMENTS // num_columns)
        for start in range(0, len(destination), step):
            part = destination[start : start + step]
            first = first_row + start
            values = stored.values(num_rows, first, first + len(part)).view(len(part), num_columns)
            transfer.copy(chosen_columns(values, columns, part.shape[1]), part)

    def read_stored(self, name: str) -> StoredTensor:
        """Return the mapped blocks."""
        tensor = self._tensors[name]
        packed, order = self.read(tensor), self._declared[name].gguf_order
        return StoredTensor(KINDS[tensor.kind], packed, order, self._scale(tensor))

    def read_quantized(
        self, name: str, rows: range, columns: Runs, move: Callable[[torch.Tensor], torch.Tensor]
    ) -> QuantizedMatrix:
        """Copy a run of rows of blocks, and repack it on the device."""
        stored, format = self.read_stored(name), STORED_FORMATS[name_of(self._tensors[name].kind)]
        num_rows, (block, block_bytes) = self._tensors[name].shape[0], (format.block, format.block_bytes)
        blocks = stored.rows(num_rows, rows.start, rows.stop).reshape(len(rows), -1, block_bytes)
        runs = [blocks[:, run.start // block : run.stop // block] for run in columns]
        chosen = (np.concatenate(runs, 1) if len(runs) > 1 else runs[0]).reshape(-1, block_bytes)
        matrix = format.read(move(from_file(chosen)), len(rows))
        if matrix.super_scales is not None and stored.scale != 1:
            matrix.super_scales.mul_(stored.scale)
        return matrix

    def _scale(self, tensor: TensorInfo) -> float:
        stem, _, part = tensor.name.rpartition(".")
        found, expert = self._scales.get(stem), int(part) if part.isdecimal() else 0
        if found is None:
            return 1.0
        if found.kind != TensorKind.F32 or len(found.shape) != 1 or expert >= found.shape[0]:
            raise CorruptWeightsError(
                found.file, f"{found.name} is not a vector of float32 with a number for each expert"
            )
        return float(self.read(found).view(np.float32)[expert])
