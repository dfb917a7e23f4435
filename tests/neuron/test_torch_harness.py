"""Requests on their way to a worker: limits, ends and sampling, given or by default."""

import asyncio
import dataclasses
import pathlib
import shutil
from typing import Any

import msgspec
import pytest
from local_texts import LocalTexts
from tokenizers import pre_tokenizers

from cortex.wire.errors import ApiError
from cortex.wire.events import Finished, FinishReason, InferenceEvent
from cortex.wire.node import ModelSpec, SamplingDefaults, WorkerState
from cortex.wire.request import Ending, InferenceRequest, Sampling
from neuron.config import PrefixSharing
from neuron.device.jobs import Generate, LoadedModel, Memory, SamplerSettings, SequenceEnd, TokenRow
from neuron.device.outstanding import Sink
from neuron.models.config import GenerationDefaults, read_config
from neuron.torch_harness import TorchHarness
from neuron.torch_model import NEVER, TorchModel, resolve_sampling

CONTEXT = 64
ENDS = (2, 300, 17)


class Recorder:
    """A worker that records its requests, and ends every sequence at once."""

    device_id = "cpu:0"

    def __init__(self) -> None:
        self.asked: list[Generate] = []
        self.cancelled: list[int] = []

    def run(self, asked: Generate, sink: Sink) -> int:
        self.asked.append(asked)
        sink(TokenRow(len(self.asked), b"", SequenceEnd.LENGTH, 0))
        return len(self.asked)

    def cancel(self, number: int) -> None:
        self.cancelled.append(number)


class Device:
    """A worker that loads any model, and records its models."""

    device_id = "cpu:0"
    state = WorkerState.READY
    ready = True

    def __init__(self) -> None:
        self.models: set[str] = set()
        self.asked_for: list[str] = []
        self.loads = asyncio.Event()
        self.loads.set()

    async def memory(self) -> Memory:
        return Memory(1 << 40, 1 << 40, 0)

    async def load(self, spec: ModelSpec, path: str, **more: Any) -> LoadedModel:
        self.asked_for.append(spec.id)
        self.models.add(spec.id)
        await self.loads.wait()
        return LoadedModel(spec.id, "llama", "float32", CONTEXT, 4, 0, 0)

    async def unload(self, model: str) -> None:
        self.models.discard(model)


def load(device: Device, path: pathlib.Path) -> TorchModel:
    async def story() -> TorchModel:
        harness = TorchHarness({"cpu:0": device}, LocalTexts())  # type: ignore[dict-item]
        return await harness.load(ModelSpec("m", str(path)), path, lambda fraction: None)

    return asyncio.run(story())


def test_a_broken_template_is_found_before_the_device_is_used(
    talking_llama: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    folder = shutil.copytree(talking_llama, tmp_path / "m")
    (folder / "chat_template.jinja").write_text("{% for %}")
    device = Device()
    with pytest.raises(ApiError) as caught:
        load(device, folder)
    assert (caught.value.status, caught.value.code) == (422, "chat_template_failed")
    assert not device.asked_for


def test_a_load_that_fails_behind_the_device_leaves_nothing_there(
    talking_llama: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: object) -> None:
        raise MemoryError

    device = Device()
    with monkeypatch.context() as patched:
        patched.setattr(TorchModel, "__init__", broken)
        with pytest.raises(MemoryError):
            load(device, talking_llama)
    assert (device.asked_for, device.models) == (["m"], set())
    assert load(device, talking_llama).loaded.model == "m"


def test_a_load_that_is_cancelled_leaves_nothing_on_the_device(talking_llama: pathlib.Path) -> None:
    async def story() -> None:
        device = Device()
        device.loads.clear()
        harness = TorchHarness({"cpu:0": device}, LocalTexts())  # type: ignore[dict-item]
        load = asyncio.ensure_future(
            harness.load(ModelSpec("m", str(talking_llama)), talking_llama, lambda fraction: None)
        )
        while not device.models:
            await asyncio.sleep(0)
        load.cancel()
        with pytest.raises(asyncio.CancelledError):
            await load
        assert not device.models

    asyncio.run(story())


@pytest.fixture
def worker() -> Recorder:
    return Recorder()


@pytest.fixture
def model(talking_llama: pathlib.Path, worker: Recorder) -> TorchModel:
    """Return a model with a temperature and a top_k in its generation config, and three end tokens."""
    config = dataclasses.replace(
        read_config(talking_llama), eos_ids=ENDS, generation=GenerationDefaults(temperature=0.6, top_k=20)
    )
    text = asyncio.run(LocalTexts().open(str(talking_llama), config.vocab_size, config.eos_ids))
    loaded = LoadedModel("m", "llama", "float32", CONTEXT, 4, 0, 0)
    return TorchModel(loaded, config, text, (worker,))  # type: ignore[arg-type]


def run(model: TorchModel, **fields: Any) -> list[InferenceEvent]:
    async def collect() -> list[InferenceEvent]:
        request = InferenceRequest("m", **{"prompt": "hello", **fields})
        return [event async for events in model.infer(request) for event in events]

    return asyncio.run(collect())


@pytest.mark.parametrize(
    ("asked", "granted"), [(None, CONTEXT - 5), (3, 3), (CONTEXT - 5, CONTEXT - 5), (32_000, CONTEXT - 5)]
)
def test_the_output_may_fill_the_context_and_a_larger_limit_is_no_error(
    model: TorchModel, worker: Recorder, asked: int | None, granted: int
) -> None:
    events = run(model, max_tokens=asked)
    assert worker.asked[0].max_tokens == granted
    assert isinstance(events[-1], Finished)
    assert events[-1].reason is FinishReason.LENGTH


def test_a_prompt_that_fills_the_context_is_refused_by_the_limit_that_is_advertised(
    model: TorchModel, worker: Recorder
) -> None:
    run(model, prompt="x" * (CONTEXT - 1))
    with pytest.raises(ApiError, match=f"maximum context length is {CONTEXT} tokens") as caught:
        run(model, prompt="x" * CONTEXT)
    assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")
    assert len(worker.asked) == 1


def test_every_end_of_the_models_list_ends_an_answer(model: TorchModel, worker: Recorder) -> None:
    run(model)
    run(model, ending=Ending(ignore_eos=True))
    run(model, ending=Ending(ignore_eos=True, stop_token_ids=(9, 8)))
    run(model, ending=Ending(stop_token_ids=(9, 2)))
    assert [set(asked.eos) for asked in worker.asked] == [set(ENDS), set(), {8, 9}, {9, *ENDS}]


def test_sampling_defaults_are_the_models_generation_config(model: TorchModel, worker: Recorder) -> None:
    run(model)
    run(model, sampling=Sampling(temperature=0.0, top_k=-1, top_p=0.5, seed=7))
    left_open, given = (asked.sampler for asked in worker.asked)
    assert (left_open.temperature, left_open.top_k) == (0.6, 20)
    assert (left_open.top_p, left_open.min_p, left_open.repetition_penalty) == (1.0, 0.0, 1.0), "no house defaults"
    assert (given.temperature, given.top_k, given.top_p, given.seed) == (0.0, 0, 0.5, 7)


def test_prompts_of_a_principal_are_shared_with_no_other(
    model: TorchModel, worker: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asks = [{}, {"principal": "a"}, {"principal": "b"}, {"principal": "a", "cache_salt": "x"}, {"cache_salt": "x"}]
    for more in asks:
        run(model, num_choices=2, **more)
    salts = [asked.cache_salt for asked in worker.asked]
    assert salts[1::2] == salts[::2], "choices of a request share"
    assert len(set(salts)) == len(asks)
    worker.asked.clear()
    monkeypatch.setattr(model, "_prefix_sharing", PrefixSharing.ALL)
    for more in asks:
        run(model, **more)
    plain, a, b, a_salted, salted = (asked.cache_salt for asked in worker.asked)
    assert plain == a == b
    assert a_salted == salted != plain


def test_choices_differ_by_their_seeds_only(model: TorchModel, worker: Recorder) -> None:
    run(model, num_choices=3, sampling=Sampling(seed=40))
    assert [asked.sampler.seed for asked in worker.asked] == [40, 41, 42]
    assert len({msgspec.structs.replace(asked, sampler=SamplerSettings()) for asked in worker.asked}) == 1


def test_a_bad_word_is_a_token_that_is_never_generated(model: TorchModel, worker: Recorder) -> None:
    run(model, sampling=Sampling(bad_words=("h",), logit_bias={3: 1.0}))
    token = 3 + sorted(pre_tokenizers.ByteLevel.alphabet()).index("h")
    assert dict(worker.asked[0].sampler.logit_bias) == {3: 1.0, token: NEVER}
    with pytest.raises(ApiError, match="5 tokens") as caught:
        run(model, sampling=Sampling(bad_words=("hello",)))
    assert caught.value.param == "bad_words"


def test_a_models_entry_comes_before_its_files_and_a_request_before_both(
    talking_llama: pathlib.Path, worker: Recorder
) -> None:
    own = GenerationDefaults(temperature=0.6, top_k=20)
    generation = own.under(SamplingDefaults(temperature=0.2, presence_penalty=0.5))
    assert generation == GenerationDefaults(temperature=0.2, top_k=20, presence_penalty=0.5)
    asked = resolve_sampling(Sampling(temperature=0.9), generation)
    assert (asked.temperature, asked.top_k, asked.presence_penalty) == (0.9, 20, 0.5)
    left_open = resolve_sampling(Sampling(), generation)
    assert left_open.temperature == 0.2


def test_a_load_takes_the_sampling_of_the_models_entry(talking_llama: pathlib.Path) -> None:
    async def story() -> TorchModel:
        harness = TorchHarness({"cpu:0": Device()}, LocalTexts())  # type: ignore[dict-item]
        spec = ModelSpec("m", str(talking_llama), sampling=SamplingDefaults(temperature=0.3))
        return await harness.load(spec, talking_llama, lambda fraction: None)

    assert asyncio.run(story())._config.generation.temperature == 0.3
