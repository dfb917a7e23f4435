"""Fuzz the readers of a model's configuration: ``python tests/fuzz/fuzz_config.py [tests/fuzz/corpus/config]``.

An input is ``config.json``, then a zero byte and ``generation_config.json``. The model is read and sized for a CPU and
a GPU, or refused by a typed error. Half of the inputs are sound but for one field of each file, which may be anything.
"""

import pathlib
import random
import sys
import tempfile

import atheris

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "support"))

with atheris.instrument_imports(include=["neuron.models"]):
    from model_files import check_bytes, folder_config, safetensors_file

QUANTISED_FILE = safetensors_file("gptq")
"""Weights of the quantised configuration among the sound ones; no other one reads them."""
FOLDER = pathlib.Path(tempfile.mkdtemp(prefix="fuzz-config-", dir="/dev/shm"))


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Return a new input, made of ``data`` or of a configuration with hostile fields."""
    rng = random.Random(seed)
    if rng.random() < 0.5:
        return bytes(atheris.Mutate(data, max_size))
    return b"\0".join(folder_config(rng).values())[:max_size]


def one_input(data: bytes) -> None:
    """Check one configuration."""
    config, _, generation = data.partition(b"\0")
    files = {"config.json": config, "generation_config.json": generation or b"{}", "model.safetensors": QUANTISED_FILE}
    check_bytes(files, FOLDER)


if __name__ == "__main__":
    atheris.Setup([sys.argv[0], "-max_len=65536", "-timeout=10", "-rss_limit_mb=2048", *sys.argv[1:]], one_input,
                  custom_mutator=mutate)  # fmt: skip
    atheris.Fuzz()
