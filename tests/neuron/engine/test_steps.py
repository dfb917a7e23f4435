"""A model's steps on a fake device: every sequence gets its own tokens, whatever overlaps, is drafted or cancelled.

The device stores each token as a hash of all before it, and samples a function of sequence and position, so that any
mix-up shows. Its steps come out late, one behind the next. The file is long, as all tests share the device.
"""

import array
import dataclasses
import itertools
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from neuron.device.jobs import Pooling, SamplerSettings, SequenceEnd
from neuron.engine import scheduler as scheduler_module
from neuron.engine import states as states_module
from neuron.engine.executor import StepOutcome
from neuron.engine.model_engine import ModelEngine, StepOutput
from neuron.engine.multi_step import MULTI_STEP_S
from neuron.engine.plan import NO_COPIES, StepPlan
from neuron.engine.scheduler import Step
from neuron.engine.sequence import Sequence, SequenceStatus
from neuron.engine.speculation import Speculation
from neuron.engine.step_timer import StepTimer
from neuron.layers import cache as layer_caches
from neuron.layers.cache import StateSlots, WindowTable
from neuron.models.sizing import PAGE_TOKENS, MemoryPlan
from neuron.triton_kernels.sampling import NON_FINITE

WINDOW_TOKENS = 20
AHEAD_TOKENS = 8
PLAN = MemoryPlan(
    dtype="float32", context_tokens=256, max_sequences=4, sampled_rows=7, num_pages=20, step_tokens=48,
    mixed_step_tokens=24, weights_bytes=0, kv_cache_bytes=0, workspace_bytes=0,
    window_tables=(WindowTable(WINDOW_TOKENS, 19, 0),),
)  # fmt: skip
STATES = StateSlots(num_slots=6, slot_bytes=0, checkpoint_pages=4)
EOS = 7
FAULTS = ("the step went wrong", "the step did not start")
FACTOR = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1


def next_token(seed: int, state: int) -> int:
    """Return the token sampled after a text: often a repetition, so that drafts are accepted now and then."""
    return (seed * 31 + (state >> 40)) % 97 if state % 3 else 8 + state % 2


def state_after(state: int, token: int) -> int:
    return ((state ^ (token + 1)) * FACTOR) & MASK


class Sampler:
    """Has each slot's seed, refuses drafts for every fifth, and does not draw plainly for every seventh."""

    def __init__(self) -> None:
        self.seeds: dict[int, int] = {}

    def admit(self, slot: int, sampler: SamplerSettings, *_: object) -> None:
        self.seeds[slot] = sampler.seed

    def can_verify_drafts(self, slot: int) -> bool:
        return self.seeds[slot] % 5 > 0

    def draws_plainly(self, slots: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.array([self.seeds[slot] % 7 > 0 for slot in slots.tolist()])


class Late:
    """A step in flight."""

    def __init__(self, device: "Device", outcome: StepOutcome) -> None:
        self.device, self.outcome = device, outcome
        device.num_under_way += 1
        assert device.num_under_way <= 2

    def wait(self) -> StepOutcome:
        self.device.num_under_way -= 1
        if self.device.faults.pop("wait", None):
            raise ValueError("the step went wrong")
        return self.outcome


@pytest.fixture(autouse=True, scope="module")
def few_tokens_ahead() -> Iterator[None]:
    """Have a small windowed table suffice for several sequences, and checkpoints fit into short prompts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_caches, "AHEAD_TOKENS", AHEAD_TOKENS)
        patch.setattr(states_module, "CHUNK_TOKENS", PAGE_TOKENS)
        yield


class Device:
    """Executes plans on a number for each KV slot, and for each state slot if ``has_states``."""

    def __init__(self, overlaps: bool, repeats: bool = False, has_states: bool = False) -> None:
        self.overlaps = overlaps
        self.max_steps = 1 + AHEAD_TOKENS if repeats and not overlaps else 1
        self.sampler = Sampler()
        self.num_steps: list[int] = []
        self.message_after: int | None = None
        """Number of the step after which a message of the daemon arrives."""
        self.caches = [[0] * ((num_pages + 1) * PAGE_TOKENS) for num_pages in PLAN.cache_sizes[:-1]]
        self.states = [0, *range(7, 7 + STATES.num_slots)] if has_states else []
        self.drafted: list[list[int]] = [[] for _ in self.states]
        """Draft tokens of the last step with each state."""
        self.last_ids: list[int] = []
        self.num_under_way = 0
        self.faults: dict[str, bool] = {}
        self.num_rows: list[int] = []

    def launch(self, plan: StepPlan) -> Late:
        if self.faults.pop("launch", None):
            raise ValueError("the step did not start")
        fault_in = plan.num_steps - 1 if self.faults.pop("nan", None) else -1
        outcome = self.run_step(plan, fault_in == 0)
        later = []
        while len(later) + 1 < plan.num_steps:
            assert plan.num_steps <= self.max_steps
            assert self.sampler.draws_plainly(plan.slots).all()
            assert len(plan.sampled) == len(plan.context_lens) == len(plan.token_ids)
            ids = np.array(later[-1] if later else outcome.ids, np.int32)
            if not outcome.finite.all() or np.isin(ids, plan.stops).any() or len(later) + 1 == self.message_after:
                break
            at = plan.positions + len(later) + 1
            slots = plan.page_tables[:, np.arange(len(at)), at // PAGE_TOKENS] * PAGE_TOKENS + at % PAGE_TOKENS
            plan_now = dataclasses.replace(
                plan, token_ids=ids, positions=at, slot_mappings=slots, context_lens=at + 1, state_loads=NO_COPIES
            )
            found = self.run_step(plan_now, len(later) + 1 == fault_in)
            later.append(found.ids)
            outcome = dataclasses.replace(outcome, finite=found.finite)
        self.num_steps.append(1 + len(later))
        if later:
            outcome = dataclasses.replace(outcome, later=np.array(later, np.int32))
        return Late(self, outcome)

    def run_step(self, plan: StepPlan, fault: bool) -> StepOutcome:
        self.num_rows.append(len(plan.token_ids))
        assert len(plan.sampled) <= PLAN.sampled_rows
        ids: list[int] = []
        hidden = np.zeros((len(plan.hidden_rows), 3), np.float32)
        slots = dict(zip(plan.sampled.tolist(), plan.slots.tolist(), strict=True))
        for source, to in plan.state_loads.T.tolist():
            self.states[to] = self.states[source] if source else 0
        for index in range(len(plan.context_lens)):
            first, end = plan.cu_seqlens[index], plan.cu_seqlens[index + 1]
            own = plan.state_slots[index] if self.states else 0
            assert bool(own) == bool(self.states), "a sequence has no state, or that of padding"
            assert plan.num_steps == 1 or not len(plan.replays)
            drafts = plan.num_decodes <= index < plan.num_decodes + plan.num_drafting
            moved = self.states[own] if self.states else 0
            for token in self.drafted[own][: plan.replays[index]] if len(plan.replays) else ():
                moved = state_after(moved ^ 1, token) ^ 1
            if self.states:
                self.drafted[own] = []
            for row in range(first, end):
                token, position = int(plan.token_ids[row]), int(plan.positions[row])
                if token < 0:
                    assert self.overlaps, "a token that is not there"
                    token = self.last_ids[-1 - token]
                states = []
                for cache, pages, slots_of in zip(self.caches, plan.page_tables, plan.slot_mappings, strict=True):
                    slot = slot_of(pages[index], position)
                    assert slot == slots_of[row]
                    assert slot >= PAGE_TOKENS, "page 0 is written"
                    before = cache[slot_of(pages[index], position - 1)] if position else 1
                    cache[slot] = state_after(before, token)
                    seen = range(max(0, position - WINDOW_TOKENS + 1), position + 1)
                    states.append([cache[slot_of(pages[index], at)] for at in seen])
                assert states[0] == states[1], "the windowed table lacks what a token sees"
                state = states[0][-1]
                if self.states:
                    # Less the value before the first token, so that a sequence begins with 0.
                    moved = state_after(moved ^ 1, token) ^ 1
                    assert moved ^ 1 == state, "the state is of other tokens"
                    if drafts and row > first:
                        self.drafted[own].append(token)
                    else:
                        self.states[own] = moved
                if row in slots:
                    ids.append(next_token(self.sampler.seeds[slots[row]], state))
                if row in plan.hidden_rows:
                    at = plan.hidden_rows.tolist().index(row)
                    hidden[at] = (1.0, state % 1000, state // 1000 % 1000)
        for source, to in plan.state_saves.T.tolist():
            self.states[to] = self.states[source]
        finite = np.ones(len(plan.context_lens), np.bool_)
        if fault:
            finite[0] = False
            if len(ids):
                ids[0] = NON_FINITE if 0 in plan.sampled else ids[0]
        self.last_ids = [max(0, token) for token in ids]
        return StepOutcome(np.array(ids, np.int32), finite, hidden, {})

    def clear(self, tables: tuple[np.ndarray[Any, Any], ...]) -> None:
        assert len(tables) == len(self.caches) + bool(self.states)
        for slot in tables[-1].tolist() if self.states else ():
            self.states[slot] = 0
        for cache, pages in zip(self.caches, tables, strict=False):
            for page in pages.tolist():
                cache[page * PAGE_TOKENS : (page + 1) * PAGE_TOKENS] = [0] * PAGE_TOKENS


def slot_of(pages: np.ndarray[Any, Any], position: int) -> int:
    return int(pages[position // PAGE_TOKENS]) * PAGE_TOKENS + position % PAGE_TOKENS


def expected_output(prompt: list[int], seed: int, max_tokens: int) -> tuple[list[int], SequenceEnd]:
    state = 1
    for token in prompt:
        state = state_after(state, token)
    found: list[int] = []
    while len(found) < max_tokens:
        token = next_token(seed, state)
        if token == EOS:
            return found, SequenceEnd.STOP
        found.append(token)
        state = state_after(state, token)
    return found, SequenceEnd.LENGTH


def expected_embedding(prompt: list[int], pooling: Pooling) -> np.ndarray[Any, Any]:
    state, rows = 1, []
    for token in prompt:
        state = state_after(state, token)
        rows.append((1.0, state % 1000, state // 1000 % 1000))
    vector = np.array(rows[-1] if pooling is Pooling.LAST else np.sum(rows, 0), np.float64)
    return vector / np.linalg.norm(vector)


class RandomDrafter:
    """Drafts at random right and wrong tokens, at no cost."""

    executors = ()

    def __init__(self, machine: "Steps") -> None:
        self.machine = machine

    def prepare(self, step: Step, plan: StepPlan) -> StepPlan:
        return plan

    def follow(self, step: Step) -> None:
        pass

    def available(self, sequences: list[Sequence], most: int) -> list[int]:
        return [most] * len(sequences)

    def cost_s(self, num_sequences: int, depth: int) -> float:
        return 0.0

    def propose(self, sequences: list[Sequence], counts: list[int]) -> list[np.ndarray[Any, Any]]:
        found = []
        for s, count in zip(sequences, counts, strict=True):
            known = [int(token) for token in s.tokens[: s.num_tokens]]
            right, _ = expected_output(known, s.sampler.seed, count)
            wrong_from = int(self.machine.random.integers(0, count + 2))
            drafts = [token if at < wrong_from else (token + 1) % 97 for at, token in enumerate(right)]
            found.append(np.array(drafts[: int(self.machine.random.integers(0, count + 1))], np.int32))
        return found


POOLINGS = st.sampled_from([None, None, None, None, *Pooling])


class Steps(RuleBasedStateMachine):
    @initialize(
        overlaps=st.booleans(), drafts=st.booleans(), prefix_cache=st.booleans(), seed=st.integers(0, 99),
        steps=st.integers(1, 9), has_states=st.booleans(),
    )  # fmt: skip
    def start(
        self, overlaps: bool, drafts: bool, prefix_cache: bool, seed: int, steps: int, has_states: bool = False
    ) -> None:
        self.random = np.random.default_rng(seed)
        self.device = Device(overlaps, steps > 1, has_states)
        plan = dataclasses.replace(PLAN, states=STATES if has_states else None)
        # A call takes one tick however many steps it has, so multi-step decodes get longer from call to call.
        clock = itertools.count(step=MULTI_STEP_S / steps)
        self.model = ModelEngine(
            "m", None, plan, self.device, pathlib.Path(),  # type: ignore[arg-type]
            prefix_cache=prefix_cache, speculates=False, clock=lambda: next(clock),
        )  # fmt: skip
        if drafts:
            step_timer = StepTimer(PAGE_TOKENS, PLAN.mixed_step_tokens)
            step_timer.record(1, 0, 1.0)
            self.model.speculation = Speculation(RandomDrafter(self), step_timer)
        self.number = 0
        self.asked: dict[int, Sequence] = {}
        self.got: dict[int, list[int]] = {}
        self.num_finished = self.num_failed = 0

    @rule(size=st.integers(1, 90), max_tokens=st.integers(1, 160), family=st.integers(0, 2), pooling=POOLINGS)
    def arrive(self, size: int, max_tokens: int, family: int, pooling: Pooling | None) -> None:
        self.number += 1
        prompt = (np.arange(size, dtype=np.int32) * (family + 1)) % 23
        s = Sequence(
            self.number, prompt, 1 if pooling else max_tokens, frozenset({EOS}), SamplerSettings(seed=self.number),
            pooling=pooling,
        )  # fmt: skip
        self.asked[s.number], self.got[s.number] = s, []
        self.model.scheduler.add(s)

    @precondition(lambda self: self.model.busy)
    @rule(fault=st.sampled_from([None] * 12 + ["nan", "wait", "launch"]))
    def step(self, fault: str | None = None) -> None:
        if fault is not None:
            self.device.faults[fault] = True
        self.take(self.model.step())
        self.model.scheduler.check_integrity()

    @rule(after=st.sampled_from([None, None, 1, 2, 4]))
    def interrupt(self, after: int | None) -> None:
        self.device.message_after = after

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.asked:
            number = data.draw(st.sampled_from(sorted(self.asked)))
            self.leave(number)

    def leave(self, number: int) -> None:
        assert self.model.scheduler.remove(number) is not None
        self.check_beginning(number)
        del self.asked[number]

    def check_beginning(self, number: int) -> None:
        s, got = self.asked[number], self.got[number]
        expected, _ = expected_output(s.tokens[: s.num_prompt].tolist(), s.sampler.seed, s.max_tokens)
        assert got == expected[: len(got)]

    def take(self, output: StepOutput) -> None:
        for row in output.rows:
            s = self.asked[row.sequence]
            assert s.pooling is None
            assert (row.prompt_cached is None) == bool(self.got[row.sequence])
            self.got[row.sequence] += array.array("i", row.ids)
            self.check_beginning(row.sequence)
            if row.end is not None:
                prompt = s.tokens[: s.num_prompt].tolist()
                assert (self.got[row.sequence], row.end) == expected_output(prompt, s.sampler.seed, s.max_tokens)
                self.finish(row.sequence)
        for embedding in output.embeddings:
            s = self.asked[embedding.sequence]
            assert s.pooling is not None
            expected = expected_embedding(s.tokens[: s.num_prompt].tolist(), s.pooling)
            np.testing.assert_allclose(np.frombuffer(embedding.vector, np.float32), expected, rtol=1e-5)
            self.finish(embedding.sequence)
        for number, error in output.failures:
            assert error.code == "non_finite_logits" or error.message.endswith(FAULTS), error.message
            assert self.asked.pop(number).status is SequenceStatus.FINISHED
            self.num_failed += 1

    def finish(self, number: int) -> None:
        assert self.asked.pop(number).status is SequenceStatus.FINISHED
        self.num_finished += 1

    def teardown(self) -> None:
        self.device.faults.clear()
        steps = 0
        while self.model.busy:
            self.step()
            steps += 1
            assert steps < 300 * (self.number + 1), "a sequence starves"
        assert not self.asked
        assert self.model.scheduler.cache.pool.num_free == PLAN.num_pages
        (window,) = self.model.scheduler.cache.windows
        assert window.pool.num_free == window.pool.num_pages
        if (states := self.model.scheduler.cache.states) is not None:
            assert states.pool.num_free == STATES.num_slots


Steps.TestCase.settings = settings(max_examples=80, stateful_step_count=60, deadline=None)
TestSteps = Steps.TestCase


@pytest.mark.parametrize(
    ("overlaps", "drafts", "has_states", "count"),
    [(False, True, False, 2000), (True, True, False, 2000), (False, False, True, 800), (True, True, True, 800)],
)
def test_thousands_of_sequences_in_a_cache_that_is_too_small(
    overlaps: bool, drafts: bool, has_states: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Preempt, draft, decode multi-step, cancel and fault at random: every sequence gets its own tokens or an error."""
    monkeypatch.setattr(scheduler_module, "GROWTH_PAGES", 0)
    machine = Steps()
    machine.start(overlaps, drafts, True, 5, 4, has_states)
    random = machine.random
    while machine.number < count or machine.model.busy:
        for _ in range(int(random.integers(0, 3)) if machine.number < count else 0):
            pooling = Pooling.MEAN if random.random() < 0.1 else None
            machine.arrive(
                int(random.integers(1, 60)), int(random.integers(1, 120)), int(random.integers(0, 9)), pooling
            )
        if machine.asked and random.random() < 0.1:
            machine.leave(int(random.choice(sorted(machine.asked))))
        machine.interrupt(int(random.integers(1, 5)) if random.random() < 0.1 else None)
        if random.random() < 0.01:
            machine.device.faults[str(random.choice(["nan", "wait", "launch"]))] = True
        if machine.model.busy:
            machine.take(machine.model.step())
    machine.teardown()
    assert machine.model.scheduler.num_preemptions > count // 80
    if drafts:
        assert machine.model.speculation.num_accepted > 200
    assert (max(machine.device.num_steps) > 1) == (not overlaps)
    assert machine.num_finished > count // 4
    assert machine.num_failed > count // 100


def driver_of(overlaps: bool, steps: int = 1) -> Steps:
    machine = Steps()
    machine.start(overlaps, False, True, 0, steps)
    return machine


def test_a_step_is_launched_before_the_result_of_the_last() -> None:
    machine = driver_of(overlaps=True)
    machine.arrive(20, 40, 0, None)
    assert not machine.model.step().rows, "the prompt is in flight"
    assert machine.device.num_under_way == 1
    rows = machine.model.step().rows
    assert len(rows) == 1, "the prompt's token, while the step that reads it runs"
    assert machine.device.num_under_way == 1
    machine.take(StepOutput(rows))
    machine.teardown()


def test_a_stop_costs_one_step_for_nothing_and_a_limit_none() -> None:
    ends = set()
    for number in range(1, 20):
        machine = driver_of(overlaps=True)
        machine.number = number
        machine.arrive(20, 40, 0, None)
        _, end = expected_output((np.arange(20) % 23).tolist(), number + 1, 40)
        machine.teardown()
        ends.add(end)
        # Each token but the last is computed; the stop is known when the step behind it is in flight.
        late = 2 if end is SequenceEnd.STOP else 0
        assert len(machine.device.num_rows) == len(machine.got[number + 1]) + late
    assert ends == {SequenceEnd.STOP, SequenceEnd.LENGTH}


def test_without_overlap_a_token_comes_with_its_step() -> None:
    machine = driver_of(overlaps=False)
    machine.arrive(20, 5, 0, None)
    assert len(machine.model.step().rows) == 1
    assert machine.device.num_under_way == 0


def test_a_cancel_in_mid_flight_frees_everything_at_once() -> None:
    machine = driver_of(overlaps=True)
    machine.arrive(20, 40, 0, None)
    machine.model.step()
    machine.model.step()
    machine.model.scheduler.remove(1)
    machine.model.scheduler.check_integrity()
    assert machine.model.busy, "the step is still to be waited for"
    assert not machine.model.step().rows
    assert not machine.model.busy


# ------------------------------------------------------------------ multi-step decode


def test_multi_step_brings_several_tokens_and_the_same_ones() -> None:
    machine = driver_of(overlaps=False, steps=4)
    machine.arrive(20, 40, 0, None)
    machine.take(machine.model.step())
    machine.take(machine.model.step())
    assert machine.device.num_steps == [1, 1], "the time of a step is not known yet"
    machine.take(machine.model.step())
    assert machine.device.num_steps[2] == 4
    assert len(machine.got[1]) == 6
    machine.teardown()


def test_multi_step_ends_with_the_first_sequence_that_ends() -> None:
    longest = 0
    for number in range(1, 30):
        machine = driver_of(overlaps=False, steps=8)
        machine.number = number
        machine.arrive(20, 33, 0, None)
        machine.arrive(31, 47, 1, None)
        alone = {n: len(expected_output(s.tokens[: s.num_prompt].tolist(), n, s.max_tokens)[0]) + 1
                 for n, s in machine.asked.items()}  # fmt: skip
        machine.teardown()
        assert machine.num_finished == 2
        longest = max(longest, *machine.device.num_steps)
        # The first token of each comes of its prompt, and each row after that brings one, or an end.
        decoded = sum(machine.device.num_rows) - 51
        assert decoded <= sum(alone.values()), "steps behind an end"
    assert longest > 8


def test_a_message_ends_multi_step() -> None:
    machine = driver_of(overlaps=False, steps=8)
    machine.arrive(20, 40, 0, None)
    machine.interrupt(2)
    machine.teardown()
    assert max(machine.device.num_steps) == 2


def test_no_multi_step_for_a_row_that_needs_the_sampler_or_on_a_shared_device() -> None:
    machine = driver_of(overlaps=False, steps=8)
    machine.number = 6
    machine.arrive(20, 40, 0, None)
    machine.teardown()
    assert set(machine.device.num_steps) == {1}
    machine = driver_of(overlaps=False, steps=8)
    machine.arrive(20, 40, 0, None)
    while machine.model.busy:
        machine.take(machine.model.step(alone=False))
    assert set(machine.device.num_steps) == {1}


def test_a_fault_in_mid_multi_step_fails_its_sequence_alone_and_leaves_no_trace() -> None:
    machine = driver_of(overlaps=False, steps=8)
    machine.arrive(20, 60, 0, None)
    machine.arrive(25, 60, 1, None)
    for _ in range(3):
        machine.take(machine.model.step())
    assert len(machine.asked) == 2
    failing = max(machine.asked.values(), key=lambda s: s.num_computed)
    sound = set(failing.pages[: failing.num_settled // PAGE_TOKENS].tolist())
    machine.device.faults["nan"] = True
    machine.take(machine.model.step())
    assert machine.device.num_steps[-1] > 2
    assert machine.num_failed == 1
    (left,) = machine.asked
    kept = set(machine.model.scheduler.running[left].pages.tolist())
    written = {slot // PAGE_TOKENS for slot, state in enumerate(machine.device.caches[0]) if state}
    assert written - kept == sound
    machine.teardown()
    assert machine.num_finished == 1
