"""Header of a model in several GGUF files, ``NAME-00001-of-00003.gguf`` and so on, as ``gguf-split`` writes them.

The first has the metadata, each part its own tensors, at offsets in its own file. Parts are found by the name of the
first, in its folder, so that no metadata names a file.
"""

import dataclasses
import pathlib
import re
from typing import Final

from neuron.models.errors import CorruptWeightsError
from neuron.models.files import quoted
from neuron.models.gguf import MAX_TENSORS, GgufHeader, TensorInfo, read_header

MAX_PARTS: Final = 1024
"""Bound on the parts of a model; the largest in use have a few dozen."""
_NAME: Final = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_LISTED: Final = 4


def read_parts(path: pathlib.Path) -> GgufHeader:
    """Read and check the header of the GGUF file at ``path``, with the tensors of all parts if it is the first part.

    Raises :class:`CorruptWeightsError` naming the file and the reason; ``FileNotFoundError`` if there is none.
    """
    header = read_header(path)
    count = _number(path, header, "split.count", 1, MAX_PARTS)
    if count == 1:
        return header
    found = _NAME.fullmatch(path.name)
    if found is None or (int(found["number"]), int(found["count"])) != (1, count):
        raise CorruptWeightsError(
            path, f"is no first part of {count}: its name does not end with -00001-of-{count:05}.gguf"
        )
    parts = [path.with_name(f"{found['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    if missing := [part.name for part in parts if not part.exists()]:
        some = ", ".join(missing[:_LISTED]) + (f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else "")
        raise CorruptWeightsError(path, f"lacks {some} in its folder")
    tensors: dict[str, TensorInfo] = {}
    total = _number(path, header, "split.tensors.count", 0, MAX_TENSORS)
    for number, part in enumerate(parts):
        own = header if number == 0 else read_header(part)
        _check_part(part, own, header, number)
        for tensor in own.tensors:
            if tensor.name in tensors:
                raise CorruptWeightsError(part, f"has {quoted(tensor.name)}, as {tensors[tensor.name].file.name} has")
            tensors[tensor.name] = tensor
        if len(tensors) > total:
            break
    if len(tensors) != total:
        raise CorruptWeightsError(path, f"split.tensors.count is {total}, but its parts have {len(tensors)} or more")
    return dataclasses.replace(header, tensors=tuple(tensors.values()))


def _check_part(path: pathlib.Path, own: GgufHeader, first: GgufHeader, number: int) -> None:
    """Raise CorruptWeightsError unless a header is that of part ``number``, from 0, of the model of the first part."""
    if (found := own.metadata.get("split.no")) != number:
        raise CorruptWeightsError(path, f"split.no is {quoted(found)}, not {number}")
    for key in ("split.count", "split.tensors.count", "general.architecture"):
        found, expected = own.metadata.get(key), first.metadata.get(key)
        # Writers differ in whether later parts repeat the architecture.
        if found != expected and (found is not None or key.startswith("split")):
            raise CorruptWeightsError(path, f"{key} is {quoted(found)}, in the first part {quoted(expected)}")


def _number(path: pathlib.Path, header: GgufHeader, key: str, least: int, most: int) -> int:
    value = header.metadata.get(key, least)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise CorruptWeightsError(path, f"{key} is {quoted(value)}, not a number from {least} to {most}")
    return value
