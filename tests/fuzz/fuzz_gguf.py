"""Fuzz the reader of GGUF files: ``python tests/fuzz/fuzz_gguf.py [tests/fuzz/corpus/gguf] -runs=100000``.

An input is a file. Its header is read, its model sized and every tensor read as in a load, or it is refused by
a typed error; anything else, a gigabyte or ten seconds are a bug. Half of the inputs are libFuzzer's own mutations,
half have numbers overwritten in places that count.
"""

import pathlib
import random
import sys
import tempfile

import atheris

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "support"))

with atheris.instrument_imports(include=["neuron.models"]):
    from model_files import check_bytes, gguf_file, mutated

    from neuron.formats.registry import STORED_FORMATS
    from neuron.models.gguf import TensorKind

FOLDER = pathlib.Path(tempfile.mkdtemp(prefix="fuzz-gguf-", dir="/dev/shm"))
SOUND = [gguf_file(), *(gguf_file(TensorKind[name]) for name in (*STORED_FORMATS, "IQ1_M", "Q1_0"))]


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Return a new input, made of ``data`` or of a sound file."""
    rng = random.Random(seed)
    if rng.random() < 0.5:
        return bytes(atheris.Mutate(data, max_size))
    return mutated(data if rng.random() < 0.5 and len(data) > 24 else rng.choice(SOUND), rng)[:max_size]


def one_input(data: bytes) -> None:
    """Check one file."""
    check_bytes({"model.gguf": data}, FOLDER)
    check_bytes({"model.gguf": data}, FOLDER, weights=True)


if __name__ == "__main__":
    atheris.Setup([sys.argv[0], "-max_len=32768", "-timeout=10", "-rss_limit_mb=2048", *sys.argv[1:]], one_input,
                  custom_mutator=mutate)  # fmt: skip
    atheris.Fuzz()
