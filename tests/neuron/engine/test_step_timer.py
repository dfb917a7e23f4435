"""Measured step times, and the limits that follow from them."""

import pytest

from neuron.engine.step_timer import MIN_PROMPT_TOKENS, STALL_FACTOR, StepTimer


def test_a_prompt_takes_the_spare_time_of_the_others() -> None:
    step_timer = StepTimer(16, 512)
    assert step_timer.mixed_step_tokens(4) == 4 + 16, "before anything is known: a page"
    step_timer.record(4, 0, 0.010)
    for _ in range(12):
        tokens = step_timer.mixed_step_tokens(4) - 4
        step_timer.record(4, tokens, 0.010 + 0.0001 * tokens)
    assert tokens == pytest.approx((STALL_FACTOR - 1) * 100, abs=2)
    for _ in range(12):  # later tokens cost more
        tokens = step_timer.mixed_step_tokens(4) - 4
        step_timer.record(4, tokens, 0.010 + 0.0005 * tokens)
    assert tokens == pytest.approx((STALL_FACTOR - 1) * 20, abs=2)
    for _ in range(12):
        step_timer.record(4, 16, 1.0)
    assert step_timer.mixed_step_tokens(4) == 4 + MIN_PROMPT_TOKENS, "never nothing"


def test_times_between_and_beyond_those_measured() -> None:
    step_timer = StepTimer(16, 64)
    assert step_timer.step_s(3) is None
    step_timer.record(2, 0, 2.0)
    step_timer.record(6, 0, 4.0)
    assert [step_timer.step_s(rows) for rows in (1, 2, 4, 6)] == [2.0, 2.0, 3.0, 4.0]
    beyond = step_timer.step_s(10)
    assert beyond is not None
    assert 4.0 < beyond < 6.0
    step_timer.record(2, 0, 1000.0)
    after = step_timer.step_s(2)
    assert after is not None
    assert after < 3.0, "a single outlier weighs little"
