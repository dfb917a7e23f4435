"""Drawing a token natively, against the same distribution sorted and inverted in float64."""

from typing import Any

import numpy as np
import pytest

from neuron.cpu_kernels import native
from neuron.models.packed import padded

Array = np.ndarray[Any, Any]

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 7},
    "top_k of one": {"top_k": 1},
    "top_k of all": {"top_k": 1 << 20},
    "top_p": {"top_p": 0.9},
    "top_p of next to all": {"top_p": 0.9999},
    "top_p of nothing": {"top_p": 0.0},
    "min_p": {"min_p": 0.05},
    "all": {"temperature": 1.5, "top_k": 40, "top_p": 0.8, "min_p": 0.01},
    "capped": {"cap": 4.0, "top_p": 0.9},
}


def draw(level: str, logits: Array, **settings: Any) -> int:
    row = np.full(padded(len(logits)), 99.0, np.float32)  # the padding must not count
    row[: len(logits)] = logits
    return native.draw(level, row, len(logits), np.zeros_like(row), **settings)


def kept_of(
    logits: Array, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, cap: float = 0.0
) -> Array:
    """Return the probabilities of the kept tokens, 0 for the others. Equal ones are kept or dropped together."""
    x = logits.astype(np.float64)
    x = cap * np.tanh(x / cap) if cap else x
    weights = np.exp((x - x.max()) / temperature)
    descending = np.sort(weights)[::-1]
    if 0 < top_k < len(descending):
        descending = descending[descending >= descending[top_k - 1]]
    above = np.cumsum(descending) - descending
    descending = descending[(above < top_p * descending.sum()) | (np.arange(len(descending)) == 0) | (top_p >= 1)]
    weights[weights < max(float(descending[-1]), min_p)] = 0
    found: Array = weights / weights.sum()
    return found


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("level", native.levels())
def test_a_draw_inverts_the_filtered_distribution(level: str, settings: dict[str, Any]) -> None:
    random = np.random.default_rng(3)
    for size, spread in ((1, 1.0), (2, 1.0), (15, 2.0), (16, 1.0), (17, 3.0), (333, 2.0), (1000, 0.01), (30000, 2.5)):
        logits = (random.standard_normal(size) * spread).astype(np.float32)
        chances = kept_of(logits, **settings)
        ends = np.cumsum(chances)
        for number in (0.0, *random.random(30), 1 - 2.0**-43):
            token = draw(level, logits, uniform=number, **settings)
            # Either side of a border is right that is closer than the precision of float32.
            assert chances[token] > 0, (size, number)
            assert ends[token] - chances[token] - 2e-5 <= number <= ends[token] + 2e-5, (size, number)


@pytest.mark.parametrize("level", native.levels())
def test_equal_tokens_are_kept_or_dropped_together(level: str) -> None:
    logits = np.zeros(1000, np.float32)
    logits[500:] = -1
    numbers = np.arange(1000) / 1000
    for settings in ({"top_k": 3}, {"top_p": 0.4}, {"min_p": 0.9}):
        found = {draw(level, logits, uniform=number, **settings) for number in numbers}
        assert found == set(range(500)), settings


@pytest.mark.parametrize("level", native.levels())
def test_the_likeliest_is_the_first_of_equals_and_nothing_follows_from_no_number(level: str) -> None:
    logits = np.random.default_rng(0).standard_normal(777).astype(np.float32)
    logits[[300, 301, 776]] = 9
    assert draw(level, logits, temperature=0.0) == 300
    assert draw(level, logits, temperature=1e-5, uniform=0.0) == 300
    for at in (0, 400, 776):
        for wrong in (np.nan, np.inf, -np.inf):
            broken = logits.copy()
            broken[at] = wrong
            for temperature in (0.0, 1.0):
                assert draw(level, broken, temperature=temperature, top_p=0.9) == -1


def test_rows_of_another_length_are_refused() -> None:
    level, row = native.levels()[0], np.zeros(32, np.float32)
    for logits, count, scratch in ((row, 16, row), (row, 33, row), (row, 0, row), (row, 20, row[:16])):
        with pytest.raises(ValueError, match="no rows"):
            native.draw(level, logits, count, scratch)
