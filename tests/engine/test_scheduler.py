"""Scheduler and pages under random arrivals and cancels: nothing leaks, nobody starves, every step obeys its limits."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from neuron.device.jobs import SamplerSettings
from neuron.engine.pages import PagePool
from neuron.engine.plan import build_plan
from neuron.engine.scheduler import Limits, Scheduler, Step
from neuron.engine.sequence import Sequence, SequenceState

LIMITS = Limits(
    num_pages=24, page_tokens=4, context_tokens=64, max_sequences=4, step_tokens=24, mixed_step_tokens=10
)  # fmt: skip


def sequence(number: int, num_prompt: int, max_tokens: int) -> Sequence:
    prompt = np.arange(num_prompt, dtype=np.int32)
    return Sequence(number, prompt, max_tokens, frozenset(), SamplerSettings())


def check_step(step: Step, scheduler: Scheduler) -> None:
    """What every step must satisfy."""
    limits = scheduler.limits
    decoding = [s for s in scheduler.running.values() if not s.prefills]
    assert set(step.sequences[: step.num_decodes]) == set(decoding)
    assert len(set(step.sequences)) == len(step.sequences) == len(step.num_tokens)
    lengths = [s.num_computed for s in step.sequences[: step.num_decodes]]
    assert lengths == sorted(lengths, reverse=True)
    budget = max(limits.mixed_step_tokens, len(decoding) + limits.page_tokens) if decoding else limits.step_tokens
    assert 0 < sum(step.num_tokens) <= budget
    prefilling = [s for s in scheduler.running.values() if s.prefills]
    assert list(step.sequences[step.num_decodes :]) == prefilling[: len(step.sequences) - step.num_decodes]
    # The budget is used: a prompt is cut only where it ends.
    if sum(step.num_tokens) < budget and step.num_decodes < limits.mixed_step_tokens - limits.page_tokens:
        chunks = zip(step.sequences, step.num_tokens, strict=True)
        assert sum(count for s, count in chunks if s.prefills) == sum(s.num_prompt - s.num_computed for s in prefilling)


def check_plan(step: Step, scheduler: Scheduler) -> None:
    """The arrays against a plain computation, token by token."""
    page_tokens = scheduler.limits.page_tokens
    plan = build_plan(step, scheduler.page_table, page_tokens)
    row = 0
    sampled = []
    for index, (s, count) in enumerate(zip(step.sequences, step.num_tokens, strict=True)):
        assert plan.cu_seqlens[index] == row
        assert plan.context_lens[index] == s.num_computed + count
        assert plan.seats[index] == s.seat
        assert plan.num_output[index] == s.num_output
        pages = plan.page_table[index]
        needed = min(len(s.pages), len(pages))
        assert pages[:needed].tolist() == s.pages[:needed].tolist()
        assert not pages[len(s.pages) :].any()
        for position in range(s.num_computed, s.num_computed + count):
            assert plan.positions[row] == position
            assert plan.token_ids[row] == s.tokens[position]
            assert plan.slots[row] == s.pages[position // page_tokens] * page_tokens + position % page_tokens
            row += 1
        if s.num_computed + count >= s.num_prompt:
            sampled.append(index)
    assert plan.cu_seqlens[-1] == row == len(plan.token_ids)
    assert plan.sampled.tolist() == sampled
    assert len(np.unique(plan.slots)) == row
    for field in dataclasses.fields(plan):
        value = getattr(plan, field.name)
        assert not isinstance(value, np.ndarray) or value.dtype == np.int32, field.name


def advance(step: Step, scheduler: Scheduler) -> list[int]:
    """Do what running a step does; return the sequences that ended."""
    ended = []
    for s, count in zip(step.sequences, step.num_tokens, strict=True):
        s.num_computed += count
        assert s.num_computed <= len(s.pages) * scheduler.limits.page_tokens
        if s.num_computed >= s.num_prompt:
            s.append(7)
            if s.num_output == s.max_tokens:
                scheduler.remove(s.number)
                ended.append(s.number)
    return ended


class Arrivals(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.scheduler = Scheduler(LIMITS)
        self.number = 0
        self.order: list[int] = []
        self.admitted: list[int] = []

    @rule(num_prompt=st.integers(1, 63), max_tokens=st.integers(1, 63))
    def arrive(self, num_prompt: int, max_tokens: int) -> None:
        self.number += 1
        new = sequence(self.number, num_prompt, min(max_tokens, 64 - num_prompt))
        self.scheduler.add(new)
        self.order.append(self.number)
        with pytest.raises(ValueError, match="known already"):
            self.scheduler.add(new)

    @precondition(lambda self: self.scheduler.busy)
    @rule()
    def step(self) -> None:
        self.admitted += [s.number for s in self.scheduler.admit()]
        step = self.scheduler.schedule()
        assert step is not None, "somebody waits and nobody runs"
        check_step(step, self.scheduler)
        check_plan(step, self.scheduler)
        advance(step, self.scheduler)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, self.number))
        known = number in self.scheduler.running or number in self.scheduler.waiting
        removed = self.scheduler.remove(number)
        assert (removed is not None) == known
        if removed is not None:
            assert removed.state is SequenceState.FINISHED
            assert not len(removed.pages)
        if number in self.order and number not in self.admitted:
            self.order.remove(number)

    @invariant()
    def sound(self) -> None:
        self.scheduler.check_integrity()
        # First come, first admitted.
        assert self.admitted == self.order[: len(self.admitted)]

    def teardown(self) -> None:
        steps = 0
        while self.scheduler.busy:
            self.step()
            steps += 1
            assert steps < 64 * (len(self.order) + 1), "somebody starves"
        self.scheduler.check_integrity()
        assert self.scheduler.pool.num_free == LIMITS.num_pages


Arrivals.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestArrivals = Arrivals.TestCase


def test_ten_thousand_sequences_leave_nothing_behind() -> None:
    random = np.random.default_rng(11)
    scheduler = Scheduler(
        dataclasses.replace(LIMITS, num_pages=400, max_sequences=64, mixed_step_tokens=256, step_tokens=256)
    )
    numbers = iter(range(10_000))
    finished = 0
    for round_number in range(100_000):
        for _ in range(int(random.integers(0, 8))):
            number = next(numbers, None)
            if number is not None:
                num_prompt = int(random.integers(1, 50))
                scheduler.add(sequence(number, num_prompt, int(random.integers(1, 64 - num_prompt + 1))))
        if random.random() < 0.2 and scheduler.busy:
            victims = [*scheduler.running, *scheduler.waiting]
            finished += scheduler.remove(victims[int(random.integers(len(victims)))]) is not None
        scheduler.admit()
        step = scheduler.schedule()
        if step is None:
            if finished == 10_000:
                break
            continue
        finished += len(advance(step, scheduler))
        if round_number % 50 == 0:
            scheduler.check_integrity()
    assert finished == 10_000
    scheduler.check_integrity()
    assert scheduler.pool.num_free == 400


def test_a_sequence_that_can_never_run_is_refused() -> None:
    scheduler = Scheduler(LIMITS)
    with pytest.raises(ValueError, match="needs 64 tokens of cache"):
        scheduler.add(sequence(1, 40, 25))
    small = Scheduler(dataclasses.replace(LIMITS, num_pages=10))
    with pytest.raises(ValueError, match="needs 59 tokens"):
        small.add(sequence(1, 40, 20))


def test_a_long_prompt_takes_only_its_share_of_a_mixed_step() -> None:
    scheduler = Scheduler(LIMITS)
    scheduler.add(sequence(1, 3, 20))
    scheduler.admit()
    first = scheduler.schedule()
    assert first is not None
    assert first.num_tokens == (3,)
    advance(first, scheduler)
    scheduler.add(sequence(2, 50, 3))
    scheduler.admit()
    for expected in (9, 9, 9, 9, 9, 5):
        step = scheduler.schedule()
        assert step is not None
        assert step.num_tokens == (1, expected)
        advance(step, scheduler)


@given(st.lists(st.integers(1, 9), max_size=40), st.randoms(use_true_random=False))
def test_pages_return_to_where_they_came_from(sizes: list[int], random: object) -> None:
    pool = PagePool(64)
    held = []
    for size in sizes:
        if size <= pool.num_free:
            held.append(pool.allocate(size))
            assert 0 not in held[-1]
        elif held:
            pool.release(held.pop(random.randrange(len(held))))  # type: ignore[attr-defined]
        pool.check_integrity(held)
    for pages in held:
        pool.release(pages)
    pool.check_integrity([])
    assert pool.num_free == 64


def test_misuse_of_pages_is_loud() -> None:
    pool = PagePool(4)
    with pytest.raises(RuntimeError, match="5 pages wanted, 4 free"):
        pool.allocate(5)
    pages = pool.allocate(2)
    with pytest.raises(RuntimeError, match="differ"):
        pool.check_integrity([])
    pool.release(pages)
    with pytest.raises(RuntimeError, match="nobody holds"):
        pool.release(pages)
    with pytest.raises(RuntimeError, match="differ"):
        pool.check_integrity([pages])
