"""Fuzz the decoders of request bodies: ``python tests/fuzz/fuzz_bodies.py -runs=1000000``.

Every input is made here, of a body that uses each field of its dialect. It must decode to a request, or be refused with
an error of the request's; anything else that is raised is a bug.
"""

import pathlib
import random
import sys

import atheris

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "support"))

from bodies import check, mutated


def mutate(_data: bytes, _max_size: int, seed: int) -> bytes:
    """Return a new input: what the bodies are made from."""
    return seed.to_bytes(8, "little", signed=False)


@atheris.instrument_func  # type: ignore[untyped-decorator]
def one_input(data: bytes) -> None:
    """Check one input."""
    check(*mutated(random.Random(data)))


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input, custom_mutator=mutate)
    atheris.Fuzz()
