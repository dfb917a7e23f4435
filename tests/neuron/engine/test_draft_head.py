"""Draft heads: their logits are those of the reference, and the output is the model's own whatever they propose."""

import array
import concurrent.futures
import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from graph_rig import ByDefinition, Recorded
from hybrid_gguf import write_gguf
from hybrid_models import TRAINED, make_model
from safetensors.torch import load_file, save_file
from train_hybrid import prompt_of

from cortex.wire.node import ModelSpec
from neuron.device import jobs
from neuron.engine import multi_step
from neuron.engine import scheduler as scheduler_module
from neuron.engine import speculation as speculation_module
from neuron.engine.draft import MOST_LAG, DraftHead, DraftModel
from neuron.engine.loading import load_model
from neuron.engine.model_engine import ModelEngine
from neuron.engine.scheduler import Step
from neuron.engine.sequence import NO_TOKENS, Int32Array, Sequence
from neuron.engine.speculation import PromptLookup, Speculation
from neuron.engine.step_timer import StepTimer
from neuron.engine.tensor_parallel import Follower
from neuron.layers.draft_head import KEPT_TOKENS
from neuron.layers.shard import Shard
from neuron.models import sizing
from neuron.models.config import read_config
from neuron.models.decoder import Decoder
from neuron.models.errors import CorruptWeightsError, DoesNotFitError
from neuron.models.sizing import least_bytes, plan_memory
from neuron.models.weights import open_weights
from neuron.triton_kernels import dispatch

from .test_recurrent import TEXT, address

PROMPTS = [TEXT[:150], TEXT[:3], TEXT[5:77], TEXT[100:133]]


@pytest.fixture(scope="module", params=["small", "qwen3_5_moe", "qwen3_next"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return make_model(kind, tmp_path_factory.mktemp(kind), with_draft_head=True)


@pytest.fixture(autouse=True)
def in_torch(set_engine: Callable[..., None]) -> None:
    """The step in C has no draft head."""
    set_engine(cpu_kernels=False)


@pytest.fixture
def load(harness: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Load a model on the CPU; ``with_graphs``: as on a GPU, with steps that overlap."""

    def make(path: pathlib.Path, step_tokens: int = 512, *, with_graphs: bool = False, **spec: object) -> Any:
        driver = harness()
        if with_graphs:
            operations = ByDefinition()
            monkeypatch.setattr(dispatch, "operations_for", lambda *_, **__: operations)
            driver.engine._graphs = lambda: Recorded(late=True)
        with monkeypatch.context() as patch:
            short = dataclasses.replace(sizing.CPU_DEFAULTS, step_tokens=step_tokens, mixed_step_tokens=step_tokens)
            patch.setattr(sizing, "CPU_DEFAULTS", short)
            answer = driver.load(path, max_sequences=4, **spec)
        assert isinstance(answer, jobs.Done), answer
        driver.model().executor.overlaps = with_graphs
        return driver

    return make


@pytest.fixture(autouse=True)
def no_lookups(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the head alone make drafts, unless a test is of both."""
    if "looked_up" not in request.node.name:
        monkeypatch.setattr(PromptLookup, "available", lambda self, sequences, most: [0] * len(sequences))
        monkeypatch.setattr(PromptLookup, "propose", lambda self, sequences, counts: [NO_TOKENS] * len(sequences))


@pytest.fixture
def drafting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to three draft tokens in each step, as if they cost nothing."""
    monkeypatch.setattr(Speculation, "_depth", lambda self, decoding, able, available: min(3, max(available)))
    monkeypatch.setattr(Speculation, "waits", lambda _: True)
    monkeypatch.setattr(multi_step, "is_worth_it", lambda *_: False)


class Reference:
    """The head by its definition, with the layers of transformers."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        config = self.model.config
        self.tensors = load_file(folder / "model.safetensors")
        self.eps = config.rms_norm_eps
        values = {**config.to_dict(), "num_hidden_layers": 1, "layer_types": ["full_attention"], "mlp_only_layers": []}
        self.block = type(self.model)(type(config)(**values))
        own = {name.replace("mtp.", "model."): tensor for name, tensor in self.tensors.items() if "mtp.layers" in name}
        own["model.norm.weight"] = self.tensors["mtp.norm.weight"]
        own["lm_head.weight"] = self.model.lm_head.weight.detach()
        own["model.embed_tokens.weight"] = self.model.model.embed_tokens.weight.detach()
        self.block.load_state_dict(own)

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return x * scale * (1 + self.tensors[f"mtp.pre_fc_norm_{name}.weight"])

    @torch.no_grad()
    def logits(self, tokens: list[int], drafts: list[int]) -> torch.Tensor:
        """Return the logits of each row behind ``tokens``, and ``drafts`` of the head's own hidden states."""
        hidden = self.model.model(torch.tensor([tokens])).last_hidden_state[0]
        following = torch.tensor([*tokens[1:], *drafts])
        embedded = self.model.model.embed_tokens(following)
        hidden = hidden[: len(tokens) - 1]
        for _ in range(1 + len(drafts)):
            rows = embedded[: len(hidden)]
            joined = torch.cat((self.norm("embedding", rows), self.norm("hidden", hidden)), -1)
            x = (joined @ self.tensors["mtp.fc.weight"].T)[None]
            out = self.block.model(inputs_embeds=x).last_hidden_state[0]
            hidden = torch.cat((hidden, out[-1:]))
        found: torch.Tensor = self.block.lm_head(out)
        return found


@pytest.mark.usefixtures("drafting")
@pytest.mark.parametrize("step_tokens", [16, 512])
def test_the_logits_are_those_of_the_reference(
    folder: pathlib.Path, load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, step_tokens: int
) -> None:
    """Of a prompt in chunks, beside others, and of each draft token, which reads the head's own hidden states."""
    driver = load(folder, step_tokens)
    rows: dict[int, torch.Tensor] = {}
    proposed: list[tuple[list[int], list[int]]] = []
    drafted, propose = Decoder.drafted, DraftHead.propose

    def recording(self: Decoder, token_ids: torch.Tensor, hidden: torch.Tensor, batches: Any, caches: Any) -> Any:
        found = drafted(self, token_ids, hidden, batches, caches)
        for position, row in zip(batches[-1].positions.tolist(), self.logits(found), strict=True):
            rows[position] = row
        return found

    def proposing(self: DraftHead, sequences: list[Sequence], counts: list[int]) -> list[Int32Array]:
        found = propose(self, sequences, counts)
        proposed.extend(
            (s.tokens[: s.num_tokens].tolist(), drafts.tolist()) for s, drafts in zip(sequences, found, strict=True)
        )
        return found

    monkeypatch.setattr(Decoder, "drafted", recording)
    monkeypatch.setattr(DraftHead, "propose", proposing)
    prompt = PROMPTS[0]
    output = driver.output_alone(prompt, 20)
    reference = Reference(folder)
    expected = reference.logits(prompt + output, [])
    count = len(prompt) + 12
    torch.testing.assert_close(torch.stack([rows[i] for i in range(count)]), expected[:count], atol=2e-4, rtol=1e-3)
    assert len(proposed) > 8
    for tokens, drafts in [(tokens, drafts) for tokens, drafts in proposed if drafts][::4]:
        assert drafts == reference.logits(tokens, drafts[:-1])[len(tokens) - 2 :].argmax(-1).tolist()


@pytest.mark.usefixtures("drafting")
@pytest.mark.parametrize("name", ["qwen3_5_tied", "qwen3_5_moe", "qwen3_next"])
def test_gguf_has_the_drafts_of_safetensors(
    name: str, load: Callable[..., Any], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model(name, tmp_path, with_draft_head=True)
    proposed: list[list[int]] = []
    propose = DraftHead.propose

    def proposing(self: DraftHead, sequences: list[Sequence], counts: list[int]) -> list[Int32Array]:
        found = propose(self, sequences, counts)
        proposed[-1].extend(token for drafts in found for token in drafts.tolist())
        return found

    monkeypatch.setattr(DraftHead, "propose", proposing)
    for path in (folder, write_gguf(folder, tmp_path / "model.gguf")):
        proposed.append([])
        load(path, quant="none").output_alone(PROMPTS[2], 20)
    assert len(proposed[0]) > 20
    assert proposed[0] == proposed[1]


@pytest.mark.usefixtures("drafting")
@pytest.mark.parametrize("with_graphs", [False, True])
def test_the_output_is_the_same_with_and_without(
    folder: pathlib.Path, load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, with_graphs: bool
) -> None:
    """Greedy and drawn, and where sequences are preempted between the verification of drafts and the next step."""
    monkeypatch.setattr(scheduler_module, "GROWTH_PAGES", 0)

    def outputs(num_free: int, **spec: object) -> tuple[dict[int, list[int]], Speculation]:
        driver = load(folder, 64, with_graphs=with_graphs, **spec)
        pool = driver.model().scheduler.cache.pool
        held = pool.allocate(pool.num_free - num_free)
        check = pool.check_integrity
        pool.check_integrity = lambda arrays: check([*arrays, held])
        for number, prompt in enumerate(PROMPTS):
            driver.generate(number, prompt, 50)
            driver.generate(10 + number, prompt, 20, temperature=0.9, top_k=20, seed=number)
        while driver.engine.busy:
            driver.engine.step()
            driver.model().scheduler.check_integrity()
        assert not driver.failures()
        assert driver.model().scheduler.num_preemptions or num_free > 30
        return driver.outputs(), driver.model().speculation

    expected, none = outputs(60, draft_head=False)
    assert not isinstance(none.drafter, DraftHead)
    for num_free in (60, 16):
        found, speculation = outputs(num_free)
        assert found == expected
        assert isinstance(speculation.drafter, DraftHead)
        assert speculation.num_proposed > 300


@pytest.mark.usefixtures("drafting")
def test_two_ranks_have_the_tokens_of_one(tmp_path: pathlib.Path, load: Callable[..., Any]) -> None:
    """The head's block is shared by the ranks; a rank without memory for the head leaves it out on both."""
    folder = make_model("small", tmp_path, with_draft_head=True)
    expected = [load(folder, draft_head=False).output_alone(prompt, 12) for prompt in PROMPTS[:2]]
    config = read_config(folder)
    spec = ModelSpec("m", "x", tensor_parallel=2, dtype="float32", max_sequences=3)
    for short in (False, True):
        where = address()

        def run(rank: int, where: str = where, short: bool = short) -> tuple[list[list[int]], int]:
            free = [1 << 30, least_bytes(config, spec, "cpu:0", Shard(1, 2)) if short else 1 << 30][rank]
            group = jobs.GroupSettings(rank, 2, where, 20.0)
            loading = load_model(spec, folder, torch.device("cpu"), lambda: free, group)
            while True:
                try:
                    next(loading)
                except StopIteration as finished:
                    model: ModelEngine | Follower = finished.value
                    break
            assert model.plan.has_draft_head != short
            if isinstance(model, Follower):
                while model.follow():
                    pass
                model.close()
                return [], 0
            found: list[list[int]] = []
            for number, prompt in enumerate(PROMPTS[:2]):
                settings = jobs.SamplerSettings(temperature=0.0)
                model.scheduler.add(Sequence(number, np.array(prompt, np.int32), 12, frozenset(), settings))
                found.append([])
                while model.busy:
                    for row in model.step().rows:
                        found[-1].extend(array.array("i", row.ids))
            model.close()
            return found, model.speculation.num_proposed

        with concurrent.futures.ThreadPoolExecutor(2) as ranks:
            (found, num_proposed), _ = ranks.map(run, range(2))
        assert found == expected
        assert bool(num_proposed) != short


@pytest.mark.usefixtures("drafting")
def test_repeated_text_is_looked_up_and_the_head_asked_for_all_else(
    tmp_path: pathlib.Path, load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sequences in a step: of one the text repeats, of the other it does not, until it is looked up itself."""
    folder = make_model("small", tmp_path, with_draft_head=True)
    asked: list[list[int]] = []
    propose = DraftModel.propose

    def proposing(self: DraftModel, sequences: list[Sequence], counts: list[int]) -> list[Int32Array]:
        asked.append([s.number for s in sequences])
        return propose(self, sequences, counts)

    monkeypatch.setattr(DraftModel, "propose", proposing)
    monkeypatch.setattr(
        speculation_module, "lookup", lambda tokens, count: tokens[:count] if tokens[0] == PROMPTS[0][0] else NO_TOKENS
    )
    prompts = [PROMPTS[0], PROMPTS[2]]
    expected = [load(folder, draft_head=False).output_alone(prompt, 20) for prompt in prompts]
    driver = load(folder)
    for number, prompt in enumerate(prompts):
        driver.generate(number, prompt, 20)
    driver.run()
    assert [driver.outputs()[number] for number in range(2)] == expected
    assert [1] in asked
    assert not any(0 in numbers for numbers in asked)


# ------------------------------------------------------------------ plans and files


def test_the_head_is_left_out_where_it_does_not_fit_or_is_not_wanted(
    tmp_path: pathlib.Path, load: Callable[..., Any], set_engine: Callable[..., None]
) -> None:
    folder = make_model("small", tmp_path, with_draft_head=True)
    config = read_config(folder)
    bare_config = config.without_draft_head()
    spec = ModelSpec("m", "x", dtype="float32")
    assert plan_memory(config, spec, "cpu:0", 1 << 33) == plan_memory(bare_config, spec, "cpu:0", 1 << 33), "in C"
    plan, least_of = (functools.partial(each, cpu_kernels=False) for each in (plan_memory, least_bytes))
    bare = plan(bare_config, spec, "cpu:0", 1 << 33)
    full = plan(config, spec, "cpu:0", 1 << 33)
    assert full.has_draft_head
    num_parameters = config.num_parameters() - bare_config.num_parameters()
    # Norms of heads are repeated, and tables of rotary embeddings are no parameters.
    assert 0 <= full.weights_bytes - bare.weights_bytes - 4 * num_parameters < 1000
    places = full.num_hidden
    assert places == full.max_sequences * KEPT_TOKENS + full.step_tokens + full.sampled_rows
    assert full.workspace_bytes - bare.workspace_bytes >= places * config.hidden_size * 4
    tokens = full.num_pages * 16
    kv_bytes = config.kv_bytes_per_token("float32")
    assert kv_bytes == 2 * bare_config.kv_bytes_per_token("float32")
    assert full.kv_cache_bytes == tokens * kv_bytes + full.states.total_bytes
    off = plan(config, msgspec.structs.replace(spec, draft_head=False), "cpu:0", 1 << 33)
    assert off == bare
    least = least_of(config, spec, "cpu:0")
    assert least == least_of(bare_config, spec, "cpu:0")
    assert not plan(config, spec, "cpu:0", least).has_draft_head
    with pytest.raises(DoesNotFitError):
        plan(config, spec, "cpu:0", least - 1)
    driver = load(folder, draft_head=False)
    assert driver.model().config.draft_head is None
    assert isinstance(driver.model().speculation.drafter, PromptLookup)
    set_engine(speculation=False)
    assert load(folder).model().config.draft_head is None


def test_a_checkpoint_without_the_head_is_loaded_without(tmp_path: pathlib.Path, load: Callable[..., Any]) -> None:
    """Whatever its configuration tells: many quantised ones lack it. One with a part of a head is refused."""
    folder = make_model("small", tmp_path, with_draft_head=True)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({name: each for name, each in tensors.items() if name != "mtp.fc.weight"}, path)
    assert load(folder).model().config.draft_head is None
    save_file({name: each for name, each in tensors.items() if "mtp.layers.0.mlp" not in name}, path)
    with pytest.raises(CorruptWeightsError, match=r"lacks mtp\.layers\.0\.mlp"):
        open_weights(folder)


@pytest.mark.usefixtures("drafting")
def test_a_head_that_is_not_finite_drafts_nothing(tmp_path: pathlib.Path, load: Callable[..., Any]) -> None:
    folder = make_model("small", tmp_path, with_draft_head=True)
    driver = load(folder)
    expected = load(folder, draft_head=False).output_alone(PROMPTS[0], 12)
    beside, *_ = driver.model().executor.forward.weights.draft_head
    beside["norm"].fill_(torch.nan)
    assert driver.output_alone(PROMPTS[0], 12) == expected
    assert driver.model().speculation.num_proposed == 0


def test_a_head_whose_drafts_do_not_pay_is_not_asked(
    tmp_path: pathlib.Path, load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random head is right once in 64 times. It follows what others generate without it, so that it can be tried."""
    folder = make_model("small", tmp_path, with_draft_head=True)
    monkeypatch.setattr(StepTimer, "step_s", lambda self, rows: 1.0 + 0.1 * rows)
    monkeypatch.setattr(DraftHead, "cost_s", lambda self, num_sequences, depth: 0.2 * depth)
    driver = load(folder)
    lags: list[int] = []
    follow = DraftHead.follow

    def following(self: DraftHead, step: Step) -> None:
        follow(self, step)
        lags.extend(s.num_tokens - 1 - s.num_drafted for s in step.sequences)

    monkeypatch.setattr(DraftHead, "follow", following)
    driver.output_alone(PROMPTS[1], 200)
    assert 0 < driver.model().speculation.num_proposed < 25
    assert max(lags) <= MOST_LAG


@pytest.mark.usefixtures("drafting")
@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("with_graphs", [False, True])
def test_a_trained_head_is_often_right_and_changes_no_token(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str, with_graphs: bool
) -> None:
    """Of several sequences beside prompts, which resume from a checkpoint the second time."""
    texts = [f"Now the {thing} is red. What colour is the {thing}?" for thing in ("door", "lamp", "boat")]
    tokenizer = tokenizers.Tokenizer.from_file(str(TRAINED[name] / "tokenizer.json"))
    prompts = [
        tokenizer.encode(prompt_of([{"role": "user", "content": text * (1 + 4 * number)}], think=True)).ids
        for number, text in enumerate(texts)
    ]

    def outputs(driver: Any) -> list[list[int]]:
        driver.sent.clear()
        for number, prompt in enumerate(prompts):
            driver.generate(number, prompt, 40)
        driver.run()
        assert not driver.failures()
        found = driver.outputs()
        return [found[number] for number in range(len(prompts))]

    expected = outputs(load(TRAINED[name], draft_head=False))
    driver = load(TRAINED[name], 64, with_graphs=with_graphs)
    assert outputs(driver) == expected
    assert outputs(driver) == expected
    speculation = driver.model().speculation
    assert isinstance(speculation.drafter, DraftHead)
    assert speculation.num_accepted > 0.4 * speculation.num_proposed > 20
