"""Reader of the header of a GGUF file: its metadata and the positions of its tensors.

The ``gguf`` library's reader makes several numpy views per string and takes 1.8 s for a vocabulary of 49,152 tokens and
its merges; this one takes 25 ms for the same file, and checks all it reads. It reads the container, not models, and
imports no torch: the daemon reads tokenizers and configurations with it.

A header is untrusted: each count and length is compared with the remaining bytes, and with a bound above any model's,
before memory is allocated for it. It is read, not mapped: the daemon would not survive the truncation of a mapped file.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import itertools
import os
import pathlib
import struct
from collections.abc import Iterable
from enum import IntEnum
from typing import Any, Final, Protocol, Self

from neuron.models.errors import CorruptWeightsError
from neuron.models.files import open_regular, quoted

MAX_HEADER_BYTES: Final = 64 << 20
"""Bound on the header, so that a corrupt count in a file of many GiB cannot keep the reader busy for minutes. The
largest vocabularies in use (256k tokens with merges) take 20 MiB."""
MAX_VALUES: Final = 1 << 16
"""Bound on the number of metadata values; a model has a few dozen."""
MAX_TENSORS: Final = 1 << 17
MAX_ITEMS: Final = 1 << 21
"""Bound on the items of all arrays together: an item of a byte in the file takes fifty in memory. The largest
vocabularies have 256k tokens, as many scores and kinds, and 500k merges."""
MAX_NAME_BYTES: Final = 1 << 12
_READ_BYTES: Final = 1 << 20
DEFAULT_ALIGNMENT: Final = 32
MAX_DIMENSIONS: Final = 4


class TensorKind(IntEnum):
    """Storage of a tensor's elements (``ggml_type``): its number, and the elements and bytes of one block."""

    block: int
    block_bytes: int

    def __new__(cls, number: int, block: int, block_bytes: int) -> Self:
        """Return the kind ``number``."""
        kind = int.__new__(cls, number)
        kind._value_, kind.block, kind.block_bytes = number, block, block_bytes
        return kind

    F32 = 0, 1, 4
    F16 = 1, 1, 2
    Q4_0 = 2, 32, 18
    Q4_1 = 3, 32, 20
    Q5_0 = 6, 32, 22
    Q5_1 = 7, 32, 24
    Q8_0 = 8, 32, 34
    Q8_1 = 9, 32, 40
    Q2_K = 10, 256, 84
    Q3_K = 11, 256, 110
    Q4_K = 12, 256, 144
    Q5_K = 13, 256, 176
    Q6_K = 14, 256, 210
    Q8_K = 15, 256, 292
    IQ2_XXS = 16, 256, 66
    IQ2_XS = 17, 256, 74
    IQ3_XXS = 18, 256, 98
    IQ1_S = 19, 256, 50
    IQ4_NL = 20, 32, 18
    IQ3_S = 21, 256, 110
    IQ2_S = 22, 256, 82
    IQ4_XS = 23, 256, 136
    I8 = 24, 1, 1
    I16 = 25, 1, 2
    I32 = 26, 1, 4
    I64 = 27, 1, 8
    F64 = 28, 1, 8
    IQ1_M = 29, 256, 56
    BF16 = 30, 1, 2
    TQ1_0 = 34, 256, 54
    TQ2_0 = 35, 256, 66
    MXFP4 = 39, 32, 17
    NVFP4 = 40, 64, 36
    Q1_0 = 41, 128, 18


KINDS: Final = {int(kind): kind for kind in TensorKind}
UNREADABLE: Final = frozenset(
    {
        *(TensorKind.Q8_1, TensorKind.Q8_K, TensorKind.Q1_0, TensorKind.F64),
        *(TensorKind.I8, TensorKind.I16, TensorKind.I32, TensorKind.I64),
    }
)
"""Kinds that no weights are read from: forms of activations, integers, and what the ``gguf`` library cannot read."""

# Metadata value types: fixed-size ones by struct code, then bool, string and array.
_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
_BOOL: Final = 7
_STRING: Final = 8
_ARRAY: Final = 9
_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInfo:
    """Tensor: ``shape`` is row-major (the reverse of the file's order), ``offset`` counts from the file's start."""

    file: pathlib.Path
    name: str
    shape: tuple[int, ...]
    kind: TensorKind | int
    """Kind; or the number of an unknown one, whose ``nbytes`` are 0."""
    offset: int
    nbytes: int


def name_of(kind: TensorKind | int) -> str:
    """Return the name of a kind, for messages."""
    return kind.name if isinstance(kind, TensorKind) else f"type {kind}"


@dataclasses.dataclass(frozen=True, slots=True)
class GgufHeader:
    """Header of a GGUF file. Arrays in ``metadata`` are lists."""

    version: int
    metadata: dict[str, Any]
    tensors: tuple[TensorInfo, ...]
    data_offset: int


class Readable(Protocol):
    """Source of a header's bytes."""

    def read(self, size: int, /) -> bytes:
        """Return the next bytes, at most ``size``; none at the end."""


def read_header(path: str | os.PathLike[str]) -> GgufHeader:
    """Read and check the header of the GGUF file at ``path``.

    Raises :class:`CorruptWeightsError` naming the file and the reason; ``FileNotFoundError`` if there is none.
    """
    with open_regular(pathlib.Path(path)) as file:
        return read_header_of(path, file, os.fstat(file.fileno()).st_size)


def read_header_of(path: str | os.PathLike[str], file: Readable, size_bytes: int) -> GgufHeader:
    """Read the header at the start of an open file of ``size_bytes``; ``path`` is its name in errors.

    Raises :class:`CorruptWeightsError`.
    """
    if size_bytes < 24:
        raise CorruptWeightsError(path, f"{size_bytes} bytes are too few for a GGUF header")
    return _Reader(path, file, size_bytes).header()


class _Reader:
    """Cursor over the header's bytes; a failed read names its field."""

    def __init__(self, path: str | os.PathLike[str], file: Readable, size: int) -> None:
        self.path = path
        self.file = file
        self.data = bytearray()
        """Bytes read of the file so far."""
        self.size = size
        self.limit = min(size, MAX_HEADER_BYTES)
        self.position = 0
        self.num_items = 0

    def fail(self, reason: str) -> CorruptWeightsError:
        return CorruptWeightsError(self.path, reason)

    def have(self, end: int) -> None:
        """Read until the bytes up to ``end`` are in ``data``."""
        while len(self.data) < end:
            try:
                piece = self.file.read(max(_READ_BYTES, end - len(self.data)))
            except OSError as error:
                raise self.fail(f"cannot be read: {error.strerror}") from error
            if not piece:
                raise self.fail(f"ends at byte {len(self.data)} while it is read; it had {self.size}")
            self.data += piece

    def take(self, count: int, what: str) -> int:
        """Return the position of the next ``count`` bytes, once read, and skip them."""
        start = self.position
        if count > self.limit - start:
            raise self.fail(f"{what} at byte {start} needs {count} bytes, {self.limit - start} are left")
        self.position = start + count
        self.have(self.position)
        return start

    def u32(self, what: str) -> int:
        value: int = _U32.unpack_from(self.data, self.take(4, what))[0]
        return value

    def u64(self, what: str) -> int:
        value: int = _U64.unpack_from(self.data, self.take(8, what))[0]
        return value

    def string(self, what: str, max_bytes: int = MAX_HEADER_BYTES) -> str:
        length = self.u64(what)
        if length > max_bytes:
            raise self.fail(f"{what} at byte {self.position} is {length} bytes long; {max_bytes} are taken")
        start = self.take(length, what)
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} at byte {start} is not UTF-8") from error

    def header(self) -> GgufHeader:
        magic = self.data[self.take(4, "magic") : 4]
        if magic != b"GGUF":
            raise self.fail(f"not a GGUF file: it begins with {bytes(magic)!r}")
        version = self.u32("version")
        if version not in (2, 3):
            raise self.fail(f"GGUF version {version} is not 2 or 3 (little-endian)")
        num_tensors = self.u64("tensor count")
        num_values = self.u64("metadata count")
        # A tensor's entry is at least 32 bytes (one dimension, empty name), a metadata value's at least 13.
        if num_tensors * 32 + num_values * 13 > self.limit - self.position:
            raise self.fail(f"{num_tensors} tensors and {num_values} metadata values cannot be in {self.size} bytes")
        if num_tensors > MAX_TENSORS or num_values > MAX_VALUES:
            raise self.fail(f"{num_tensors} tensors and {num_values} metadata values are more than any model has")
        metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = self.string("metadata key", MAX_NAME_BYTES)
            if key in metadata:
                raise self.fail(f"metadata key {key!r} appears twice")
            metadata[key] = self.value(self.u32(key), key)
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1) or alignment > 1 << 20:
            raise self.fail(f"general.alignment {quoted(alignment)} is not a power of two from 8 to 2^20")
        entries = [self.tensor_entry() for _ in range(num_tensors)]
        data_offset = -(-self.position // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in entries:
            if name in tensors:
                raise self.fail(f"tensor {name!r} appears twice")
            tensors[name] = self.tensor(name, shape, kind, offset, data_offset, alignment)
        self.check_overlaps(tensors.values())
        return GgufHeader(version, metadata, tuple(tensors.values()), data_offset)

    def check_overlaps(self, tensors: Iterable[TensorInfo]) -> None:
        by_offset = sorted(tensors, key=lambda tensor: tensor.offset)
        for before, tensor in itertools.pairwise(by_offset):
            if before.offset + before.nbytes > tensor.offset:
                raise self.fail(f"tensors {before.name!r} and {tensor.name!r} overlap at byte {tensor.offset}")

    def value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            code = "<" + _SCALARS[kind]
            return struct.unpack_from(code, self.data, self.take(struct.calcsize(code), key))[0]
        if kind == _BOOL:
            return self.data[self.take(1, key)] != 0
        if kind == _STRING:
            return self.string(key)
        if kind == _ARRAY:
            return self.array_value(self.u32(key), self.u64(key), key)
        raise self.fail(f"metadata {key!r} has unknown type {kind}")

    def array_value(self, kind: int, count: int, key: str) -> list[Any]:
        self.num_items += count
        if self.num_items > MAX_ITEMS:
            raise self.fail(f"{count} items of {key!r} are more than any model has")
        if kind == _STRING:
            return self.strings(count, key)
        if kind == _BOOL:
            start = self.take(count, key)
            return [byte != 0 for byte in self.data[start : start + count]]
        if kind not in _SCALARS:
            raise self.fail(f"metadata {key!r} is an array of unknown or nested type {kind}")
        code = _SCALARS[kind]
        nbytes = count * struct.calcsize("<" + code)
        start = self.take(nbytes, key)
        return list(struct.unpack(f"<{count}{code}", self.data[start : start + nbytes]))

    def strings(self, count: int, key: str) -> list[str]:
        """Read an array of strings: the hot loop of a header (49,152 tokens and 48,900 merges: 18 ms)."""
        if count * 8 > self.limit - self.position:
            raise self.fail(f"{count} strings of {key!r} cannot be in {self.limit - self.position} bytes")
        data, position, limit, unpack = self.data, self.position, self.limit, _U64.unpack_from
        found: list[str] = []
        there = len(data)
        try:
            for _ in range(count):
                start = position + 8
                if start > there:
                    self.have(min(start, limit))
                    there = len(data)
                position = start + unpack(data, position)[0]
                if position > limit:
                    raise self.fail(f"a string of {key!r} at byte {start} ends at {position}, beyond the header")
                if position > there:
                    self.have(position)
                    there = len(data)
                found.append(data[start:position].decode())
        except (struct.error, UnicodeDecodeError) as error:
            raise self.fail(f"an array of strings, {key!r}, is cut or is not UTF-8 at item {len(found)}") from error
        self.position = position
        return found

    def tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string("tensor name", MAX_NAME_BYTES)
        num_dimensions = self.u32(f"tensor {name!r}")
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise self.fail(f"tensor {name!r} has {num_dimensions} dimensions, not 1 to {MAX_DIMENSIONS}")
        start = self.take(8 * num_dimensions, f"tensor {name!r}")
        shape = struct.unpack_from(f"<{num_dimensions}Q", self.data, start)[::-1]
        return name, shape, self.u32(f"tensor {name!r}"), self.u64(f"tensor {name!r}")

    def tensor(
        self, name: str, shape: tuple[int, ...], number: int, offset: int, data_offset: int, alignment: int
    ) -> TensorInfo:
        """Check an entry against the file: its shape, and the presence of all its bytes, where its kind is known."""
        kind = KINDS.get(number, number)
        block, block_bytes = (kind.block, kind.block_bytes) if isinstance(kind, TensorKind) else (1, 0)
        num_elements = 1
        for dimension in shape:
            num_elements *= dimension
        if num_elements == 0 or shape[-1] % block:
            raise self.fail(f"tensor {name!r} of type {name_of(kind)} has the impossible shape {list(shape)}")
        nbytes = num_elements // block * block_bytes
        if offset % alignment:
            raise self.fail(f"tensor {name!r} at offset {offset} is not aligned to {alignment}")
        end = data_offset + offset + nbytes
        if end > self.size:
            raise self.fail(f"tensor {name!r} ends at byte {end} of a file of {self.size}")
        return TensorInfo(pathlib.Path(self.path), name, shape, kind, data_offset + offset, nbytes)
