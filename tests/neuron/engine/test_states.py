"""State slots and checkpoints: where prompts are cut, what resumes from where, and what makes room for what."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from cortex.wire.errors import InvalidRequestError
from cortex.wire.node import ModelSpec
from neuron.device.jobs import Pooling, SamplerSettings
from neuron.engine import states as states_module
from neuron.engine.pages import PagePool
from neuron.engine.plan import StepPlan, build_plan
from neuron.engine.scheduler import Limits, Scheduler
from neuron.engine.sequence import Sequence
from neuron.engine.states import checkpoint_places, retention
from neuron.layers.cache import MAX_DRAFTS, SequenceState, StateSlots, StateTensor
from neuron.models import sizing
from neuron.models.config import read_config
from neuron.models.errors import DoesNotFitError
from neuron.models.model import ModelConfig
from neuron.models.sizing import PAGE_TOKENS, least_bytes, plan_memory, with_sizes

STATES = StateSlots(num_slots=12, slot_bytes=0, checkpoint_pages=16)
LIMITS = Limits(
    num_pages=400, page_tokens=16, context_tokens=2048, max_sequences=4, step_tokens=512, mixed_step_tokens=100,
    states=STATES,
)  # fmt: skip


def sequence(
    number: int,
    num_prompt: int,
    max_tokens: int = 1,
    *,
    differs_at: int = 1 << 20,
    breakpoints: tuple[int, ...] = (),
) -> Sequence:
    """Return a sequence whose prompt differs from the others' from a token on."""
    prompt = np.arange(num_prompt, dtype=np.int32)
    prompt[differs_at:] += 10_000 * number
    return Sequence(number, prompt, max_tokens, frozenset(), SamplerSettings(), breakpoints=breakpoints)


def cached(scheduler: Scheduler, s: Sequence) -> int:
    """Return how many tokens of a sequence would be found, without running it."""
    return 16 * len(scheduler.cache.find(scheduler._sharable_keys(s)))


def pool(scheduler: Scheduler) -> PagePool:
    assert scheduler.cache.states is not None
    return scheduler.cache.states.pool


def step(scheduler: Scheduler, *, settles: bool = True) -> StepPlan:
    """Run a step; return its plan."""
    scheduler.admit()
    planned = scheduler.schedule()
    assert planned is not None
    plan = build_plan(planned, scheduler.cache)
    scheduler.begin(planned)
    for s, count in zip(planned.sequences, planned.num_tokens, strict=True) if settles else ():
        num_sampled = s.num_awaited
        if num_sampled:
            s.append(s.num_tokens % 97)
        scheduler.settle(s, count, num_sampled)
        if num_sampled and s.num_output == s.max_tokens:
            scheduler.remove(s.number)
    scheduler.check_integrity()
    return plan


def run(scheduler: Scheduler, *sequences: Sequence) -> list[int]:
    """Run sequences to their ends; return the number of prompt tokens of each step."""
    for s in sequences:
        scheduler.add(s)
    found = []
    while scheduler.busy:
        plan = step(scheduler)
        found.append(len(plan.token_ids) - plan.num_decodes)
    return found


def test_a_prompt_ends_steps_where_checkpoints_are_due_and_the_next_resumes_from_the_last() -> None:
    scheduler = Scheduler(LIMITS)
    # At 256 and 512, at most 16 pages apart, and at 688, behind the last page before the last token.
    assert run(scheduler, sequence(1, 700)) == [256, 256, 176, 12]
    assert len(pool(scheduler).idle_keys()) == 3
    for number, (num_prompt, differs_at, cached) in enumerate(
        [(700, 1 << 20, 688), (900, 1 << 20, 688), (900, 687, 512), (688, 1 << 20, 512), (255, 1 << 20, 0)], 2
    ):
        s = sequence(number, num_prompt, differs_at=differs_at)
        scheduler.add(s)
        plan = step(scheduler)
        assert s.num_cached == cached
        ((source,), (to,)) = plan.state_loads
        assert bool(source) == bool(cached)
        assert to == plan.state_slots[0]
        while scheduler.busy:
            assert not step(scheduler).state_loads.size
    assert run(scheduler, sequence(20, 64)) == [64], "a checkpoint behind 48 tokens would cost more than it saves"


def test_chunks_end_at_multiples_of_64_where_a_budget_comes_to_one() -> None:
    """So that a state is the same to the bit, whether its prefix was cached or not."""
    scheduler = Scheduler(dataclasses.replace(LIMITS, prefix_cache=False))
    scheduler.add(sequence(1, 3, 40))
    step(scheduler)
    scheduler.add(sequence(2, 500))
    cuts = []
    while 2 in scheduler.running or 2 in scheduler.waiting:
        cuts.append(len(step(scheduler).token_ids) - 1)
    assert cuts == [64] * 7 + [52]
    assert not pool(scheduler).idle_keys()


def test_what_is_not_shared_has_no_checkpoints() -> None:
    scheduler = Scheduler(LIMITS)
    mean, scored = sequence(1, 300), sequence(2, 300)
    mean.pooling, scored.scores_prompt = Pooling.MEAN, True
    scheduler.add(mean)
    scheduler.add(scored)
    while scheduler.running or scheduler.waiting:
        plan = step(scheduler)
        assert not plan.state_saves.size
        if mean.num_settled == 300:
            scheduler.remove(1)
    assert not pool(scheduler).idle_keys()


def test_a_checkpoint_is_found_once_its_tokens_are_settled() -> None:
    scheduler = Scheduler(LIMITS)
    first = sequence(1, 300, 3)
    scheduler.add(first)
    plan = step(scheduler, settles=False)
    ((own,), (checkpoint,)) = plan.state_saves
    assert own == plan.state_slots[0] != checkpoint
    assert scheduler.cache.unsettled(first)[-1].tolist() == [own, checkpoint], "both are cleared after a NaN"
    assert not pool(scheduler).idle_keys()
    scheduler.remove(1)
    scheduler.check_integrity()
    assert pool(scheduler).num_free == STATES.num_slots, "a cancelled sequence leaves nothing to be found"
    assert not pool(scheduler).idle_keys()
    run(scheduler, second := sequence(2, 300))
    assert second.num_cached == 0


def test_choices_of_one_prompt_wait_for_its_checkpoint_and_share_it() -> None:
    scheduler = Scheduler(LIMITS)
    choices = [sequence(number, 700, 4) for number in range(3)]
    for choice in choices:
        scheduler.add(choice)
    # Its pages are settled earlier, but the others can begin only behind its last checkpoint.
    for _ in range(3):
        assert step(scheduler).context_lens.shape == (1,)
    plan = step(scheduler)
    assert [choice.num_cached for choice in choices] == [0, 688, 688]
    sources, begun = plan.state_loads
    assert sources[0] == sources[1] > 0
    assert len(set(plan.state_slots.tolist())) == 3
    assert set(begun.tolist()) < set(plan.state_slots.tolist())
    assert len(pool(scheduler).idle_keys()) == 3, "a source is held until its copy is launched"


def test_a_source_is_not_evicted_before_it_is_copied() -> None:
    scheduler = Scheduler(dataclasses.replace(LIMITS, states=dataclasses.replace(STATES, num_slots=3)))
    run(scheduler, sequence(1, 100))
    second, third = sequence(2, 100), sequence(3, 300, differs_at=0)
    scheduler.add(second)
    scheduler.add(third)
    plan = step(scheduler)
    assert second.num_cached == 96
    # Of three slots two are of sequences, and the third is second's source: the checkpoint of third finds none.
    assert not plan.state_saves.size
    sources, begun = plan.state_loads
    assert sorted([sources[0], *begun]) == [1, 2, 3]
    assert plan.state_slots.tolist() == begun.tolist()
    assert sources[1] == 0


def test_the_least_recently_used_checkpoints_make_room() -> None:
    scheduler = Scheduler(dataclasses.replace(LIMITS, states=dataclasses.replace(STATES, num_slots=4)))
    for number in (1, 2, 3):
        run(scheduler, sequence(number, 100, differs_at=0))
    again = sequence(1, 100, differs_at=0)
    run(scheduler, again)
    assert again.num_cached == 96
    run(scheduler, *(sequence(number, 40, differs_at=0) for number in (7, 8)))
    cached = {}
    for number in (2, 1, 3):
        s = sequence(number, 100, differs_at=0)
        scheduler.add(s)
        scheduler.admit()
        cached[number] = s.num_cached
        scheduler.remove(number)
    assert cached == {2: 0, 1: 96, 3: 96}


def test_a_sequence_waits_for_a_state_slot_and_checkpoints_give_way_to_it() -> None:
    scheduler = Scheduler(dataclasses.replace(LIMITS, states=dataclasses.replace(STATES, num_slots=2)))
    run(scheduler, sequence(1, 100), sequence(2, 100, differs_at=0))
    for number in range(3, 7):
        scheduler.add(sequence(number, 100, 20, differs_at=0))
    step(scheduler)
    assert list(scheduler.running) == [3, 4]
    assert list(scheduler.waiting) == [5, 6]
    while scheduler.busy:
        step(scheduler)


def test_a_preempted_sequence_resumes_from_its_longest_checkpoint() -> None:
    limits = dataclasses.replace(LIMITS, num_pages=30, max_sequences=2)
    scheduler = Scheduler(limits)
    old, young = sequence(1, 100, 200), sequence(2, 150, 250, differs_at=0)
    scheduler.add(old)
    scheduler.add(young)
    resumed = []
    while scheduler.busy:
        before = scheduler.num_preemptions
        plan = step(scheduler)
        if scheduler.num_preemptions and scheduler.num_preemptions == before and plan.state_loads.size:
            resumed.append((int(plan.state_loads[0, 0]), int(plan.positions[plan.num_decodes])))
    assert scheduler.num_preemptions
    assert resumed
    assert all(source and start >= 144 for source, start in resumed)


def test_what_a_turn_computes_again_is_as_recent_as_the_turn() -> None:
    """Pages behind the checkpoint are found under the keys of older ones, which would be evicted first."""
    scheduler = Scheduler(dataclasses.replace(LIMITS, num_pages=30))
    run(scheduler, sequence(1, 180))
    run(scheduler, sequence(2, 160, differs_at=0))
    run(scheduler, second := sequence(3, 260))
    assert second.num_cached == 176
    run(scheduler, sequence(4, 190, differs_at=0))
    run(scheduler, third := sequence(5, 300))
    assert third.num_cached == 256
    scheduler.add(other := sequence(2, 160, differs_at=0))
    scheduler.admit()
    assert other.num_cached < 144


# ------------------------------------------------------------------ turns


@pytest.mark.parametrize(
    ("arguments", "places"),
    [
        ((0, 40, 16, (11, 30)), [11, 16, 30]),
        ((11, 50, 16, (11, 30)), [16, 30, 48]),
        ((0, 40, 100, (41,)), [40]),
        ((0, 40, 100, (12, 14, 15, 16)), [12, 16]),
        ((0, 40, 100, (3, 40)), [40]),
        ((38, 40, 100, (40,)), []),
        ((0, 0, 16, (9,)), []),
    ],
)
def test_places_of_checkpoints(arguments: tuple[int, int, int, tuple[int, ...]], places: list[int]) -> None:
    assert checkpoint_places(*arguments) == places


def test_a_turn_whose_reasoning_is_dropped_resumes_at_the_breakpoint_before_it() -> None:
    scheduler = Scheduler(LIMITS)
    assert run(scheduler, sequence(1, 450, breakpoints=(100, 430))) == [96, 160, 160, 34]
    # The next question parts at 430, a call's result behind the whole prompt; another conversation at 100.
    for number, parts, resumed in ((2, 430, 416), (3, 450, 416), (4, 100, 96), (5, 99, 96), (6, 95, 0)):
        assert cached(scheduler, sequence(number, 700, differs_at=parts)) == resumed


def test_a_fork_of_a_conversation_leaves_both_their_checkpoints() -> None:
    scheduler = Scheduler(LIMITS)
    run(scheduler, sequence(1, 300, breakpoints=(290,)))
    for number in (2, 3):
        fork = sequence(number, 600, differs_at=295, breakpoints=(590,))
        run(scheduler, fork)
        assert fork.num_cached == 288
    assert [cached(scheduler, sequence(number, 700, differs_at=295)) for number in (2, 3, 4)] == [576, 576, 288]


def test_pages_go_first_that_no_checkpoint_makes_useful() -> None:
    """However recent they are, and those of the others stay."""
    states = dataclasses.replace(STATES, num_slots=4)
    scheduler = Scheduler(dataclasses.replace(LIMITS, num_pages=36, states=states))
    for number, num_prompt in enumerate((200, 80, 200, 80, 60)):
        # The fourth prompt takes the slot of the second, and the fifth one's pages.
        run(scheduler, sequence(number, num_prompt, differs_at=0))
    left = [cached(scheduler, sequence(number, 250, differs_at=0)) for number in range(4)]
    assert left == [192, 0, 192, 64]


def test_a_checkpoint_goes_with_its_last_page() -> None:
    scheduler = Scheduler(dataclasses.replace(LIMITS, num_pages=30))
    run(scheduler, sequence(1, 300, breakpoints=(160, 290)))
    assert cached(scheduler, sequence(1, 400)) == 288
    assert len(pool(scheduler).idle_keys()) == 2
    run(scheduler, sequence(2, 200, differs_at=0))
    assert cached(scheduler, sequence(1, 400)) == 160
    assert cached(scheduler, sequence(2, 250, differs_at=0)) == 192
    assert len(pool(scheduler).idle_keys()) == 2


class Talk:
    """An agent's conversation: questions, each with a loop of calls whose reasoning the next question drops."""

    def __init__(self, number: int, random: np.random.Generator) -> None:
        self._random = random
        self._unused = (number + 1) * 100_000
        self.kept = list(range(150))
        self._ask()

    def _new(self, least: int, most: int) -> list[int]:
        first = self._unused
        self._unused += int(self._random.integers(least, most))
        return list(range(first, self._unused))

    def _ask(self) -> None:
        self.kept += self._new(20, 300)
        self._loop: list[int] = []
        self._num_calls = int(self._random.integers(0, 5))

    def request(self, number: int) -> Sequence:
        prompt = [*self.kept, *self._loop, 7, 8, 9]
        breakpoints = tuple(sorted({150, len(self.kept), len(prompt) - 3}))
        return Sequence(number, np.array(prompt, np.int32), 1, frozenset(), SamplerSettings(), breakpoints=breakpoints)

    def go_on(self) -> None:
        """Take an answer: a call and its result, or words and the next question."""
        if self._num_calls:
            self._num_calls -= 1
            self._loop += self._new(50, 400)
        else:
            self.kept += self._new(10, 30)
            self._ask()


def hit_share(num_slots: int, num_pages: int) -> float:
    """Return the share of tokens found in the cache, over 80 requests of six conversations in bursts."""
    random = np.random.default_rng(1)
    states = StateSlots(num_slots, slot_bytes=0, checkpoint_pages=32)
    scheduler = Scheduler(dataclasses.replace(LIMITS, num_pages=num_pages, context_tokens=16384, states=states))
    talks = [Talk(number, random) for number in range(6)]
    talk, num_cached, num_tokens = talks[0], 0, 0
    for number in range(80):
        if random.random() < 0.4:
            talk = talks[int(random.integers(6))]
        asked = talk.request(number)
        run(scheduler, asked)
        talk.go_on()
        num_cached += asked.num_cached
        num_tokens += asked.num_prompt
    return num_cached / num_tokens


@pytest.mark.parametrize(("num_slots", "num_pages"), [(8, 3000), (16, 3000), (24, 600)])
def test_busy_conversations_find_more_than_by_recency_alone(
    monkeypatch: pytest.MonkeyPatch, num_slots: int, num_pages: int
) -> None:
    found = hit_share(num_slots, num_pages)
    # Of equal ranks the least recently used is evicted.
    monkeypatch.setattr(states_module, "retention", lambda *_: 0.0)
    assert found > hit_share(num_slots, num_pages) + 0.02


def test_retention_is_recomputation_and_recency() -> None:
    assert retention(0, 10, is_expected=True) > retention(0, 10, is_expected=False) > retention(0, 1, is_expected=False)
    assert retention(5, 10, is_expected=True) > retention(0, 14, is_expected=True)


# ------------------------------------------------------------------ sizes


MIB = 1 << 20


@pytest.fixture
def config(tiny_llama: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    """A model of which one layer keeps a state of a MiB instead of keys and values."""
    found = read_config(tiny_llama)
    caches = ModelConfig.caches
    state = SequenceState((StateTensor((256, 1023), in_float32=True), StateTensor((4, 60))))

    def changed(self: ModelConfig, *shard: object) -> tuple[object, ...]:
        return tuple(state if index == 2 else cache for index, cache in enumerate(caches(self, *shard)))

    monkeypatch.setattr(ModelConfig, "caches", changed)
    return found


def test_states_are_counted_in_full_and_checkpoints_take_no_more_than_pages(config: ModelConfig) -> None:
    spec = ModelSpec("m", "x", dtype="float32", max_sequences=5)
    plan = plan_memory(config, spec, "cpu:0", 1 << 33, cpu_kernels=False)
    assert plan.states is not None
    # 256 x 1023 float32 are a multiple of 64 bytes, 4 x 60 are not.
    assert plan.states.slot_bytes == 256 * 1023 * 4 + 960
    page_bytes = PAGE_TOKENS * config.kv_bytes_per_token("float32")
    assert plan.kv_cache_bytes == plan.num_pages * page_bytes + (1 + plan.states.num_slots) * plan.states.slot_bytes
    assert plan.states.checkpoint_pages * PAGE_TOKENS % sizing.CPU_DEFAULTS.step_tokens == 0
    assert plan.states.slot_bytes <= plan.states.checkpoint_pages * page_bytes
    assert plan.states.num_slots == 5 + plan.num_pages // plan.states.checkpoint_pages
    without = plan_memory(
        config, ModelSpec("m", "x", dtype="float32", prefix_cache=False), "cpu:0", 1 << 33, cpu_kernels=False
    )
    assert without.states == StateSlots(16, plan.states.slot_bytes)
    least = with_sizes(plan, (*plan.cache_sizes[:-1], 3))
    assert least.states is not None
    assert least.states.num_slots == least.max_sequences == 3
    assert plan.kv_cache_bytes - least.kv_cache_bytes == (plan.states.num_slots - 3) * plan.states.slot_bytes


def test_a_small_cache_is_divided_among_running_states_checkpoints_and_pages(config: ModelConfig) -> None:
    spec = ModelSpec("m", "x", dtype="float32", max_sequences=64, kv_cache_bytes=24 * MIB)
    plan = plan_memory(config, spec, "cpu:0", 1 << 33, cpu_kernels=False)
    assert plan.states is not None
    assert 23 * MIB < plan.kv_cache_bytes <= 24 * MIB
    assert plan.context_tokens == 512
    num_checkpoints = plan.num_pages // plan.states.checkpoint_pages
    assert plan.states.num_slots - num_checkpoints == 6, "a quarter for those that run"
    assert num_checkpoints * plan.states.slot_bytes > 6 * MIB
    assert plan.max_sequences == plan.states.num_slots, "more could never run"
    least = least_bytes(config, spec, "cpu:0", cpu_kernels=False)
    assert plan_memory(config, spec, "cpu:0", least, cpu_kernels=False).total_bytes == least
    with pytest.raises(DoesNotFitError):
        plan_memory(config, spec, "cpu:0", least - 1, cpu_kernels=False)
    fewest = ModelSpec("m", "x", dtype="float32", context_tokens=256, kv_cache_bytes=MIB)
    with pytest.raises(InvalidRequestError, match="kv_cache_bytes is 1048576; 256 tokens need"):
        plan_memory(config, fewest, "cpu:0", 1 << 33, cpu_kernels=False)
    with pytest.raises(DoesNotFitError, match=r"cache for 512 tokens and \d+ states"):
        plan_memory(config, ModelSpec("m", "x", dtype="float32"), "cpu:0", MIB, cpu_kernels=False)


@pytest.mark.parametrize(
    ("quant", "gib", "tokens", "slots"), [("int4", 24, 39_664, 17), ("fp8", 80, 322_944, 142)]
)  # fmt: skip
def test_a_large_hybrid_leaves_most_of_its_cache_to_pages_and_checkpoints(
    tmp_path: pathlib.Path, quant: str, gib: int, tokens: int, slots: int
) -> None:
    """Qwen3.5-27B: 48 of 64 layers keep 3 MiB of a recurrence, and inputs of it and a convolution."""
    shape = {
        "model_type": "qwen3_5_text", "architectures": ["Qwen3_5ForCausalLM"], "vocab_size": 248320,
        "hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 64, "num_attention_heads": 24,
        "num_key_value_heads": 4, "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 48,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
        "full_attention_interval": 4, "max_position_embeddings": 262144, "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    plan = plan_memory(read_config(tmp_path), ModelSpec("m", "x", quant=quant), "cuda:0", gib << 30)
    assert plan.states is not None
    inputs_bytes = 2 * 10240 * (3 + MAX_DRAFTS) + 2 * 96 * MAX_DRAFTS
    assert plan.states.slot_bytes == 48 * (3 * MIB + inputs_bytes)
    assert plan.states.checkpoint_pages * PAGE_TOKENS == 4096
    # What a step's work space takes may change.
    assert plan.states.num_slots == pytest.approx(slots, rel=0.15)
    assert plan.num_pages * PAGE_TOKENS == pytest.approx(tokens, rel=0.15)
    assert plan.states.total_bytes < 0.55 * plan.kv_cache_bytes
    assert plan.total_bytes <= gib << 30


def test_a_draft_model_is_refused_beside_a_state(config: ModelConfig) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be cut back to the accepted tokens") as caught:
        plan_memory(config, ModelSpec("m", "x"), "cpu:0", 1 << 33, draft=config, cpu_kernels=False)
    assert caught.value.param == "draft"
