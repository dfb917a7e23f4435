"""A model with a recurrent state: the same logits however a prompt is cut, resumed, batched and padded."""

import array
import concurrent.futures
import dataclasses
import itertools
import pathlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

import cached_layers
import hybrid_models
import numpy as np
import pytest
import torch
from graph_rig import ByDefinition, Recorded

from cortex.wire.node import ModelSpec
from neuron.device import jobs
from neuron.engine import multi_step
from neuron.engine import scheduler as scheduler_module
from neuron.engine import speculation as speculation_module
from neuron.engine.cache_memory import LayerCaches, NativeCaches
from neuron.engine.loading import load_model
from neuron.engine.model_engine import ModelEngine
from neuron.engine.native_executor import NativeExecutor
from neuron.engine.prefix import extend_keys
from neuron.engine.sequence import Sequence
from neuron.engine.speculation import PromptLookup, Speculation
from neuron.engine.step_timer import StepTimer
from neuron.engine.tensor_parallel import Follower
from neuron.layers.cache import MAX_DRAFTS, SequenceState
from neuron.models import packed, sizing
from neuron.models.registry import FAMILIES
from neuron.models.sizing import PAGE_TOKENS
from neuron.triton_kernels import dispatch
from neuron.triton_kernels.batch import PagedCache

TEXT = [1 + 7 * i % 60 + i % 3 for i in range(300)]
PROMPT = TEXT[:150]
TOP = 5
"""Likeliest tokens of which the log probabilities are compared."""
Outcome = tuple[list[int], np.ndarray[Any, Any]]


@pytest.fixture(autouse=True)
def families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "latent", cached_layers.FAMILY)


def make_model(name: str, folder: pathlib.Path) -> pathlib.Path:
    """Return a trained model, or write one with a recurrent state or with a latent cache."""
    if name in hybrid_models.TRAINED:
        return hybrid_models.TRAINED[name]
    return cached_layers.make_model(folder) if name == "latent" else hybrid_models.make_model("small", folder)


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A small model with random weights, unless a test is of others."""
    return make_model(getattr(request, "param", "recurrent"), tmp_path_factory.mktemp("recurrent"))


also_trained = pytest.mark.parametrize("folder", ["recurrent", "qwen3_5"], indirect=True)


@pytest.fixture(params=["eager", "native", "graphs"])
def load(
    request: pytest.FixtureRequest,
    harness: Callable[..., Any],
    folder: pathlib.Path,
    set_engine: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Any]:
    """Load the model on the CPU, in torch or on its kernels, or as on a GPU: with graphs, and steps that overlap."""
    with_graphs = request.param == "graphs"
    set_engine(cpu_kernels=request.param == "native")
    if with_graphs:
        operations = ByDefinition()
        monkeypatch.setattr(dispatch, "operations_for", lambda *_, **__: operations)

    def make(step_tokens: int = 512, **spec: object) -> Any:
        driver = harness()
        if with_graphs:
            driver.engine._graphs = lambda: Recorded(late=True)
        with monkeypatch.context() as patch:
            short = dataclasses.replace(sizing.CPU_DEFAULTS, step_tokens=step_tokens, mixed_step_tokens=step_tokens)
            patch.setattr(sizing, "CPU_DEFAULTS", short)
            answer = driver.load(folder, max_sequences=5, **spec)
        assert isinstance(answer, jobs.Done), answer
        assert driver.model().plan.native == (request.param == "native")
        driver.model().executor.overlaps = with_graphs
        return driver

    return make


def outcomes(driver: Any) -> dict[int, Outcome]:
    """Return tokens and their log probabilities ``[N, TOP]`` of each sequence."""
    assert not driver.failures()
    found: dict[int, list[bytes]] = {}
    for row in driver.rows:
        if row.logprobs is not None:
            found.setdefault(row.sequence, []).append(row.logprobs.top)
    ids = driver.outputs()
    return {n: (ids[n], np.frombuffer(b"".join(parts), np.float32).reshape(-1, TOP)) for n, parts in found.items()}


def ask(driver: Any, prompts: list[list[int]], max_tokens: int = 12) -> list[Outcome]:
    """Run prompts together; return their outcomes."""
    driver.sent.clear()
    for number, prompt in enumerate(prompts):
        driver.generate(number, prompt, max_tokens, top_logprobs=TOP)
    while driver.engine.busy:
        driver.engine.step()
        driver.model().scheduler.check_integrity()
    found = outcomes(driver)
    return [found[number] for number in range(len(prompts))]


def check(found: list[Outcome], expected: list[Outcome]) -> None:
    for (ids, logprobs), (expected_ids, expected_logprobs) in zip(found, expected, strict=True):
        assert np.isfinite(logprobs).all()
        assert ids == expected_ids
        np.testing.assert_allclose(logprobs, expected_logprobs, atol=1e-5, rtol=1e-5)


def cached(driver: Any) -> list[int]:
    """Return the tokens of each prompt that were found in the cache."""
    found = {row.sequence: row.prompt_cached for row in driver.rows if row.prompt_cached is not None}
    return [found[number] for number in sorted(found)]


def alone(load: Callable[..., Any], prompts: list[list[int]], max_tokens: int = 12) -> list[Outcome]:
    """Return the outcomes of prompts that are computed whole, one after the other, without a prefix cache."""
    driver = load(prefix_cache=False)
    return [ask(driver, [prompt], max_tokens)[0] for prompt in prompts]


def caches(driver: Any) -> LayerCaches | NativeCaches:
    executor = driver.model().executor
    found: LayerCaches | NativeCaches = getattr(executor, "_eager", executor).caches
    return found


def pages_of(driver: Any) -> list[torch.Tensor]:
    """Return the tensors of the paged caches."""
    found = caches(driver)
    if isinstance(found, NativeCaches):
        return [torch.from_numpy(table) for table in found.tables]
    return [tensor for each in found.layers if isinstance(each, PagedCache) for tensor in each[:2]]


def states_of(driver: Any) -> torch.Tensor:
    """Return the state slots ``[slots, N]`` as numbers: all are float32, as is the model."""
    found = caches(driver)
    states = torch.from_numpy(found.states) if isinstance(found, NativeCaches) else found._states
    assert states is not None
    return states.view(torch.float32)


def drafted(driver: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield what each layer keeps of draft tokens: inputs of the convolution, and gates."""
    found = caches(driver)
    if isinstance(found, LayerCaches):
        for kind, cache in zip(driver.model().config.caches(), found.layers, strict=True):
            if isinstance(kind, SequenceState):
                inputs, _, gates = cache or ()
                yield inputs[:, -MAX_DRAFTS:], gates
        return
    # State [6, 16, 16], inputs [blocks, 3 + drafts, 16], gates [drafts, 2, 6], on 64 bytes.
    for layer in states_of(driver).chunk(2, dim=1):
        _, inputs, gates, _ = layer.split((6 * 16 * 16, 11 * 144, 12 * MAX_DRAFTS, 0), dim=1)
        yield inputs.view(-1, 9, 11, 16)[:, :, -MAX_DRAFTS:], gates


def embedding_row(driver: Any, token: int) -> torch.Tensor:
    """Return the embedding of a token as it lies in memory."""
    executor = driver.model().executor
    if isinstance(executor, NativeExecutor):
        rows, hidden = packed.padded(executor.config.vocab_size), executor.config.hidden_size
        # The first matrix of the region: float32 blocks of 16 rows.
        table = torch.from_numpy(executor.weights.region[: 4 * rows * hidden].view(np.float32))
        return table.view(-1, hidden, 16)[token // 16, :, token % 16]
    found: torch.Tensor = getattr(executor, "_eager", executor).forward.weights.embedding["table"].weight[token]
    return found


@pytest.mark.parametrize("step_tokens", [1, 16, 64])
def test_a_prompt_in_chunks_has_the_logits_of_the_whole(load: Callable[..., Any], step_tokens: int) -> None:
    prompts = [PROMPT, TEXT[:3], TEXT[5:77], TEXT[100:240]] if step_tokens > 1 else [TEXT[:90], TEXT[:3]]
    expected = alone(load, prompts)
    chunked = load(step_tokens, prefix_cache=False)
    check([ask(chunked, [prompt])[0] for prompt in prompts], expected)
    # Together: ragged steps of chunks and decodes, and graphs with padding rows.
    check(ask(chunked, [*prompts, prompts[0]]), [*expected, expected[0]])
    if step_tokens == 16:
        check(ask(load(), [*prompts, PROMPT]), [*expected, expected[0]])


def test_a_sequence_resumes_from_the_longest_checkpoint(load: Callable[..., Any]) -> None:
    prompts = [PROMPT, [*TEXT[:128], 9, 9], TEXT, [*TEXT[:100], 5] * 2]
    expected = alone(load, prompts)
    driver = load(64)
    states = driver.model().plan.states
    assert states.checkpoint_pages == 4
    for prompt, outcome in zip(prompts, expected, strict=True):
        check(ask(driver, [prompt]), [outcome])
    for prompt, outcome, length in zip(prompts, expected, (144, 128, 288, 192), strict=True):
        check(ask(driver, [prompt]), [outcome])
        assert cached(driver) == [length]
    # Two at once from one checkpoint, beside one from another and one from none.
    together = [PROMPT, PROMPT, TEXT, TEXT[7:50]]
    check(ask(driver, together), [expected[0], expected[0], expected[2], *alone(load, [TEXT[7:50]])])
    assert cached(driver) == [144, 144, 288, 0]


def test_each_turn_of_a_conversation_resumes_where_the_last_prompt_ended(load: Callable[..., Any]) -> None:
    """Or in what was generated, and beside another conversation."""
    driver = load(64)
    talks = [TEXT[:70], TEXT[30:110]]
    before = [0, 0]
    for _ in range(5):
        found = ask(driver, talks)
        assert cached(driver) == before
        ends = [(len(talk) - 1) // PAGE_TOKENS * PAGE_TOKENS for talk in talks]
        before = [end if end - start >= 64 else start for start, end in zip(before, ends, strict=True)]
        # Of the outputs, all but the last token, states are kept at multiples of 64.
        kept = [(len(talk) + 11) // 64 * 64 for talk in talks]
        before = [max(at, end) if end > len(talk) else at for at, end, talk in zip(before, kept, talks, strict=True)]
        talks = [[*talk, *ids, *TEXT[7:37]] for talk, (ids, _) in zip(talks, found, strict=True)]
    check(ask(driver, talks), alone(load, talks))


def test_a_turn_without_its_reasoning_computes_less_than_a_page_again(load: Callable[..., Any]) -> None:
    """Nor do choices of one prompt, a cancelled turn beside them, or another conversation lose the place."""
    question, reasoning, following = TEXT[:150], [60, 61, *TEXT[20:60]], TEXT[70:130]
    prompts = [[*question, *reasoning], [*question, *following], [*TEXT[:90], *following]]
    expected = alone(load, prompts)
    driver = load(64)
    for number in range(3):
        driver.generate(number, prompts[0], 12, top_logprobs=TOP, breakpoints=(90, 150))
    driver.generate(9, prompts[0], 12, breakpoints=(150,))
    driver.engine.step()
    driver.post(jobs.Cancel(9))
    driver.run()
    found = outcomes(driver)
    check([found[number] for number in range(3)], expected[:1] * 3)
    for prompt, outcome, resumed in zip(prompts[1:], expected[1:], (144, 80), strict=True):
        check(ask(driver, [prompt]), [outcome])
        assert cached(driver) == [resumed]


def test_a_turn_that_keeps_the_answer_resumes_in_it(load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepTimer, "step_s", lambda *_: multi_step.MULTI_STEP_S / 5.5)
    monkeypatch.setattr(multi_step, "is_worth_it", lambda *_: True)
    others = [TEXT[9:100], TEXT[50:80]]
    expected = alone(load, [PROMPT, *others], 120)
    turns = [[*prompt, *ids, *TEXT[:40]] for prompt, (ids, _) in zip([PROMPT, *others], expected, strict=True)]
    answers = alone(load, turns)
    driver = load(64)
    check(ask(driver, [PROMPT, *others], 120), expected)
    resumed = []
    for turn, answer in zip(turns, answers, strict=True):
        check(ask(driver, [turn]), [answer])
        resumed += cached(driver)
    # All but the last token of an output are in the cache, and its states are kept behind each fourth page.
    assert resumed == [256, 192, 128]


@pytest.mark.parametrize("breakpoints", [(0,), (151,), (90, 60)])
def test_breakpoints_outside_of_a_prompt_are_refused(load: Callable[..., Any], breakpoints: tuple[int, ...]) -> None:
    driver = load()
    driver.generate(0, PROMPT, breakpoints=breakpoints)
    assert driver.failures()[0].code == "invalid_value"
    assert "do not ascend within a prompt of 150 tokens" in driver.failures()[0].message


@pytest.mark.parametrize("fault", ["not copied", "zeros"])
def test_a_wrong_state_is_seen(load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """The comparison of logits notices a checkpoint that is not copied, or copied from the wrong slot."""
    expected = alone(load, [PROMPT])
    driver = load(64)
    check(ask(driver, [PROMPT]), expected)
    kind = type(caches(driver))
    copy = kind.copy_states
    if fault == "zeros":
        monkeypatch.setattr(kind, "copy_states", lambda self, copies: copy(self, copies * [[0], [1]]))
    else:
        monkeypatch.setattr(kind, "copy_states", lambda *_: None)
    with pytest.raises(AssertionError):
        check(ask(driver, [PROMPT]), expected)
    assert cached(driver) == [144]


@also_trained
def test_preemption_changes_no_logits(load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "GROWTH_PAGES", 0)
    prompts = [TEXT[20 * number :][:100] for number in range(3)]
    expected = alone(load, prompts, 60)
    driver = load(64, context_tokens=512)
    pool = driver.model().scheduler.cache.pool
    held = pool.allocate(pool.num_free - 25)
    monkeypatch.setattr(type(pool), "check_integrity", lambda *_: None)
    check(ask(driver, prompts, 60), expected)
    assert driver.model().scheduler.num_preemptions
    pool.release(held)


def test_a_few_slots_change_no_logits(load: Callable[..., Any]) -> None:
    """Sequences wait for a slot, and checkpoints are evicted for them and for each other."""
    prompts = [TEXT[20 * number :][:100] for number in range(5)]
    expected = alone(load, prompts)
    driver = load(64, context_tokens=512)
    pool = driver.model().scheduler.cache.states.pool
    held = pool.allocate(pool.num_free - 3)
    pool_check, num_held = pool.check_integrity, len(held)
    pool.check_integrity = lambda arrays: pool_check([*arrays, held])
    for _ in range(2):
        check(ask(driver, prompts), expected)
    assert pool.num_free == pool.num_pages - num_held


@also_trained
def test_multi_step_decodes_leave_states_of_other_rows_alone(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rows of a graph of four; one ends in the middle of a multi-step decode."""
    monkeypatch.setattr(StepTimer, "step_s", lambda *_: multi_step.MULTI_STEP_S / 10.5)
    monkeypatch.setattr(multi_step, "is_worth_it", lambda *_: True)
    prompts = [PROMPT, TEXT[:30], TEXT[5:77]]
    expected = alone(load, prompts, 40)
    driver = load()
    for number, (prompt, (ids, _)) in enumerate(zip(prompts, expected, strict=True)):
        driver.generate(number, prompt, 40, eos=(ids[15],) if number == 1 else ())
    driver.run()
    found = driver.outputs()
    stop = expected[1][0].index(expected[1][0][15])
    assert found == {0: expected[0][0], 1: expected[1][0][:stop], 2: expected[2][0]}


def test_a_row_that_has_ended_writes_nothing_more_to_its_pages(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is computed again with a state that has moved on, in a multi-step decode that goes on for another row."""
    monkeypatch.setattr(StepTimer, "step_s", lambda *_: multi_step.MULTI_STEP_S / 10.5)
    # The first token of the output is the last of a page, and the stop follows.
    prompts = [TEXT[:47], TEXT[5:30]]
    (ids, _), _ = alone(load, prompts)

    def published(is_worth_it: bool) -> list[torch.Tensor]:
        monkeypatch.setattr(multi_step, "is_worth_it", lambda *_: is_worth_it)
        driver = load()
        driver.output_alone(TEXT[200:210], 12)  # captures the graphs
        driver.generate(0, prompts[0], 12, eos=(ids[1],))
        driver.generate(1, prompts[1], 12)
        driver.run()
        assert driver.outputs()[0] == ids[:1]
        keys: list[bytes] = []
        extend_keys(keys, np.array([*prompts[0], ids[0]], np.int32), 3, PAGE_TOKENS)
        pages = torch.from_numpy(driver.model().scheduler.cache.pool.find(keys))
        assert len(pages) == 3
        return [tensor[pages] for tensor in pages_of(driver)]

    for found, expected in zip(published(True), published(False), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_nan_reaches_no_later_sequence(load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by its slot nor by a checkpoint; sequences beside it go on."""
    bad = [*TEXT[:30], 63, *TEXT[31:140]]
    monkeypatch.setattr(scheduler_module, "AWAITED_PAGES", 99)
    expected = alone(load, [PROMPT, TEXT[9:90]])
    driver = load(64)
    embedding = embedding_row(driver, 63)
    assert 63 not in PROMPT
    sound = embedding.clone()
    embedding[:] = torch.nan
    driver.generate(7, TEXT[9:90], 12, top_logprobs=TOP)
    driver.generate(8, bad, 12)
    driver.run()
    assert driver.failures()[8].code == "non_finite_logits"
    embedding[:] = sound
    driver.sent = [sent for sent in driver.sent if not isinstance(sent, jobs.SequenceFailed)]
    check([outcomes(driver)[7]], expected[1:])
    slots = driver.model().plan.states.num_slots
    for tensor in (states_of(driver), *pages_of(driver)):
        assert tensor.view(torch.float32)[1:].isfinite().all()
    # As many at once as there are slots: each begins in one that was used before.
    assert slots >= 5
    check(ask(driver, [PROMPT] * 5), expected[:1] * 5)
    check(ask(driver, [bad]), alone(load, [bad]))
    assert cached(driver) == [0]


def test_a_sequence_cancelled_in_flight_leaves_the_others_alone(load: Callable[..., Any]) -> None:
    expected = alone(load, [PROMPT, TEXT])
    driver = load(64)
    driver.generate(0, PROMPT, 12, top_logprobs=TOP)
    driver.engine.step()
    driver.post(jobs.Cancel(0))
    driver.generate(1, PROMPT, 12, top_logprobs=TOP)
    driver.generate(2, TEXT, 12, top_logprobs=TOP)
    driver.engine.step()
    driver.run()
    found = outcomes(driver)
    check([found[1], found[2]], expected)


# ------------------------------------------------------------------ draft tokens


class Scripted(PromptLookup):
    """Drafter that knows the outputs: of the drafts of each step, the first few are right and the next is wrong.

    ``rights`` are the numbers of right ones, in turn; ``None``: a step without drafts.
    """

    def __init__(self, expected: list[list[int]], rights: list[int | None]) -> None:
        self._expected = expected
        self._rights = itertools.cycle(rights)

    def available(self, sequences: list[Sequence], most: int) -> list[int]:
        self._drafts = [self._draft(sequence, most) for sequence in sequences]
        return [len(drafts) for drafts in self._drafts]

    def propose(self, sequences: list[Sequence], counts: list[int]) -> list[Any]:
        return [np.array(drafts[:count], np.int32) for drafts, count in zip(self._drafts, counts, strict=True)]

    def _draft(self, sequence: Sequence, most: int) -> list[int]:
        right = next(self._rights)
        if right is None:
            return []
        after = self._expected[sequence.number][sequence.num_output :][:right]
        return [*after, *([63 - after[-1] if after else 62] * 2)][:most]


@pytest.fixture
def drafting(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if draft tokens cost nothing; a multi-step decode has none."""
    monkeypatch.setattr(Speculation, "_depth", lambda self, decoding, able, available: max(available))
    monkeypatch.setattr(Speculation, "waits", lambda _: True)
    monkeypatch.setattr(multi_step, "is_worth_it", lambda *_: False)


def tokens_of(driver: Any, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    for number, prompt in enumerate(prompts):
        driver.generate(number, prompt, max_tokens)
    while driver.engine.busy:
        driver.engine.step()
        driver.model().scheduler.check_integrity()
    assert not driver.failures()
    found = driver.outputs()
    driver.sent.clear()
    return [found[number] for number in range(len(prompts))]


RIGHTS: list[list[int | None]] = [[0], [1], [8], [0, 2, None, 5, 1, None, None, 8, 3, 7, 4]]


@pytest.mark.usefixtures("drafting")
@pytest.mark.parametrize("rights", RIGHTS, ids=str)
def test_a_state_is_that_of_the_accepted_tokens(load: Callable[..., Any], rights: list[int | None]) -> None:
    """Whatever number of draft tokens is accepted, and of however many sequences beside prompts."""
    prompts = [PROMPT, TEXT[:30], TEXT[5:77], TEXT[100:240]]
    expected = [ids for ids, _ in alone(load, prompts, 40)]
    driver = load(64)
    speculation = driver.model().speculation
    speculation.drafter = Scripted(expected, rights)
    assert tokens_of(driver, prompts, 40) == expected
    assert speculation.num_proposed
    assert speculation.num_accepted >= 40 * (sum(right or 0 for right in rights) > 0)
    assert tokens_of(driver, prompts[::-1], 40) == expected[::-1], "from checkpoints"


@pytest.mark.usefixtures("drafting")
@pytest.mark.parametrize("fault", ["accepted, not replayed", "rejected, replayed", "inputs", "gates"])
def test_a_wrong_rollback_is_seen(load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    prompts = [PROMPT, TEXT[5:77]]
    expected = [ids for ids, _ in alone(load, prompts, 40)]
    driver = load()
    driver.model().speculation.drafter = Scripted(expected, [0, 2, None, 5, 1])
    verify = Speculation.verify

    def wrong(self: Speculation, sequence: Sequence, sampled: list[int]) -> list[int]:
        found = verify(self, sequence, sampled)
        if fault == "accepted, not replayed":
            sequence.num_replays = 0
        elif fault == "rejected, replayed" and len(sampled) > 1:
            sequence.num_replays = len(sampled) - 1
        if fault in ("inputs", "gates"):
            for inputs, gates in drafted(driver):
                (inputs if fault == "inputs" else gates).zero_()
        return found

    monkeypatch.setattr(Speculation, "verify", wrong)
    assert tokens_of(driver, prompts, 40) != expected


@pytest.mark.usefixtures("drafting")
def test_prompt_lookup_and_a_draft_model_change_no_token(
    load: Callable[..., Any], make_checkpoint: Callable[..., pathlib.Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some drafts are accepted and some are not; the draft model's memory is its own, without a state."""
    monkeypatch.setattr(speculation_module, "NGRAM", 1)
    prompts = [TEXT[:9] * 6, PROMPT]
    expected = [ids for ids, _ in alone(load, prompts, 60)]
    draft = make_checkpoint("llama", vocab_size=64, num_hidden_layers=1)
    for path in ("", str(draft)):
        driver = load(draft=path)
        assert tokens_of(driver, prompts, 60) == expected
        speculation, plan = driver.model().speculation, driver.model().plan
        assert speculation.num_proposed > speculation.num_accepted
        if path:
            assert plan.draft.states is None
            assert plan.draft.kv_cache_bytes % plan.num_pages == 0


def test_a_draft_model_with_a_state_is_refused(folder: pathlib.Path, harness: Callable[..., Any]) -> None:
    answer = harness().load(folder, draft=str(folder))
    assert isinstance(answer, jobs.JobFailed)
    assert "the draft model keeps a state" in answer.error.message


def test_eager_torch_has_states_of_two_dtypes(
    folder: pathlib.Path, harness: Callable[..., Any], set_engine: Callable[..., None]
) -> None:
    set_engine(cpu_kernels=False)
    driver = harness()
    driver.load(folder, dtype="bfloat16", max_sequences=5)
    plan = driver.model().plan
    # (3 + 8) x 144 and 8 x 12 elements in bfloat16, on 64 bytes, and 6 x 16 x 8 in float32, in each of two layers.
    assert plan.states.slot_bytes == 2 * (3200 + 3072 + 192)
    found = caches(driver)
    assert isinstance(found, LayerCaches)
    assert found._states is not None
    assert found._states.nbytes == plan.states.total_bytes
    inputs, recurrent, gates = found.layers[0] or ()
    assert (inputs.dtype, inputs.shape) == (torch.bfloat16, (1 + plan.states.num_slots, 11, 144))
    assert (gates.dtype, gates.shape) == (torch.bfloat16, (1 + plan.states.num_slots, 8, 12))
    assert (recurrent.dtype, recurrent.shape) == (torch.float32, (1 + plan.states.num_slots, 6, 16, 8))


def test_the_kernels_have_states_of_float32(folder: pathlib.Path, harness: Callable[..., Any]) -> None:
    driver = harness()
    driver.load(folder, dtype="bfloat16", max_sequences=5)
    plan = driver.model().plan
    # Values padded to 16, and all in float32.
    assert plan.states.slot_bytes == 2 * 4 * (6 * 16 * 16 + 11 * 144 + 8 * 12)
    assert states_of(driver).nbytes == plan.states.total_bytes


# ------------------------------------------------------------------ tensor parallelism


def address() -> str:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{trial.getsockname()[1]}"


@pytest.mark.parametrize("name", ["recurrent", "latent", *hybrid_models.TRAINED])
def test_two_ranks_have_the_tokens_of_one(
    name: str, tmp_path: pathlib.Path, harness: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three heads of a recurrence are two and one; states, copies and zeros follow rank 0's plan."""
    folder = make_model(name, tmp_path)
    spec = ModelSpec("m", "x", tensor_parallel=2, dtype="float32", max_sequences=3)
    short = dataclasses.replace(sizing.CPU_DEFAULTS, step_tokens=64, mixed_step_tokens=64)
    monkeypatch.setattr(sizing, "CPU_DEFAULTS", short)
    prompts = [PROMPT, TEXT[:140], PROMPT]
    where = address()

    def tokens(model: ModelEngine) -> list[list[int]]:
        found: dict[int, list[int]] = {}
        lengths = []
        for number, prompt in enumerate(prompts * 2):
            settings = jobs.SamplerSettings(temperature=0.0)
            model.scheduler.add(Sequence(number, np.array(prompt, np.int32), 12, frozenset(), settings))
            while number >= 2 and model.busy:
                for row in model.step().rows:
                    found.setdefault(row.sequence, []).extend(array.array("i", row.ids))
                    lengths += [row.prompt_cached] if row.prompt_cached is not None else []
        assert sorted(lengths[-3:]) == [128, 144, 144]
        return [found[number] for number in range(len(prompts) * 2)]

    def run(rank: int) -> list[list[int]]:
        loading = load_model(
            spec, folder, torch.device("cpu"), lambda: 1 << 30, jobs.GroupSettings(rank, 2, where, 20.0)
        )
        while True:
            try:
                next(loading)
            except StopIteration as finished:
                model: ModelEngine | Follower = finished.value
                break
        if isinstance(model, Follower):
            while model.follow():
                pass
            model.close()
            return []
        found = tokens(model)
        model.close()
        return found

    with concurrent.futures.ThreadPoolExecutor(2) as ranks:
        found, _ = ranks.map(run, range(2))
    driver = harness()
    driver.load(folder, max_sequences=3)
    assert found == [driver.output_alone(prompt, 12) for prompt in prompts * 2]
