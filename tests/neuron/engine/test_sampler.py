"""Sampling: its distributions, reproducible seeds, and each setting against its formula."""

import math
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from cortex.wire.errors import InvalidRequestError
from neuron.cpu_kernels import native
from neuron.device.jobs import SamplerSettings
from neuron.engine.native_executor import draw_natively
from neuron.engine.sampler import Draw, Sampler, check_settings
from neuron.triton_kernels.operations import EAGER
from neuron.triton_kernels.sampling import NON_FINITE, NUM_CANDIDATES, uniform

DRAWS = 20_000
CPU = torch.device("cpu")


def draw(logits: torch.Tensor, draws: int = DRAWS, **settings: Any) -> np.ndarray[Any, Any]:
    """Return how often each token comes out of ``draws`` rows of the same ``logits``, one seed each."""
    sampler = Sampler(1, len(logits), CPU)
    sampler.admit(0, SamplerSettings(**settings), np.zeros(1, np.int32))
    slots = np.zeros(draws, np.int32)
    ids = sampler.sample(logits.repeat(draws, 1), slots, np.arange(draws, dtype=np.int32))
    return np.bincount(ids.numpy(), minlength=len(logits))


def expected_probabilities(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> np.ndarray[Any, Any]:
    """Return the textbook's probabilities, a token at a time."""
    p = (logits.double() / temperature).softmax(-1).tolist()
    order = sorted(range(len(p)), key=lambda token: -p[token])
    kept = order[: top_k or len(p)]
    total = sum(p[token] for token in kept)
    chosen, mass = [], 0.0
    for token in kept:
        if mass >= top_p and chosen:
            break
        chosen.append(token)
        mass += p[token] / total
    chosen = [token for token in chosen if p[token] >= min_p * p[order[0]]]
    total = sum(p[token] for token in chosen)
    found = np.zeros(len(p))
    found[chosen] = [p[token] / total for token in chosen]
    return found


def assert_drawn_from(counts: np.ndarray[Any, Any], probabilities: np.ndarray[Any, Any]) -> None:
    """Assert a chi-square within 5 standard deviations, with cells over 5 draws, and none outside the support."""
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities * counts.sum()
    cells = expected >= 5
    statistic = ((counts[cells] - expected[cells]) ** 2 / expected[cells]).sum()
    freedom = max(1, int(cells.sum()) - 1)
    assert statistic < freedom + 5 * math.sqrt(2 * freedom), f"chi-square {statistic:.1f} with {freedom} degrees"


@pytest.mark.parametrize("vocab_size", [5, 97, 1500])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.7},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 4, "top_p": 0.6},
        {"top_p": 0.3},
        {"top_p": 0.9},
        {"top_p": 0.0},
        {"min_p": 0.2},
        {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.05},
    ],
    ids=str,
)
def test_tokens_come_as_often_as_they_should(vocab_size: int, settings: dict[str, Any]) -> None:
    torch.manual_seed(vocab_size)
    logits = torch.randn(vocab_size) * 2
    assert_drawn_from(draw(logits, **settings), expected_probabilities(logits, **settings))


def test_top_p_of_a_flat_distribution_needs_more_than_the_first_candidates() -> None:
    logits = torch.linspace(0.0, 0.5, 4 * NUM_CANDIDATES)
    assert_drawn_from(draw(logits, 5000, top_p=0.8), expected_probabilities(logits, top_p=0.8))


def test_the_chi_square_notices_a_wrong_distribution() -> None:
    torch.manual_seed(3)
    logits = torch.randn(97) * 2
    with pytest.raises(AssertionError, match="chi-square"):
        assert_drawn_from(draw(logits, temperature=1.1), expected_probabilities(logits))


def test_uniform_numbers_are_uniform_and_independent() -> None:
    seeds, counters = np.meshgrid(np.arange(256), np.arange(256, dtype=np.int32))
    numbers = uniform(*map(torch.from_numpy, (seeds.ravel(), counters.ravel()))).numpy()
    assert 0 <= numbers.min() < numbers.max() < 1
    assert_drawn_from(np.bincount((numbers * 64).astype(int), minlength=64), np.full(64, 1 / 64))
    pairs = (numbers[:-1] * 8).astype(int) * 8 + (numbers[1:] * 8).astype(int)
    assert_drawn_from(np.bincount(pairs, minlength=64), np.full(64, 1 / 64))


def test_a_row_depends_on_its_own_seed_and_step_only() -> None:
    torch.manual_seed(0)
    vocab_size, rows = 1000, 12
    sampler = Sampler(rows, vocab_size, CPU)
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.0},
        {"top_k": 40},
        {"top_p": 0.9},
        {"min_p": 0.1},
        {"top_p": 0.5},
    ]
    for slot in range(rows):
        settings = SamplerSettings(**{"temperature": 1.2, "seed": slot // 6, **kinds[slot % 6]})
        sampler.admit(slot, settings, np.zeros(1, np.int32))
    logits = torch.randn(rows, vocab_size)
    slots = np.arange(rows, dtype=np.int32)
    together = sampler.sample(logits.clone(), slots, slots + 3).tolist()
    for order in (slots[::-1], slots[3:7]):
        shuffled = sampler.sample(logits[order.copy()].clone(), order.copy(), order + 3)
        assert shuffled.tolist() == [together[slot] for slot in order]
    for slot in range(rows):
        alone = sampler.sample(logits[slot : slot + 1].clone(), slots[slot : slot + 1], slots[slot : slot + 1] + 3)
        assert alone.tolist() == [together[slot]]
    others = [draw(torch.zeros(vocab_size), 50, seed=seed).nonzero()[0].tolist() for seed in (1, 2, -1, 1 << 63)]
    assert len({tuple(other) for other in others}) == 4


def test_a_seed_gives_the_same_text_by_native_kernels_and_in_torch(
    harness: Callable[..., Any], tiny_llama: pathlib.Path, set_engine: Callable[..., None]
) -> None:
    kinds: list[dict[str, Any]] = [{}, {"top_k": 20}, {"top_p": 0.8, "min_p": 0.02}, {"presence_penalty": 0.5}]
    found = []
    for is_native in (False, True):
        set_engine(cpu_kernels=is_native)
        driver = harness()
        driver.load(tiny_llama, dtype="float32", max_sequences=4)
        for number, kind in enumerate(kinds):
            driver.generate(number, list(range(3, 20)), 30, temperature=0.9, seed=number, **kind)
        driver.run()
        found.append(driver.outputs())
    assert found[0] == found[1]
    assert len({tuple(tokens) for tokens in found[0].values()}) == 4


def test_penalties_and_bias_follow_their_formulas() -> None:
    torch.manual_seed(1)
    vocab_size = 30
    logits = torch.randn(1, vocab_size) * 3
    settings = SamplerSettings(
        temperature=0.0,
        repetition_penalty=1.3,
        presence_penalty=0.7,
        frequency_penalty=0.4,
        logit_bias=((4, 2.5), (9, -50.0)),
    )
    prompt, output = [3, 4, 4, 11], []
    sampler = Sampler(2, vocab_size, CPU)
    slot = np.ones(1, np.int32)
    sampler.admit(1, settings, np.array(prompt, np.int32))
    for step in range(25):
        expected = logits[0].clone()
        for token in {*prompt, *output}:
            expected[token] = expected[token] / 1.3 if expected[token] > 0 else expected[token] * 1.3
        for token in set(output):
            expected[token] -= 0.7 + 0.4 * output.count(token)
        expected[4] += 2.5
        expected[9] -= 50.0
        found = sampler.sample(logits.clone(), slot, np.array([step], np.int32))
        assert found.tolist() == [int(expected.argmax())]
        output += found.tolist()
    assert len(set(output)) > 3
    # The next sequence on this slot starts clean.
    sampler.admit(1, SamplerSettings(temperature=0.0, presence_penalty=1e-6), np.array([1], np.int32))
    assert sampler.sample(logits.clone(), slot, np.zeros(1, np.int32)).tolist() == [int(logits.argmax())]


@pytest.mark.parametrize("by", [EAGER.sample, draw_natively(native.levels()[0])], ids=["eager", "native"])
def test_no_heat_draws_a_forbidden_token(by: Draw) -> None:
    logits = torch.randn(1, 40).repeat(500, 1)
    for temperature in (1.0, 1e35, 1e300):
        sampler = Sampler(1, 40, CPU, by)
        sampler.admit(0, SamplerSettings(temperature=temperature, seed=1), np.zeros(1, np.int32))
        sampler.constrain(0, np.array([0b111 << 6, 1], np.int32))
        found = sampler.sample(logits, np.zeros(500, np.int32), np.arange(500, dtype=np.int32))
        assert set(found.tolist()) == {6, 7, 8, 32}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"top_k": 3}, {"presence_penalty": 1.0}]
)
@pytest.mark.parametrize("by", [EAGER.sample, draw_natively(native.levels()[0])], ids=["eager", "native"])
def test_a_bad_row_is_reported_and_its_neighbours_go_on(bad: float, settings: dict[str, Any], by: Draw) -> None:
    sampler = Sampler(3, 600, CPU, by)
    for slot in range(3):
        sampler.admit(slot, SamplerSettings(**settings), np.zeros(1, np.int32))
    logits = torch.randn(3, 600)
    slots, steps = np.arange(3, dtype=np.int32), np.zeros(3, np.int32)
    expected = sampler.sample(logits.clone(), slots, steps).tolist()
    for slot in range(3):
        sampler.admit(slot, SamplerSettings(**settings), np.zeros(1, np.int32))
    logits[1, 17] = bad
    assert sampler.sample(logits, slots, steps).tolist() == [expected[0], NON_FINITE, expected[2]]


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"min_p": -0.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": math.inf}, "presence_penalty"),
        ({"frequency_penalty": math.nan}, "frequency_penalty"),
        ({"logit_bias": ((30, 1.0),)}, "logit_bias"),
        ({"logit_bias": ((-1, 1.0),)}, "logit_bias"),
        ({"logit_bias": ((1, math.nan),)}, "logit_bias"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_settings(SamplerSettings(**settings), 30)
    assert caught.value.param == param


def test_the_smallest_temperatures_are_greedy() -> None:
    check_settings(SamplerSettings(temperature=1e-30), 30)
    logits = torch.randn(30)
    assert draw(logits, 10, temperature=1e-30)[int(logits.argmax())] == 10
