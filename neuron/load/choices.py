"""Choices that a repository of weights offers: its GGUF files by quantisation tag, and its safetensors.

Pure: it decides by the names and sizes of files. A tag is the part of a GGUF file's name that llama.cpp and the
publishers of such files use, ``Q4_K_M`` or ``UD-Q4_K_XL``. A file in parts, ``NAME-00001-of-00003.gguf``, is one
choice. Projectors of images and importance matrices are none.
"""

import collections
import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from neuron.errors import SourceNotFoundError

SAFETENSORS: Final = "safetensors"
"""Tag of a repository's safetensors, with the configuration and tokenizer beside them."""
DEFAULT_TAGS: Final = (
    *("Q4_K_M", "UD-Q4_K_XL", "Q4_K_L", "Q4_K_S", "IQ4_NL", "IQ4_XS", "MXFP4", "MXFP4_MOE", "Q4_1", "Q4_0", "Q4"),
    *("Q5_K_M", "UD-Q5_K_XL", "Q5_K_S", "Q5_1", "Q5_0", "Q6_K", "UD-Q6_K_XL", "Q8_0", "Q8"),
    *("UD-Q3_K_XL", "Q3_K_L", "Q3_K_M", "BF16", "F16", "FP16"),
)
"""Tags that a source without one means, the best known first: llama.cpp's default, then the nearest to it in size."""

_GGUF = re.compile(r"(?P<stem>.*?)(?:-(?P<part>\d{5})-of-(?P<parts>\d{5}))?\.gguf", re.IGNORECASE)
_TAG = re.compile(
    r"(?<![A-Za-z0-9])(?:UD[-_])?(?:I?Q\d(?:_(?:[0-9KSML]|NL|X{1,2}S|XL))*|TQ\d_\d|BF16|FP?16|FP?32|MXFP4(?:_MOE)?|NVFP4)(?![A-Za-z0-9])",
    re.IGNORECASE,
)
_PARTS = re.compile(r"-of-(\d{5})\.safetensors$")
_NO_CHOICE = re.compile(r"mmproj|imatrix", re.IGNORECASE)
_BESIDE = ("*.json", "1_Pooling/*.json", "*.jinja", "tokenizer*")
"""Files that safetensors need beside them."""


@dataclass(frozen=True, slots=True)
class RepositoryFile:
    """File of a repository. ``sha256`` is empty for a small file, which has git's own digest."""

    path: str
    size_bytes: int
    sha256: str = ""
    git_sha1: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """Weights of a repository that can be loaded, with the files that belong to them."""

    tag: str
    """``Q4_K_M``; :data:`SAFETENSORS`; empty for a GGUF file whose name has no tag."""
    files: tuple[RepositoryFile, ...]
    """GGUF: its parts in order. Safetensors: all that is downloaded, ``config.json`` the last."""
    name: str
    """Its name in a source: its tag, or its first file where others have the same tag or it has none."""

    @property
    def size_bytes(self) -> int:
        """Return the bytes of all its files."""
        return sum(file.size_bytes for file in self.files)


def find_choices(files: Iterable[RepositoryFile]) -> tuple[Choice, ...]:
    """Return the choices among the files of a repository, the largest first."""
    files = sorted(files, key=lambda file: file.path)
    groups: dict[tuple[str, int], list[RepositoryFile]] = {}
    for file in files:
        found = _GGUF.fullmatch(file.path)
        if found is not None and not _NO_CHOICE.search(file.path.rpartition("/")[2]):
            groups.setdefault((found["stem"], int(found["parts"] or 1)), []).append(file)
    # An upload that lacks a part is no choice.
    offers = [(tag_of(stem), tuple(group)) for (stem, count), group in groups.items() if len(group) == count]
    if folder := _safetensors(files):
        offers.append((SAFETENSORS, folder))
    uses = collections.Counter(tag for tag, _ in offers)
    choices = (Choice(tag, group, tag if tag and uses[tag] == 1 else group[0].path) for tag, group in offers)
    return tuple(sorted(choices, key=lambda choice: (-choice.size_bytes, choice.name)))


def tag_of(path: str) -> str:
    """Return the quantisation tag in the name of a GGUF file, or of its folder; empty if there is none."""
    for name in reversed(path.split("/")):
        if tags := _TAG.findall(name):
            return str(tags[-1]).upper().replace("UD_", "UD-")
    return ""


def choose(choices: Sequence[Choice], wanted: str | None, repository: str) -> Choice:
    """Return the choice that ``wanted`` names, a tag in any case or a file; without it the repository's default.

    Raises:
        SourceNotFoundError: there is none, or more than one; the message has those that exist.
    """
    if wanted is None:
        found = _default(choices)
    elif wanted.lower().endswith(".gguf"):
        found = [choice for choice in choices if any(file.path == wanted for file in choice.files)]
    else:
        tags = (wanted.upper(), f"UD-{wanted.upper()}")
        named = ([choice for choice in choices if choice.tag.upper() == tag] for tag in tags)
        found = next((group for group in named if group), [])
    if len(found) == 1:
        return found[0]
    if found:
        paths = ", ".join(choice.files[0].path for choice in found)
        raise SourceNotFoundError(f"{repository} has several {found[0].tag}; name a file: {paths}.", param="source")
    there = ", ".join(f"{choice.name} ({choice.size_bytes / 1e9:.1f} GB)" for choice in choices)
    what = "weights that can be loaded" if wanted is None else f"'{wanted}'"
    raise SourceNotFoundError(f"{repository} has no {what}; it has: {there or 'no weights'}.", param="source")


def _default(choices: Sequence[Choice]) -> list[Choice]:
    """Return the safetensors, or the choices of the best known tag, or the only choice that there is."""
    for tag in (SAFETENSORS, *DEFAULT_TAGS):
        if found := [choice for choice in choices if choice.tag == tag]:
            return found
    return list(choices) if len(choices) == 1 else []


def _safetensors(files: Sequence[RepositoryFile]) -> tuple[RepositoryFile, ...]:
    """Return the safetensors at the top of the repository with what belongs to them, or nothing."""
    weights = [file for file in files if file.path.endswith(".safetensors") and "/" not in file.path]
    # Some repositories have the same weights a second time, in their authors' own layout.
    weights = [file for file in weights if file.path.startswith("model")] or weights
    config = [file for file in files if file.path == "config.json"]
    parts = {int(found[1]) for file in weights if (found := _PARTS.search(file.path))}
    if not weights or not config or (parts and parts != {len(weights)}):
        return ()
    beside = [
        file
        for file in files
        if any(fnmatch.fnmatchcase(file.path, pattern) for pattern in _BESIDE)
        and file.path.count("/") <= file.path.startswith("1_Pooling/")
        and file not in config
    ]
    return (*weights, *beside, *config)
