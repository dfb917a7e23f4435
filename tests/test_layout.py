"""What is installed: every file of the packages but sources that are compiled, and an extension for each .pyx."""

import importlib.resources
import pathlib
from collections.abc import Iterator
from importlib.resources.abc import Traversable

import pytest

ROOT = pathlib.Path(__file__).parents[1]
COMPILED = {".build", ".c", ".h", ".in", ".pxd", ".pyx"}


def installed(folder: Traversable, name: str) -> Iterator[str]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from installed(entry, f"{name}/{entry.name}")
        else:
            yield f"{name}/{entry.name}"


@pytest.mark.parametrize("package", ["cortex", "neuron"])
def test_all_but_what_is_compiled_is_installed(package: str) -> None:
    sources = {
        str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.*") if path.parent.name != "__pycache__"
    }
    files = set(installed(importlib.resources.files(package), package))
    assert {path for path in sources if pathlib.Path(path).suffix not in COMPILED} <= files
    assert {path for path in files if pathlib.Path(path).suffix in COMPILED} == set()


@pytest.mark.parametrize(
    "path", [*ROOT.glob("cortex/*/*.pyx"), *ROOT.glob("neuron/*/*.pyx")], ids=lambda path: path.name
)
def test_every_extension_is_built_and_has_a_stub(path: pathlib.Path) -> None:
    assert f"'{path.stem}'" in (path.parent / "meson.build").read_text()
    assert path.with_suffix(".pyi").exists()
