"""Prompt lookup, and the number of draft tokens that a step verifies."""

import numpy as np

from neuron.device.jobs import SamplerSettings
from neuron.engine.sequence import Sequence
from neuron.engine.speculation import PromptLookup, Speculation, lookup
from neuron.engine.step_timer import StepTimer


def test_a_lookup_continues_the_last_place_of_the_last_three_tokens() -> None:
    text = np.array([1, 2, 3, 4, 9, 1, 2, 3, 5, 6, 7, 1, 2, 3], np.int32)
    assert lookup(text, 8).tolist() == [5, 6, 7, 1, 2, 3]
    assert lookup(text, 2).tolist() == [5, 6]
    assert lookup(text[:-1], 8).tolist() == []
    assert lookup(np.array([1, 1, 1, 1], np.int32), 8).tolist() == [1]
    assert lookup(np.array([1, 2, 3], np.int32), 8).tolist() == []


def speculation(row_s: float, acceptance_rate: float) -> int:
    """Return the draft tokens that one sequence gets where each row costs ``row_s`` beside the first's second."""
    step_timer = StepTimer(16, 64)
    for rows in range(1, 17):
        step_timer.record(rows, 0, 1.0 + row_s * (rows - 1))
    tokens = np.tile(np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], np.int32), 4)
    s = Sequence(1, tokens, 100, frozenset(), SamplerSettings())
    s.acceptance_rate = acceptance_rate
    Speculation(PromptLookup(), step_timer).propose([s], lambda _: True, 15, lambda _, count: count)
    return len(s.drafts)


def test_drafts_are_verified_only_where_that_pays() -> None:
    assert speculation(row_s=0.01, acceptance_rate=0.9) == 8
    assert 0 < speculation(row_s=0.2, acceptance_rate=0.7) < 8
    assert speculation(row_s=0.8, acceptance_rate=0.7) == 0
    assert speculation(row_s=0.01, acceptance_rate=0.01) == 0


def test_an_acceptance_rate_is_learned_and_forgotten() -> None:
    step_timer = StepTimer(16, 64)
    step_timer.record(1, 0, 1.0)
    step_timer.record(9, 0, 5.0)
    found = Speculation(PromptLookup(), step_timer)
    s = Sequence(1, np.tile(np.arange(10, dtype=np.int32), 4), 100, frozenset(), SamplerSettings())
    tries = []
    for step in range(1200):
        s.drafts = s.drafts[:0]
        found.propose([s], lambda _: True, 15, lambda _, count: count)
        if len(s.drafts):
            tries.append(step)
            found.learn(s, 0)
    assert 2 < sum(step < 300 for step in tries) < 30, "it gives up, and tries again now and then"
    assert 0 < sum(step >= 600 for step in tries) < 5, "ever more seldom"
    for _ in range(20):
        s.drafts = np.arange(4, dtype=np.int32)
        found.learn(s, 4)
    assert s.acceptance_rate > 0.95
    assert found.num_accepted == 80
