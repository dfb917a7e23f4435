"""Fuzz what is kept: ``python tests/fuzz/fuzz_conversations.py [tests/fuzz/corpus/conversations]``.

An input is a few steps at conversations and stored responses (``conversation_steps``): whatever they are, each ends as
a success or a typed error of the client's, in bounded time, and what is reported as stored is there.
"""

import pathlib
import random
import sys

import atheris

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "support"))

with atheris.instrument_imports(include=["cortex.store", "cortex.responses"]):
    from conversation_steps import Checker, steps

CHECKER = Checker()


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Return new steps, made of ``data`` or from nothing."""
    rng = random.Random(seed)
    if rng.random() < 0.4:
        return bytes(atheris.Mutate(data, max_size))
    return steps(rng)[:max_size]


def one_input(data: bytes) -> None:
    """Check one input."""
    CHECKER.check(data)


if __name__ == "__main__":
    atheris.Setup([sys.argv[0], "-max_len=65536", "-timeout=20", "-rss_limit_mb=2048", *sys.argv[1:]], one_input,
                  custom_mutator=mutate)  # fmt: skip
    atheris.Fuzz()
