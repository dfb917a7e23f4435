"""Scheduler and pages under random arrivals, forks, stops, cancels and preemptions.

Nothing leaks, no sequence starves, every step obeys its limits, and each sequence reads its own cache.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from neuron.device.jobs import SamplerSettings
from neuron.engine import scheduler as scheduler_module
from neuron.engine import states as states_module
from neuron.engine.pages import PagePool
from neuron.engine.plan import StepPlan, build_plan
from neuron.engine.prefix import extend_keys
from neuron.engine.scheduler import Limits, Scheduler, Step
from neuron.engine.sequence import Sequence, SequenceStatus
from neuron.layers import cache as layer_caches
from neuron.layers.cache import StateSlots, WindowTable

LIMITS = Limits(
    num_pages=24, page_tokens=4, context_tokens=64, max_sequences=4, step_tokens=24, mixed_step_tokens=10
)  # fmt: skip
WINDOW = WindowTable(window_tokens=10, num_pages=18, page_bytes=0)
CHUNK = 8
"""Tokens between places where states agree to the bit."""
STATES = StateSlots(num_slots=6, slot_bytes=0, checkpoint_pages=6)
POWERS = np.cumprod(np.full(4096, 0x9E3779B97F4A7C15, np.uint64), dtype=np.uint64)


def sequence(
    number: int,
    num_prompt: int,
    max_tokens: int,
    *,
    family: int = -1,
    principal: str = "",
    priority: int = 0,
    breakpoints: Iterable[int] = (),
) -> Sequence:
    """Return a sequence with its family's common prefix; without a family, with a prefix of its own.

    It has those of ``breakpoints`` that are in its prompt.
    """
    prompt = np.arange(num_prompt, dtype=np.int32) + 1000 * (number + 10 if family < 0 else family)
    own = tuple(sorted(at for at in breakpoints if at <= num_prompt))
    settings = SamplerSettings()
    return Sequence(number, prompt, max_tokens, frozenset(), settings, principal, priority, breakpoints=own)


def contents(s: Sequence, stop: int) -> np.ndarray:
    """Return the cache contents of the first ``stop`` tokens: a number each, a hash of all before it."""
    return np.cumsum((s.tokens[:stop].astype(np.uint64) + np.uint64(1)) * POWERS[:stop], dtype=np.uint64)


@pytest.fixture(autouse=True, scope="module")
def few_tokens_ahead() -> Iterator[None]:
    """Have small windowed tables suffice, and checkpoints fit into short prompts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_caches, "AHEAD_TOKENS", 4)
        patch.setattr(states_module, "CHUNK_TOKENS", CHUNK)
        patch.setattr(states_module, "LEAST_PAGES", 1)
        yield


class Cache:
    """Cache of such numbers for each table, and states that are the last of them, used by plans like a model's."""

    def __init__(self, limits: Limits) -> None:
        pages = (limits.num_pages, *(window.num_pages for window in limits.windows))
        self.caches = [np.zeros((num_pages + 1) * limits.page_tokens, np.uint64) for num_pages in pages]
        self.windows = (limits.context_tokens, *(window.window_tokens for window in limits.windows))
        junk = np.random.default_rng(1).integers(1, 1 << 63, 99, np.uint64)
        self.states = junk[: 1 + limits.states.num_slots] if limits.states is not None else junk[:0]

    def run(self, step: Step, scheduler: Scheduler, *, reads: bool = True) -> None:
        page_tokens = scheduler.limits.page_tokens
        plan = build_plan(step, scheduler.cache)
        if len(self.states):
            self.advance_states(step, plan)
        tables = list(zip(self.caches, self.windows, plan.page_tables, plan.slot_mappings, strict=True))
        for index, s in enumerate(step.sequences):
            rows = slice(plan.cu_seqlens[index], plan.cu_seqlens[index + 1])
            expected = contents(s, int(plan.context_lens[index]))
            for cache, _, _, slots in tables:
                assert (slots[rows] >= page_tokens).all(), "page 0 is written"
                cache[slots[rows]] = expected[plan.positions[rows]]
        for index, s in enumerate(step.sequences) if reads else ():
            length, first = int(plan.context_lens[index]), int(plan.positions[plan.cu_seqlens[index]])
            for cache, window, pages, _ in tables:
                seen = slice(max(0, first - window + 1), length)
                read = cache.reshape(-1, page_tokens)[pages[index]].reshape(-1)[seen]
                assert np.array_equal(read, contents(s, length)[seen]), f"sequence {s.number} reads another's cache"

    def advance_states(self, step: Step, plan: StepPlan) -> None:
        """Advance the state of each sequence, which must be of the tokens that it has computed."""
        sources, begun = plan.state_loads
        written = [*begun.tolist(), *plan.state_slots.tolist(), *plan.state_saves[1].tolist()]
        assert 0 not in written
        assert len(set(plan.state_slots.tolist())) == len(step.sequences)
        assert set(begun.tolist()) <= set(plan.state_slots.tolist())
        assert set(plan.state_saves[0].tolist()) <= set(plan.state_slots.tolist())
        assert not set(plan.state_saves[1].tolist()) & {*plan.state_slots.tolist(), *sources.tolist()}
        self.states[begun] = np.where(sources == 0, 0, self.states[sources])
        for index, s in enumerate(step.sequences):
            slot, length = plan.state_slots[index], int(plan.context_lens[index])
            before = contents(s, s.num_computed)[-1] if s.num_computed else 0
            assert self.states[slot] == before, f"the state of sequence {s.number} is of other tokens"
            self.states[slot] = contents(s, length)[-1]
        self.states[plan.state_saves[1]] = self.states[plan.state_saves[0]]


def check_step(step: Step, scheduler: Scheduler) -> None:
    """Assert the invariants of every step."""
    limits = scheduler.limits
    decoding = [s for s in scheduler.running.values() if s.decodes]
    assert set(step.sequences[: step.num_decodes]) == set(decoding)
    assert not step.num_drafting
    assert len(set(step.sequences)) == len(step.sequences) == len(step.num_tokens)
    lengths = [s.num_computed for s in step.sequences[: step.num_decodes]]
    assert lengths == sorted(lengths, reverse=True)
    budget = max(limits.mixed_step_tokens, len(decoding) + limits.page_tokens) if decoding else limits.step_tokens
    assert 0 < sum(step.num_tokens) <= budget
    prefilling = [s for s in scheduler.running.values() if s.prefills]
    assert list(step.sequences[step.num_decodes :]) == prefilling[: len(step.sequences) - step.num_decodes]
    if limits.states is not None:
        check_cuts(step, scheduler)
        return
    # The budget is used: a prompt is cut only where it ends.
    if sum(step.num_tokens) < budget and step.num_decodes < limits.mixed_step_tokens - limits.page_tokens:
        chunks = zip(step.sequences, step.num_tokens, strict=True)
        assert sum(count for s, count in chunks if s.prefills) == sum(s.num_fill - s.num_computed for s in prefilling)


def check_cuts(step: Step, scheduler: Scheduler) -> None:
    """Assert that prompts are cut at checkpoints, and at multiples of CHUNK where a budget has them."""
    last_of_step = step.sequences[-1]
    for s, count in zip(step.sequences, step.num_tokens, strict=True):
        end = s.num_computed + count
        if not s.prefills or end == s.num_fill:
            continue
        places = set()
        if scheduler.limits.prefix_cache:
            last = (s.num_fill - 1) // 4 * 4
            places = {min(at // 4 * 4, last) for at in (*s.breakpoints, *range(24, s.num_fill, 24))}
            places |= {last} if s.num_output else set()
        assert end in places or end % CHUNK == 0 or (s is last_of_step and end // CHUNK == s.num_computed // CHUNK)
        assert places.isdisjoint(range(s.num_computed + 1, end))


def check_plan(step: Step, scheduler: Scheduler) -> None:
    """Compare the arrays with a plain computation, token by token."""
    page_tokens = scheduler.limits.page_tokens
    plan = build_plan(step, scheduler.cache)
    row = 0
    sampled, slots, num_output = [], [], []
    for index, (s, count) in enumerate(zip(step.sequences, step.num_tokens, strict=True)):
        assert plan.cu_seqlens[index] == row
        assert plan.context_lens[index] == s.num_computed + count
        pages = plan.page_tables[0, index]
        needed = min(len(s.pages), len(pages))
        assert pages[:needed].tolist() == s.pages[:needed].tolist()
        assert not pages[len(s.pages) :].any()
        for position in range(s.num_computed, s.num_computed + count):
            assert plan.positions[row] == position
            assert plan.token_ids[row] == s.tokens[position]
            assert plan.slot_mappings[0, row] == s.pages[position // page_tokens] * page_tokens + position % page_tokens
            row += 1
        if s.num_computed + count == s.num_tokens:
            sampled.append(row - 1)
            slots.append(s.slot)
            num_output.append(s.num_output)
    assert plan.cu_seqlens[-1] == row == len(plan.token_ids)
    assert (plan.sampled.tolist(), plan.slots.tolist(), plan.num_output.tolist()) == (sampled, slots, num_output)
    assert not len(plan.hidden_rows)
    assert len(np.unique(plan.slot_mappings[0])) == row
    for field in dataclasses.fields(plan):
        value = getattr(plan, field.name)
        assert not isinstance(value, np.ndarray) or value.dtype == np.int32, field.name


def advance(step: Step, scheduler: Scheduler, stop_at: int = -1) -> list[int]:
    """Settle a step; return the sequences that ended. The token ``stop_at`` stops a sequence early."""
    ended = []
    scheduler.begin(step)
    for s, count in zip(step.sequences, step.num_tokens, strict=True):
        assert s.num_computed <= len(s.pages) * scheduler.limits.page_tokens
        num_sampled = s.num_awaited
        if num_sampled:
            # A function of sequence and position, so that a preempted sequence continues the same.
            token = (7 * s.number + 13 * s.num_tokens) % 101
            s.append(token)
        scheduler.settle(s, count, num_sampled)
        if num_sampled and (s.num_output == s.max_tokens or token == stop_at):
            scheduler.remove(s.number)
            ended.append(s.number)
    return ended


def pools(scheduler: Scheduler) -> list[PagePool]:
    cache = scheduler.cache
    return [cache.pool, *(part.pool for part in (*cache.windows, cache.states) if part is not None)]


class Arrivals(RuleBasedStateMachine):
    @initialize(
        prefix_cache=st.booleans(), windows=st.sampled_from([(), (WINDOW,)]),
        states=st.sampled_from([None, STATES, dataclasses.replace(STATES, num_slots=2)]),
    )  # fmt: skip
    def start(self, prefix_cache: bool, windows: tuple[WindowTable, ...], states: StateSlots | None) -> None:
        self.limits = dataclasses.replace(LIMITS, prefix_cache=prefix_cache, windows=windows, states=states)
        self.scheduler = Scheduler(self.limits)
        self.cache = Cache(self.limits)
        self.number = 0

    @rule(
        num_prompt=st.integers(1, 63), max_tokens=st.integers(1, 63), family=st.integers(-1, 2),
        principal=st.sampled_from("ab"), priority=st.integers(-1, 1), forks=st.integers(1, 3),
        breakpoints=st.sets(st.integers(1, 63), max_size=3),
    )  # fmt: skip
    def arrive(self, num_prompt: int, max_tokens: int, forks: int, **given: Any) -> None:
        for _ in range(forks):
            self.number += 1
            new = sequence(self.number, num_prompt, min(max_tokens, 64 - num_prompt), **given)
            self.scheduler.add(new)
            with pytest.raises(ValueError, match="exists already"):
                self.scheduler.add(new)

    @precondition(lambda self: self.scheduler.busy)
    @rule(stop_at=st.integers(-1, 100))
    def step(self, stop_at: int = -1) -> None:
        oldest = next(iter(self.scheduler.running.values()), None)
        self.scheduler.admit()
        step = self.scheduler.schedule()
        assert step is not None, "a sequence waits and none runs"
        assert oldest is None or oldest.status is SequenceStatus.RUNNING, "the oldest was preempted"
        check_step(step, self.scheduler)
        check_plan(step, self.scheduler)
        self.cache.run(step, self.scheduler)
        advance(step, self.scheduler, stop_at)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, self.number))
        known = number in self.scheduler.running or number in self.scheduler.waiting
        removed = self.scheduler.remove(number)
        assert (removed is not None) == known
        if removed is not None:
            assert removed.status is SequenceStatus.FINISHED
            assert not len(removed.pages)

    @invariant()
    def sound(self) -> None:
        self.scheduler.check_integrity()
        assert not any(s.prefills and not s.num_fill for s in self.scheduler.running.values())

    def teardown(self) -> None:
        steps = 0
        while self.scheduler.busy:
            self.step()
            steps += 1
            assert steps < 128 * (self.number + 1), "a sequence starves"
        self.scheduler.check_integrity()
        for pool in pools(self.scheduler):
            assert pool.num_free == pool.num_pages
            assert self.limits.prefix_cache or not pool.idle_keys()


Arrivals.TestCase.settings = settings(max_examples=50, stateful_step_count=50, deadline=None)
TestArrivals = Arrivals.TestCase


@pytest.mark.parametrize(("states", "count"), [(None, 3000), (dataclasses.replace(STATES, num_slots=40), 1000)])
def test_thousands_of_sequences_leave_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, states: StateSlots | None, count: int
) -> None:
    """Arrivals, forks, stops, cancels and preemptions at random, in a cache that is always too small."""
    monkeypatch.setattr(scheduler_module, "GROWTH_PAGES", 1)
    random = np.random.default_rng(11)
    limits = dataclasses.replace(
        LIMITS, num_pages=120, context_tokens=256, max_sequences=32, mixed_step_tokens=64, step_tokens=64,
        windows=(dataclasses.replace(WINDOW, num_pages=100),), states=states,
    )  # fmt: skip
    scheduler = Scheduler(limits)
    cache = Cache(limits)
    numbers = iter(range(count))
    finished = num_cached = 0
    for depth in range(100_000):
        for _ in range(int(random.integers(0, 4))):
            num_prompt, family = int(random.integers(1, 24)), int(random.integers(-1, 30))
            max_tokens = int(random.integers(1, 200 if random.random() < 0.2 else 16))
            for _ in range(int(random.integers(1, 4))):
                if (number := next(numbers, None)) is not None:
                    given = {"family": family, "principal": str(family % 3), "breakpoints": random.integers(1, 24, 2)}
                    scheduler.add(sequence(number, num_prompt, max_tokens, **given))
        if random.random() < 0.2 and scheduler.busy:
            candidates = [*scheduler.running, *scheduler.waiting]
            finished += scheduler.remove(candidates[int(random.integers(len(candidates)))]) is not None
        num_cached += sum(s.num_cached for s in scheduler.admit())
        step = scheduler.schedule()
        if step is None:
            if finished == count:
                break
            continue
        cache.run(step, scheduler, reads=depth % 10 == 0)
        finished += len(advance(step, scheduler, stop_at=50))
        if depth % 50 == 0:
            scheduler.check_integrity()
    assert finished == count
    scheduler.check_integrity()
    assert scheduler.cache.pool.num_free == 120
    assert num_cached > count, "the families' prefixes were not shared"
    assert scheduler.num_preemptions > count // 100, "the cache was not too small"


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


def run_until_idle(scheduler: Scheduler) -> None:
    while scheduler.busy:
        scheduler.admit()
        step = scheduler.schedule()
        assert step is not None
        advance(step, scheduler)


# ------------------------------------------------------------------ the prefix cache


def test_a_second_prompt_shares_the_full_pages_of_the_first() -> None:
    scheduler = Scheduler(LIMITS)
    scheduler.add(sequence(1, 22, 3, family=1))
    run_until_idle(scheduler)
    assert len(scheduler.cache.pool.idle_keys()) == 6, "24 tokens were computed: output counts too"
    # 22 tokens of the prompt are 5 full pages; a prompt of exactly 20 keeps one page to compute.
    for num_prompt, cached in ((22, 20), (60, 20), (20, 16), (4, 0), (3, 0)):
        second = sequence(100 + num_prompt, num_prompt, 1, family=1)
        scheduler.add(second)
        assert scheduler.admit() == [second]
        assert second.num_cached == second.num_computed == cached
        scheduler.check_integrity()
        scheduler.remove(second.number)


def test_the_switch_turns_sharing_off() -> None:
    scheduler = Scheduler(dataclasses.replace(LIMITS, prefix_cache=False))
    for number in (1, 2):
        one = sequence(number, 22, 3, family=1)
        scheduler.add(one)
        run_until_idle(scheduler)
        assert one.num_cached == 0
        assert not one.keys
    assert len(scheduler.cache.pool.idle_keys()) == 0


def test_choices_of_one_prompt_share_its_pages_and_it_is_computed_once() -> None:
    scheduler = Scheduler(LIMITS)
    choices = [sequence(number, 22, 4, family=1) for number in range(4)]
    stranger = sequence(9, 5, 4)
    for one in choices[:3]:
        scheduler.add(one)
    scheduler.add(stranger)
    # The others wait for the first; a sequence without a common prefix does not.
    assert scheduler.admit() == [choices[0], stranger]
    step = scheduler.schedule()
    assert step is not None
    advance(step, scheduler)
    assert scheduler.admit() == choices[1:3]
    assert [one.num_cached for one in choices[:3]] == [0, 20, 20]
    assert all(np.array_equal(one.pages[:5], choices[0].pages[:5]) for one in choices[1:3])
    assert len({int(one.pages[5]) for one in choices[:3]}) == 3, "the last, partial page is not shared"
    scheduler.check_integrity()


def test_a_sequence_that_awaits_a_prefix_computes_it_if_the_other_leaves() -> None:
    scheduler = Scheduler(LIMITS)
    first, second = (sequence(number, 30, 4, family=1) for number in (1, 2))
    scheduler.add(first)
    scheduler.add(second)
    assert scheduler.admit() == [first]
    step = scheduler.schedule()
    assert step is not None
    assert step.num_tokens == (24,)
    advance(step, scheduler)
    assert scheduler.admit() == [second], "6 pages are there, and the rest is too little to wait for"
    scheduler.remove(1)
    scheduler.remove(2)
    scheduler.add(third := sequence(3, 60, 4, family=2))
    scheduler.add(fourth := sequence(4, 60, 4, family=2))
    assert scheduler.admit() == [third]
    scheduler.remove(3)
    assert scheduler.admit() == [fourth]
    assert fourth.num_cached == 0
    scheduler.check_integrity()


def test_idle_pages_are_evicted_before_a_sequence_waits_oldest_first_and_last_pages_first() -> None:
    scheduler = Scheduler(LIMITS)
    for number, family in ((1, 1), (2, 2)):
        scheduler.add(sequence(number, 32, 1, family=family))
        run_until_idle(scheduler)
    assert len(scheduler.cache.pool.idle_keys()) == 16
    scheduler.add(hungry := sequence(3, 44, 1))
    assert scheduler.admit() == [hungry]
    run_until_idle(scheduler)
    # 8 pages were blank and 11 needed: the end of the first family's was evicted.
    keys = [[], []]
    for family in (1, 2):
        extend_keys(keys[family - 1], sequence(1, 32, 1, family=family).tokens, 8, 4)
    assert [len(scheduler.cache.pool.find(some)) for some in keys] == [5, 8]


# ------------------------------------------------------------------ preemption


def test_the_youngest_gives_its_pages_back_and_continues_from_the_cache() -> None:
    limits = dataclasses.replace(LIMITS, num_pages=14, max_sequences=2)
    scheduler = Scheduler(limits)
    cache = Cache(limits)
    old, young = sequence(1, 8, 44), sequence(2, 8, 44)
    scheduler.add(old)
    scheduler.add(young)
    order = []
    preempted = False
    while scheduler.busy:
        scheduler.admit()
        step = scheduler.schedule()
        assert step is not None
        if scheduler.num_preemptions and not preempted:
            preempted = True
            assert list(scheduler.waiting) == [2]
            assert young.num_computed == 0
            assert young.num_output > 0
        cache.run(step, scheduler)
        order += advance(step, scheduler)
    assert preempted
    assert order == [1, 2]
    assert young.num_cached == 0, "what it computed itself was not cached for the client"
    assert young.num_output == 44


def test_admission_takes_the_prompt_and_a_margin_not_the_whole_output() -> None:
    limits = dataclasses.replace(LIMITS, num_pages=16, max_sequences=4)
    scheduler = Scheduler(limits)
    for number in range(1, 4):
        scheduler.add(sequence(number, 4, 60))
    # 16 pages would hold one whole output of 60; with 1 + 4 pages each, three fit and a fourth would not.
    assert len(scheduler.admit()) == 3
    scheduler.add(sequence(4, 4, 60))
    assert not scheduler.admit()
    run_until_idle(scheduler)
    assert scheduler.num_preemptions > 0
    scheduler.check_integrity()


def test_slots_are_shared_out_among_principals() -> None:
    scheduler = Scheduler(dataclasses.replace(LIMITS, num_pages=400))
    for number in range(8):
        scheduler.add(sequence(number, 4, 4, principal="greedy"))
    assert [s.number for s in scheduler.admit()] == [0, 1, 2, 3]
    scheduler.add(sequence(20, 4, 4, principal="modest"))
    scheduler.add(sequence(21, 4, 4, principal="modest"))
    for number in (0, 1, 2):
        scheduler.remove(number)
    # One of the greedy still runs: the modest catch up, then arrival decides.
    assert [s.number for s in scheduler.admit()] == [20, 4, 21]


def test_a_higher_priority_waits_less() -> None:
    scheduler = Scheduler(dataclasses.replace(LIMITS, num_pages=400))
    for number in range(6):
        scheduler.add(sequence(number, 4, 4, principal=str(number)))
    scheduler.add(sequence(20, 4, 4, principal="urgent", priority=2))
    scheduler.add(sequence(21, 4, 4, principal="urgent", priority=2))
    scheduler.add(sequence(22, 4, 4, principal="later", priority=-1))
    assert [s.number for s in scheduler.admit()] == [20, 21, 0, 1]
    for number in (20, 21, 0, 1):
        scheduler.remove(number)
    assert [s.number for s in scheduler.admit()] == [2, 3, 4, 5]
    scheduler.remove(2)
    assert [s.number for s in scheduler.admit()] == [22]
