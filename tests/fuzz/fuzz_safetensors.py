"""Fuzz the reader of safetensors: ``python tests/fuzz/fuzz_safetensors.py [tests/fuzz/corpus/safetensors]``.

An input is the weights' file of a folder whose configuration is sound, of a quantised model if the names of tensors are
such; one that begins with ``{`` is the index of a checkpoint in shards. It is opened, checked and read as in a load, or
refused by a typed error; anything else is a bug.
"""

import json
import pathlib
import random
import sys
import tempfile

import atheris

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "support"))

with atheris.instrument_imports(include=["neuron.models"]):
    from model_files import CONFIG, QUANTISED, check_bytes, mutated, safetensors_file

FOLDER = pathlib.Path(tempfile.mkdtemp(prefix="fuzz-safetensors-", dir="/dev/shm"))
SOUND = safetensors_file()
QUANTISED_FILES = [safetensors_file(method) for method in ("gptq", "awq", "fp8")]
METHODS = {b"g_idx": "gptq", b"qweight": "awq", b"weight_scale_inv": "fp8"}
"""Method of a checkpoint with tensors whose names have such an end."""
INDEX = json.dumps({"weight_map": {"model.norm.weight": "model.safetensors", "lm_head.weight": "../x"}}).encode()


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Return a new input, made of ``data``, of sound weights or of an index."""
    rng = random.Random(seed)
    if rng.random() < 0.5:
        return bytes(atheris.Mutate(data, max_size))
    return mutated(rng.choice((data, SOUND, SOUND, INDEX, *QUANTISED_FILES)) or SOUND, rng)[:max_size]


def one_input(data: bytes) -> None:
    """Check one file."""
    method = next((method for end, method in METHODS.items() if end in data), "")
    config = QUANTISED | {"quantization_config": {**QUANTISED["quantization_config"], "quant_method": method}}
    files = {"config.json": json.dumps(config if method else CONFIG).encode(), "model.safetensors": SOUND}
    files["model.safetensors.index.json" if data.startswith(b"{") else "model.safetensors"] = data
    check_bytes(files, FOLDER, weights=True)


if __name__ == "__main__":
    atheris.Setup([sys.argv[0], "-max_len=8192", "-timeout=10", "-rss_limit_mb=2048", *sys.argv[1:]], one_input,
                  custom_mutator=mutate)  # fmt: skip
    atheris.Fuzz()
