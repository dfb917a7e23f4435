"""Trained models of gated delta nets: they are what their script says, have learned, and run as transformers runs them.

Their logits are peaked and their states are needed for long, so that greedy texts compare, whatever a prompt is cut
into and whatever it is batched with.
"""

import dataclasses
import itertools
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import gguf
import hybrid_models
import pytest
import tokenizers
import torch
import train_hybrid
import transformers
from hybrid_gguf import write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from neuron.engine.speculation import Speculation
from neuron.models import packed
from neuron.models.config import read_config
from neuron.models.decoder import Decoder
from neuron.text import tokenizer as text_tokenizer

from .test_parity import assert_close, run_engine

NUM_TOKENS = 64
RUNS: dict[str, dict[str, Any]] = {
    "eager": {"cpu_kernels": False, "speculation": False},
    "drafts": {"cpu_kernels": False, "speculation": True},
    "native": {"cpu_kernels": True, "speculation": False},
}
"""Ways to run a model: settings of the engine. With drafts there are up to three in each step, as if they were free."""
each_way = pytest.mark.parametrize("engine", RUNS, indirect=True)
THINGS = itertools.product(train_hybrid.THINGS[:5], train_hybrid.COLOURS[:5])
TALK = "".join(
    f"<|im_start|>user\nNow the {thing} is {colour}. What colour is the {thing}?<|im_end|>\n<|im_start|>assistant\n"
    f"<think>\nIt was said that the {thing} is {colour}.\n</think>\n\nThe {thing} is {colour}.<|im_end|>\n"
    for thing, colour in THINGS
)
Prompts = list[list[int]]


@dataclasses.dataclass
class Trained:
    """A trained model, and the same in transformers."""

    kind: str
    path: pathlib.Path
    model: transformers.PreTrainedModel
    tokenizer: tokenizers.Tokenizer

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """Return transformers' logits ``[T, V]`` of a sequence."""
        with torch.inference_mode():
            found: torch.Tensor = self.model(torch.tensor([tokens])).logits[0]
        return found

    def prompts(self, *lengths: int) -> Prompts:
        """Return parts of a conversation, each of so many tokens."""
        ids = self.tokenizer.encode(TALK).ids
        return [ids[7 * number :][:length] for number, length in enumerate(lengths)]

    def check(self, prompts: Prompts, found: tuple[dict[int, list[int]], dict[int, torch.Tensor]]) -> None:
        """Compare an engine's tokens and logits of prompts with those of transformers."""
        tokens, logits = found
        for number, prompt in enumerate(prompts):
            expected = self.logits([*prompt, *tokens[number]])[len(prompt) - 1 : -1]
            assert tokens[number] == expected.argmax(-1).tolist()
            assert_close(logits[number], expected)


@pytest.fixture(scope="module", params=hybrid_models.TRAINED)
def trained(request: pytest.FixtureRequest) -> Trained:
    path = hybrid_models.TRAINED[request.param]
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return Trained(request.param, path, model, tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")))


@pytest.fixture
def engine(
    request: pytest.FixtureRequest,
    trained: Trained,
    harness: Callable[..., Any],
    set_engine: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Any]:
    """Make engines of one way to run a model, by default the first."""
    changes = RUNS[getattr(request, "param", "eager")]
    if changes["cpu_kernels"] and packed.obstacle(read_config(trained.path)):
        pytest.skip("eager torch, as another case")
    set_engine(**changes)
    if changes["speculation"]:
        monkeypatch.setattr(Speculation, "_depth", lambda self, decoding, able, available: min(3, max(available)))
        monkeypatch.setattr(Speculation, "waits", lambda _: True)
    return harness


# ------------------------------------------------------------------ files


def test_files_are_what_their_script_writes(trained: Trained) -> None:
    assert json.loads((trained.path / "config.json").read_text()) == train_hybrid.CONFIGS[trained.kind]
    assert (trained.path / "chat_template.jinja").read_text() == train_hybrid.TEMPLATE
    assert trained.tokenizer.get_vocab_size() == train_hybrid.NUM_TOKENS
    with safe_open(trained.path / "model.safetensors", "pt") as file:
        record = json.loads(file.metadata()["training"])
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert (record["seed"], record["steps"]) == (train_hybrid.SEED, train_hybrid.STEPS)
    assert record["loss"] < 2
    made = train_hybrid.Trainee(trained.kind).tensors()
    assert shapes == {name: tuple(tensor.shape) for name, tensor in made.items()}
    assert sum(path.stat().st_size for path in trained.path.iterdir()) < 4 << 20


def test_drafts_of_the_head_are_often_right(trained: Trained) -> None:
    model = train_hybrid.Trainee(trained.kind)
    model.read(trained.path)
    acceptance = model.acceptance(torch.tensor(trained.prompts(200, 200)))
    assert acceptance > 0.5, "by chance it is one in a thousand"
    for logits in model.routed:  # of each layer of experts
        assert len(logits.topk(2).indices.unique()) == logits.shape[1], "each expert is needed"


@pytest.mark.parametrize(
    ("think", "expected"),
    [
        (True, r"It was said that the door is (\w+)\.\n</think>\n\nThe door is \1\."),
        (False, r"The door is \w+\."),
    ],
)
def test_it_answers_with_and_without_reasoning(
    trained: Trained, engine: Callable[..., Any], think: bool, expected: str
) -> None:
    driver = engine()
    driver.load(trained.path)
    question = {"role": "user", "content": "Now the door is red, the lamp is blue. What colour is the door?"}
    prompt = trained.tokenizer.encode(train_hybrid.prompt_of([question], think=think)).ids
    ids = driver.output_alone(prompt, NUM_TOKENS, eos=read_config(trained.path).eos_ids)
    assert re.fullmatch(expected, trained.tokenizer.decode(ids, skip_special_tokens=False))


@pytest.mark.parametrize("tensor", [0, 1], ids=["inputs of the convolution", "state of the rule"])
def test_a_lost_state_changes_the_text(
    trained: Trained, engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tensor: int
) -> None:
    (prompt,) = trained.prompts(150)
    driver = engine()
    driver.load(trained.path, prefix_cache=False)
    before = driver.output_alone(prompt, NUM_TOKENS)
    monkeypatch.setattr(Decoder, "hidden", hybrid_models.forgetting(tensor))
    assert driver.output_alone(prompt, NUM_TOKENS) != before


# ------------------------------------------------------------------ parity


@each_way
@pytest.mark.parametrize("step_tokens", [7, 64, 512])
def test_a_batch_of_mixed_lengths_equals_transformers(
    trained: Trained, engine: Callable[..., Any], step_tokens: int
) -> None:
    prompts = trained.prompts(1, 5, 17, 64, 65, 150)
    trained.check(prompts, run_engine(engine, trained.path, prompts, step_tokens, NUM_TOKENS))


@each_way
@pytest.mark.parametrize("step_tokens", [1, 512])
def test_a_prompt_alone_equals_transformers(trained: Trained, engine: Callable[..., Any], step_tokens: int) -> None:
    prompts = trained.prompts(100)
    trained.check(prompts, run_engine(engine, trained.path, prompts, step_tokens, NUM_TOKENS))


def test_a_long_prompt_equals_transformers(trained: Trained, engine: Callable[..., Any]) -> None:
    """Through two dozen chunks the state neither overflows nor drifts."""
    prompts = [(trained.tokenizer.encode(TALK).ids * 2)[:1500]]
    trained.check(prompts, run_engine(engine, trained.path, prompts, 512, 4))


@each_way
def test_sixteen_sequences_have_the_text_of_one(trained: Trained, engine: Callable[..., Any]) -> None:
    """With the prefix cache and without: the second time each prompt resumes from a checkpoint."""
    prompts = trained.prompts(*range(20, 180, 10))
    found = {}
    for prefix_cache in (False, True):
        driver = engine()
        driver.load(trained.path, prefix_cache=prefix_cache, max_sequences=16)
        for again in range(1 + prefix_cache):
            driver.sent.clear()
            for number, prompt in enumerate(prompts):
                driver.generate(number, prompt, 24)
            driver.run()
            found[prefix_cache, again] = driver.outputs()
        cached = [row.prompt_cached for row in driver.rows if row.prompt_cached is not None]
        assert any(cached) == prefix_cache
        speculation = driver.model().speculation
        assert speculation.num_accepted >= speculation.num_proposed / 4
        assert bool(speculation.num_proposed) == engine.settings.speculation
    assert found[False, 0] == found[True, 0] == found[True, 1]
    for number in (0, 15):
        expected = trained.logits([*prompts[number], *found[False, 0][number]])
        assert expected[len(prompts[number]) - 1 : -1].argmax(-1).tolist() == found[False, 0][number]


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(1, 80), min_size=1, max_size=12))
def test_any_cuts_of_a_prompt_give_the_same_logits(
    trained: Trained, engine: Callable[..., Any], cuts: list[int]
) -> None:
    driver = engine()
    driver.load(trained.path, prefix_cache=False)
    scheduler, sizes = driver.model().scheduler, itertools.cycle(cuts)
    (prompt,) = trained.prompts(150)
    driver.generate(0, prompt, 4, top_logprobs=5)
    while driver.engine.busy:
        size = next(sizes)
        scheduler.limits = dataclasses.replace(scheduler.limits, step_tokens=size, mixed_step_tokens=size)
        driver.engine.step()
    tokens = driver.outputs()[0]
    expected = trained.logits([*prompt, *tokens])[len(prompt) - 1 : -1].log_softmax(-1)
    assert tokens == expected.argmax(-1).tolist()
    found = [torch.frombuffer(bytearray(row.logprobs.top), dtype=torch.float32) for row in driver.rows if row.logprobs]
    torch.testing.assert_close(torch.cat(found).view(-1, 5), expected.topk(5).values, atol=1e-3, rtol=1e-3)


def test_gguf_has_the_text_files_of_the_folder(trained: Trained, tmp_path: pathlib.Path) -> None:
    path = write_gguf(trained.path, tmp_path / "model.gguf")
    found, expected = text_tokenizer.load(path), text_tokenizer.load(trained.path)
    assert found.chat_template == expected.chat_template
    for text in (TALK[:500], "x\u0301 9876 <think>\n\n</think>\n\n\tdef f(x):\n    return 'no'", "Zürich, Größe 🦙"):
        assert found.tokenizer.encode(text).ids == expected.tokenizer.encode(text).ids
    assert read_config(path).eos_ids[0] == read_config(trained.path).eos_ids[0]


@each_way
def test_gguf_has_the_logits_of_safetensors(
    trained: Trained, engine: Callable[..., Any], tmp_path: pathlib.Path
) -> None:
    path, prompts = write_gguf(trained.path, tmp_path / "model.gguf"), trained.prompts(65, 150)
    trained.check(prompts, run_engine(engine, path, prompts, 512, NUM_TOKENS))
    rounded = write_gguf(trained.path, tmp_path / "rounded.gguf", gguf.GGMLQuantizationType.Q8_0)
    tokens, _ = run_engine(engine, rounded, prompts, 512, 8)
    exact, _ = run_engine(engine, path, prompts, 512, 8)
    assert tokens == exact, "8 bits change no likely token"
