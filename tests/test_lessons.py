"""``lessons.toml`` names the tests of each lesson; the tests here check that they exist."""

import ast
import functools
import pathlib
import tomllib
from collections import Counter
from typing import Any

import pytest

TESTS = pathlib.Path(__file__).parent
TABLE: dict[str, list[dict[str, Any]]] = tomllib.loads((TESTS / "lessons.toml").read_text())
LEFT_OUT = TABLE.pop("left_out")
ENTRIES = [(area, entry) for area, entries in TABLE.items() for entry in entries]


@functools.cache
def names_in(path: str) -> frozenset[str]:
    """Return the tests of a file as pytest names them within it, read and not imported."""
    found: set[str] = set()

    def look(body: list[ast.stmt], within: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
                look(node.body, f"{within}{node.name}::")
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                found.add(within + node.name)

    file = TESTS.parent / path
    if file.is_file():
        look(ast.parse(file.read_text()).body, "")
    return frozenset(found)


def exists(test: str) -> bool:
    path, _, name = test.partition("::")
    return name in names_in(path)


def test_every_lesson_is_held_by_tests_that_exist() -> None:
    assert len(ENTRIES) > 100
    for area, entry in ENTRIES:
        assert set(entry) == {"lesson", "held_by"}, (area, entry)
        assert entry["held_by"], f"{area}: nothing holds: {entry['lesson']}"
        missing = [test for test in entry["held_by"] if not exists(test)]
        assert not missing, f"{area}: {entry['lesson']}"
        assert len(set(entry["held_by"])) == len(entry["held_by"]), f"{area}: {entry['lesson']}"


def test_no_lesson_is_there_twice_and_each_is_a_line() -> None:
    lessons = [entry["lesson"] for _, entry in ENTRIES] + [entry["lesson"] for entry in LEFT_OUT]
    assert not [lesson for lesson, times in Counter(map(str.casefold, lessons)).items() if times > 1]
    assert all(lesson and "\n" not in lesson for lesson in lessons)


def test_omitted_lessons_have_their_reason() -> None:
    assert all(set(entry) == {"lesson", "because"} and entry["because"] for entry in LEFT_OUT)


@pytest.mark.parametrize(
    "test",
    ["tests/test_lessons.py", "tests/test_lessons.py::exists", "tests/test_lessons.py::test_no", "tests/none.py::test"],
)
def test_the_check_sees_a_test_that_is_not_there(test: str) -> None:
    assert not exists(test)
    assert exists("tests/test_lessons.py::test_omitted_lessons_have_their_reason")
