"""Random answers, and those that a fuzzer found: only typed errors result, however they are cut."""

import pathlib
from collections.abc import Iterator

import pytest
from hostile_wire import Checker, samples

from cortex.dialects.renamed import rename

KEPT = sorted((pathlib.Path(__file__).parents[1] / "fuzz" / "corpus" / "upstream").iterdir())


@pytest.fixture
def checker() -> Iterator[Checker]:
    found = Checker()
    yield found
    found.close()


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.name)
def test_fuzzer_findings_are_an_answer_or_a_typed_error(path: pathlib.Path, checker: Checker) -> None:
    checker.check(path.read_bytes())


@pytest.mark.parametrize("seed", range(4))
def test_random_answers_are_answers_or_typed_errors(seed: int, checker: Checker) -> None:
    for wire in samples(400, seed):
        checker.check(wire)


def test_a_name_is_put_into_an_answer_at_its_top_and_one_level_in_and_no_deeper() -> None:
    deep = b'{"response":' * 900 + b'{"model":"x"}' + b"}" * 900
    assert rename(deep, "m") == deep.replace(b" ", b"")
    assert rename(b'{"response":{"model":"x"}}', "m") == b'{"response":{"model":"m"}}'
