"""Bounded reads of a model's small files: regular files only, a bound on the size, errors of our own.

All of the daemon's reads of a model's folder pass here. A folder is untrusted: its ``config.json`` may be a pipe, a
link to ``/dev/zero``, 8 GiB long, or nested a million deep.
"""

import json
import os
import pathlib
import stat
from typing import Any, BinaryIO, Final

from neuron.models.errors import CorruptWeightsError

MAX_CONFIG_BYTES: Final = 4 << 20
"""Bound on a JSON file that is read whole. ``config.json`` takes kilobytes; the largest in use, with a number for each
of a hundred thousand matrices, 2 MB."""
MAX_INDEX_BYTES: Final = 32 << 20
"""Bound on the index of a checkpoint in shards: 9 MB for the 91,000 tensors of DeepSeek-V3."""
MAX_TOKENIZER_BYTES: Final = 128 << 20
"""Bound on a tokenizer's file: 33 MB for the 262,000 tokens of Gemma 3."""
MAX_QUOTED_CHARS: Final = 200


def open_regular(path: pathlib.Path) -> BinaryIO:
    """Open a regular file: opening a pipe would wait for a writer, reading a device might never end.

    Raises:
        FileNotFoundError: it does not exist.
        CorruptWeightsError: it is not a regular file, or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise CorruptWeightsError(path, f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CorruptWeightsError(path, "not a file")
    return os.fdopen(descriptor, "rb")


def read_bounded(path: pathlib.Path, max_bytes: int = MAX_CONFIG_BYTES) -> bytes:
    """Return the bytes of a file. Raises as :func:`open_regular`, and CorruptWeightsError beyond ``max_bytes``."""
    with open_regular(path) as file:
        try:
            data = file.read(max_bytes + 1)
        except OSError as error:
            raise CorruptWeightsError(path, f"cannot be read: {error.strerror}") from error
    if len(data) > max_bytes:
        raise CorruptWeightsError(path, f"longer than the {max_bytes} bytes that are read of such a file")
    return data


def read_json_object(path: pathlib.Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any] | None:
    """Return the JSON object in a file, ``None`` where there is no file.

    Raises CorruptWeightsError as :func:`read_bounded`, and if it is no such object.
    """
    try:
        values = json.loads(read_bounded(path, max_bytes))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise CorruptWeightsError(path, f"not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CorruptWeightsError(path, "not a JSON object")
    return values


def quoted(value: object) -> str:
    """Return ``value`` for quoting in an error, cut to a bounded length."""
    text = repr(value[:MAX_QUOTED_CHARS] if isinstance(value, (str, list)) else value)
    return text if len(text) <= MAX_QUOTED_CHARS else f"{text[:MAX_QUOTED_CHARS]}..."


def is_name(text: str) -> bool:
    """Whether ``text`` is the name of a direct child of a folder."""
    return text not in {"", ".", ".."} and pathlib.PurePath(text).name == text and "\0" not in text
