"""A module that no meson.build lists is not installed: a test finds it first."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = sorted(
    path
    for package in ("cortex", "neuron")
    for path in (ROOT / package).rglob("*")
    if path.suffix in {".py", ".pyi", ".pyx", ".typed", ".toml", ".html", ".css", ".js", ".svg"}
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_is_listed(path: pathlib.Path) -> None:
    listed = re.findall(r"'([^']+)'", (path.parent / "meson.build").read_text())
    assert (path.stem if path.suffix == ".pyx" else path.name) in listed, f"not in {path.parent.name}/meson.build"


@pytest.mark.parametrize("path", [p for p in SOURCES if p.suffix == ".pyx"], ids=lambda p: p.name)
def test_every_extension_has_a_stub(path: pathlib.Path) -> None:
    assert path.with_suffix(".pyi").exists()
