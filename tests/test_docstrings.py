"""Docstrings are noun phrases, ``Whether ...`` or imperatives: none begins with a relative word.

Strings under attributes and constants count as docstrings, as do those of Cython's sources.
"""

import ast
import pathlib
import re
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("cortex", "neuron", "bench")
RELATIVE = re.compile(r"\s*(What|Of|Who|Whose|Whoever|How|Those|That|One|Which|Where|When)\b(?!-)")
CYTHON_STRING = re.compile(r'^[ \t]*r?"""(.*?)"""', re.MULTILINE | re.DOTALL)


def docstrings(name: str, source: str) -> Iterator[str]:
    """Yield the strings that stand alone in a module."""
    if not name.endswith((".py", ".pyi")):
        yield from CYTHON_STRING.findall(source)
        return
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            match statement:
                case ast.Expr(ast.Constant(str(text))):
                    yield text


def offenders(name: str, source: str) -> list[str]:
    return [text for text in docstrings(name, source) if RELATIVE.match(text)]


def test_no_docstring_begins_with_a_relative_word() -> None:
    sources = {
        path: path.read_text()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix in {".py", ".pyi", ".pyx", ".pxd"}
    }
    assert len(sources) > 200
    found = {str(path.relative_to(ROOT)): offenders(path.name, source) for path, source in sources.items()}
    assert {name: texts for name, texts in found.items() if texts} == {}


def test_an_offender_of_each_kind_is_found() -> None:
    source = '''
"""What this module is for."""

LIMIT = 3
"""Of attempts."""


class Node:
    """One-way link, which is fine."""

    name: str
    """Who it is."""

    def ask(self) -> None:
        """Those who wait are asked."""

    def has_model(self) -> bool:
        """Return whether it has a model."""
'''
    expected = ["What this module is for.", "Of attempts.", "Who it is.", "Those who wait are asked."]
    assert sorted(offenders("module.py", source)) == sorted(expected)
    assert sorted(offenders("module.pyi", source)) == sorted(expected)
    assert sorted(offenders("module.pyx", source)) == sorted(expected)
