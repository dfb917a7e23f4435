"""The definition of a draw: one table of numbers, in numpy, eager torch, C and Triton.

``python -P tests/neuron/triton_kernels/test_draws.py`` writes the table anew, by the definition in numpy, from draws
that float32 cannot change: each token is the same with all numbers a ten-thousandth larger or smaller.
"""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from neuron.cpu_kernels import native
from neuron.device.jobs import SamplerSettings
from neuron.engine.native_executor import draw_natively
from neuron.engine.sampler import Draw, Sampler
from neuron.triton_kernels.operations import EAGER
from neuron.triton_kernels.sampling import uniform

TABLE = pathlib.Path(__file__).with_name("draws.json")
SEEDS = (0, 1, 5, 0x0123_4567_89AB_CDEF, 1 << 63, (1 << 64) - 1)
COUNTERS = (0, 1, 2, 1000, (1 << 31) - 1)
LOGITS = ((40, 17, 31), (131, 77, 64), (5000, 2741, 4801))
"""Size, step and modulus of each row of logits: token i has ``(step * i % modulus) * 8 / modulus`` in 1/64."""
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.4},
    {"top_k": 9},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"temperature": 1.3, "top_k": 30, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 0.7, "logit_bias": [[3, 5.5], [20, -9.0]], "repetition_penalty": 1.4, "presence_penalty": 0.5},
    {"top_p": 0.8, "allowed": 3},
]
PROMPT, OUTPUT = (1, 2, 20), (5, 5, 31)


def row_of(size: int, step: int, modulus: int) -> np.ndarray[Any, Any]:
    row: np.ndarray[Any, Any] = (np.arange(size) * step % modulus * 512 // modulus / 64).astype(np.float32)
    return row


def mask_of(size: int, every: int) -> np.ndarray[Any, Any]:
    """Return the mask that allows each ``every``-th token."""
    bits = np.zeros(-(-size // 32) * 32, np.bool_)
    bits[:size:every] = True
    return np.packbits(bits, bitorder="little").view(np.int32)


def bits_of(seed: int, counter: int) -> int:
    """Return the 43 bits of a draw, in Python's integers."""
    gamma, whole = 0x9E3779B97F4A7C15, (1 << 64) - 1

    def mix(bits: int) -> int:
        bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & whole
        bits = (bits ^ bits >> 27) * 0x94D049BB133111EB & whole
        return bits ^ bits >> 31

    return mix(mix(seed + gamma & whole) + (counter + 1) * gamma & whole) >> 21


def token_of(logits: np.ndarray[Any, Any], settings: dict[str, Any], number: float, slack: float = 0.0) -> int:
    """Return the token that ``number`` draws, in float64, with all thresholds off by ``slack``."""
    x = logits.astype(np.float64)
    how = SamplerSettings(**{name: value for name, value in settings.items() if name not in ("allowed", "logit_bias")})
    for token in {*PROMPT, *OUTPUT}:
        x[token] = x[token] / how.repetition_penalty if x[token] > 0 else x[token] * how.repetition_penalty
    for token in set(OUTPUT):
        x[token] -= how.presence_penalty + how.frequency_penalty * OUTPUT.count(token)
    for token, value in settings.get("logit_bias", ()):
        x[token] += value
    x[np.arange(len(x)) % settings.get("allowed", 1) != 0] = -np.inf
    if how.temperature == 0:
        return int(x.argmax())
    weights = np.exp((x - x.max()) / how.temperature)
    if how.top_k:
        weights[weights < np.sort(weights)[-how.top_k]] = 0
    above = np.array([weights[weights > weight * (1 + 1e-12)].sum() for weight in weights]) / weights.sum()
    weights[above >= how.top_p + slack] = 0
    weights[weights < how.min_p * (1 + slack)] = 0
    running = weights.cumsum()
    return int(np.searchsorted(running, min(max(number + slack, 0), 1) * running[-1], side="right"))


def table() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(TABLE.read_text())
    return found


def tokens(draws: list[dict[str, Any]], draw: Draw) -> list[int]:
    """Return the token of each draw by a sampler, each as a row beside one that is not finite."""
    found = []
    for each in draws:
        size, allowed = each["logits"][0], each["settings"].get("allowed")
        settings = {name: value for name, value in each["settings"].items() if name != "allowed"}
        sampler = Sampler(2, size, torch.device("cpu"), draw)
        for slot in range(2):
            sampler.admit(
                slot,
                SamplerSettings(**settings, seed=each["seed"]),
                np.array(PROMPT, np.int32),
                np.array(OUTPUT, np.int32),
            )
            sampler.constrain(slot, None if allowed is None else mask_of(size, allowed))
        logits = torch.from_numpy(row_of(*each["logits"])).repeat(2, 1)
        logits[0, 7] = torch.nan
        counters = np.array([0, each["counter"]], np.int32)
        failed, token = sampler.sample(logits, np.arange(2, dtype=np.int32), counters).tolist()
        assert failed == -1
        found.append(token)
    return found


def test_the_table_is_by_definition() -> None:
    for seed, counter, bits in table()["uniform"]:
        assert bits_of(seed, counter) == bits
    for each in table()["draws"]:
        number = bits_of(each["seed"], each["counter"]) / 2**43
        for slack in (-1e-4, 0, 1e-4):
            assert token_of(row_of(*each["logits"]), each["settings"], number, slack) == each["token"]


def test_numbers_in_torch_and_in_c() -> None:
    for seed, counter, bits in table()["uniform"]:
        seeds = torch.from_numpy(np.array([seed], np.uint64).view(np.int64))
        assert uniform(seeds, torch.tensor([counter], dtype=torch.int32)).tolist() == [bits / 2**43]
        assert native.uniform(seed, counter) == bits / 2**43


def test_tokens_in_torch() -> None:
    draws = table()["draws"]
    assert tokens(draws, EAGER.sample) == [each["token"] for each in draws]


@pytest.mark.parametrize("level", native.levels())
def test_tokens_in_c(level: str) -> None:
    draws = table()["draws"]
    assert tokens(draws, draw_natively(level)) == [each["token"] for each in draws]


def test_tokens_in_triton() -> None:
    pytest.importorskip("triton")
    code = (
        "import test_draws\n"
        "from neuron.triton_kernels.operations import KERNELS\n"
        "draws = test_draws.table()['draws']\n"
        "assert test_draws.tokens(draws, KERNELS.sample) == [each['token'] for each in draws]\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(TABLE.parent)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def write() -> None:
    draws: list[dict[str, Any]] = []
    for i, (logits, settings) in enumerate((logits, settings) for logits in LOGITS for settings in SETTINGS):
        row, seed, wanted = row_of(*logits), SEEDS[i % len(SEEDS)], len(draws) + 2
        for counter in range(200):
            number = bits_of(seed, counter) / 2**43
            found = {token_of(row, settings, number, slack) for slack in (-1e-4, 0, 1e-4)}
            if len(found) == 1 and len(draws) < wanted:
                draws.append(
                    {"logits": logits, "settings": settings, "seed": seed, "counter": counter, "token": found.pop()}
                )
    numbers = [[seed, counter, bits_of(seed, counter)] for seed in SEEDS for counter in COUNTERS]
    parts: dict[str, list[Any]] = {"uniform": numbers, "draws": draws}
    lists = (f'"{name}": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]" for name, rows in parts.items())
    TABLE.write_text("{" + ", ".join(lists) + "}\n")


if __name__ == "__main__":
    write()
