"""Fuzz what reads a node's answers: ``python tests/fuzz/fuzz_upstream.py [tests/fuzz/corpus/upstream]``.

An input is all that a connection brings. It goes through the compiled client, the usage scanner, the readers of each
dialect, the translation and a response in the background; nothing but a typed error may come of it, however it is cut.
"""

import pathlib
import random
import sys

import atheris

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "support"))

with atheris.instrument_imports(
    include=["cortex.dialects", "cortex.fleet.refusals", "cortex.responses.background", "cortex.inference"]
):
    from hostile_wire import Checker, wire

CHECKER = Checker()


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Return a new answer, made of ``data`` or from nothing."""
    rng = random.Random(seed)
    if rng.random() < 0.4:
        return bytes(atheris.Mutate(data, max_size))
    return wire(rng)[:max_size]


def one_input(data: bytes) -> None:
    """Check one answer."""
    CHECKER.check(data)


if __name__ == "__main__":
    atheris.Setup([sys.argv[0], "-max_len=65536", "-timeout=10", "-rss_limit_mb=2048", *sys.argv[1:]], one_input,
                  custom_mutator=mutate)  # fmt: skip
    atheris.Fuzz()
