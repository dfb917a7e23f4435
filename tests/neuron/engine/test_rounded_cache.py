"""Keys and values in 8 bits: half the memory, nearly the same answers, and errors as without."""

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from graph_rig import ByDefinition, Recorded
from torch.nn import functional

from cortex.wire.errors import InvalidRequestError
from cortex.wire.node import ModelSpec
from neuron.device import jobs
from neuron.layers.attention import Attention
from neuron.models import decoder
from neuron.models.config import read_config
from neuron.models.packed import padded
from neuron.models.sizing import PAGE_TOKENS, MemoryPlan, plan_memory
from neuron.models.weights import open_weights
from neuron.text.tokenizer import load as load_tokenizer
from neuron.triton_kernels import dispatch
from neuron.triton_kernels.attention import attention_parts
from neuron.triton_kernels.batch import Batch
from neuron.triton_kernels.operations import EAGER

PROMPT = list(range(3, 43))


@pytest.fixture(params=["native int8", "eager int8", "eager fp8"])
def form(request: pytest.FixtureRequest, set_engine: Callable[..., None]) -> str:
    """A format of the cache, on an executor that has it."""
    executor, _, form = request.param.partition(" ")
    set_engine(cpu_kernels=executor == "native")
    return str(form)


def loaded(harness: Callable[..., Any], path: pathlib.Path, **spec: Any) -> Any:
    driver = harness()
    answer = driver.load(path, **spec)
    assert isinstance(answer, jobs.Done), answer
    return driver


def test_a_page_has_the_planned_size(harness: Callable[..., Any], tiny_llama: pathlib.Path, form: str) -> None:
    config = read_config(tiny_llama)
    driver = loaded(harness, tiny_llama, kv_dtype=form)
    model = driver.engine._models["m"]
    attention, _ = config.blocks[0]
    assert isinstance(attention, Attention)
    vectors = 2 * len(config.blocks) * attention.num_kv_heads * PAGE_TOKENS
    width = padded(attention.head_dim) if model.plan.native else attention.head_dim
    assert model.plan.kv_cache_bytes == model.plan.num_pages * vectors * (width + 4)
    caches = model.executor.caches
    if model.plan.native:
        pages = caches.tables[0][1:].nbytes
    else:
        pages = sum(tensor[1:-1].nbytes for cache in caches.layers for tensor in cache or ())
    assert pages == model.plan.kv_cache_bytes
    assert driver.sent[-1].result.kv_cache_bytes == model.plan.kv_cache_bytes


def test_answers_hardly_differ_and_never_by_neighbours(
    harness: Callable[..., Any], tiny_llama: pathlib.Path, form: str
) -> None:
    requests = {number: PROMPT[: 4 + 3 * number] for number in range(9)}
    exact, rounded = loaded(harness, tiny_llama), loaded(harness, tiny_llama, kv_dtype=form)
    for number, prompt in requests.items():
        rounded.generate(number, prompt, 1)
        rounded.run()
        exact.generate(number, prompt, 1)
        exact.run()
    same = [exact.outputs()[number] == rounded.outputs()[number] for number in requests]
    assert sum(same) >= (8 if form == "int8" else 7), "the next token, which may be a near tie"
    rounded.sent.clear()
    for number, prompt in requests.items():
        rounded.generate(number, prompt, 30)
        rounded.run()
    alone = rounded.outputs()
    rounded.sent.clear()
    for number, prompt in requests.items():
        rounded.generate(number, prompt, 30)
    rounded.run()
    assert rounded.outputs() == alone


def test_a_nan_is_one_in_8_bits_too(harness: Callable[..., Any], tiny_llama: pathlib.Path, form: str) -> None:
    """A NaN is in a token's scale, as its elements cannot hold one. The pages are sound for the next sequence."""
    driver = loaded(harness, tiny_llama, kv_dtype=form, prefix_cache=False)
    driver.generate(1, PROMPT, 20)
    driver.run()
    expected = driver.outputs()[1]
    model = driver.engine._models["m"]
    executor = model.executor
    if model.plan.native:
        hidden = executor.config.hidden_size
        table = executor.weights.region[: 4 * padded(executor.config.vocab_size) * hidden].view("f4")
        table.reshape(-1, hidden, 16)[100 // 16, :, 100 % 16] = float("nan")
    else:
        executor.forward.weights.embedding["table"].weight[100] = float("nan")
    driver.generate(2, [*PROMPT, 100, *PROMPT], 20)
    driver.run()
    assert driver.failures()[2].code == "non_finite_logits"
    driver.sent.clear()
    driver.generate(3, PROMPT, 20)
    driver.run()
    assert driver.outputs()[3] == expected


def test_a_cpu_with_its_kernels_has_no_fp8(tiny_llama: pathlib.Path) -> None:
    def plan(device: str) -> MemoryPlan:
        return plan_memory(read_config(tiny_llama), ModelSpec("m", "x", kv_dtype="fp8"), device, 1 << 33)

    with pytest.raises(InvalidRequestError, match="int8") as caught:
        plan("cpu:0")
    assert caught.value.param == "kv_dtype"
    assert plan("cuda:0").kv_dtype == "fp8"


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_rounded_pages_hold_nearly_twice_the_tokens(form: str, tiny_llama: pathlib.Path) -> None:
    config = read_config(tiny_llama)
    plain, rounded = (
        plan_memory(config, ModelSpec("m", "x", kv_dtype=kv_dtype, kv_cache_bytes=1 << 20), "cuda:0", 1 << 33)
        for kv_dtype in ("auto", form)
    )
    attention, _ = config.blocks[0]
    assert isinstance(attention, Attention)
    ratio = 2 * attention.head_dim / (attention.head_dim + 4)
    assert rounded.num_pages == pytest.approx(ratio * plain.num_pages, rel=0.01)


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_graphs_and_shared_prefixes_answer_as_eager_steps_do(
    harness: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    set_engine: Callable[..., None],
    tiny_llama: pathlib.Path,
    kv_dtype: str,
) -> None:
    set_engine(cpu_kernels=False)
    eager = loaded(harness, tiny_llama, kv_dtype=kv_dtype, prefix_cache=False)
    operations = ByDefinition()
    monkeypatch.setattr(dispatch, "operations_for", lambda *_, **__: operations)
    graphs = harness()
    graphs.engine._graphs = lambda: Recorded(late=True)
    assert isinstance(graphs.load(tiny_llama, kv_dtype=kv_dtype), jobs.Done)
    graphs.model().executor.overlaps = True
    for number in (1, 2):
        prompt = [*PROMPT[: 16 * number], 5]
        expected = eager.output_alone(prompt, 20)
        assert graphs.output_alone(prompt, 20) == expected
        graphs.generate(number, prompt, 20)
        graphs.run()
        assert graphs.outputs()[number] == expected
    assert graphs.rows[0].prompt_cached == 16 * number


@pytest.mark.slow
def test_what_rounding_costs_a_real_model(smollm2_gguf: pathlib.Path) -> None:
    text = pathlib.Path(__file__).parents[1] / "cpu_kernels" / "text.txt"
    tokens = load_tokenizer(smollm2_gguf).tokenizer.encode(text.read_text(), add_special_tokens=False).ids
    logits = {kv_dtype: teacher_forced(smollm2_gguf, tokens, kv_dtype) for kv_dtype in ("auto", "int8", "fp8")}
    exact, following = logits.pop("auto"), torch.tensor(tokens[1:])
    for (kv_dtype, found), worst, least in zip(logits.items(), (0.002, 0.02), (0.98, 0.95), strict=True):
        # Of a cross entropy, a difference is a ratio of perplexities.
        cost = float(functional.cross_entropy(found, following) - functional.cross_entropy(exact, following))
        agreement = float((found.argmax(-1) == exact.argmax(-1)).float().mean())
        print(f"{kv_dtype}: perplexity {cost:+.3%}, greedy agreement {agreement:.3f}")
        assert abs(cost) < worst
        assert agreement > least


def teacher_forced(path: pathlib.Path, tokens: list[int], kv_dtype: str) -> torch.Tensor:
    """Return the logits after each token but the last, by one prefill in eager float32 that reads the cache."""
    opened, num_tokens, num_pages = open_weights(path), len(tokens), -(-len(tokens) // PAGE_TOKENS)
    loading = decoder.load_decoder(opened, torch.float32, torch.device("cpu"))
    while True:
        try:
            next(loading)
        except StopIteration as finished:
            forward = decoder.Decoder(opened.config, finished.value, EAGER, None)
            break
    pages = [1 + num_pages] * len(opened.config.layers)
    caches = decoder.new_caches(opened.config, pages, 0, torch.float32, torch_zeros, kv_dtype=kv_dtype).layers
    arrays = (
        np.array([0, num_tokens], np.int32),
        np.arange(1, 1 + num_pages, dtype=np.int32)[None],
        np.array([num_tokens], np.int32),
    )
    batch = Batch(
        positions=torch.arange(num_tokens, dtype=torch.int32),
        slot_mapping=torch.arange(PAGE_TOKENS, PAGE_TOKENS + num_tokens),
        cu_seqlens=torch.from_numpy(arrays[0]),
        page_table=torch.from_numpy(arrays[1]),
        context_lens=torch.from_numpy(arrays[2]),
        parts=attention_parts(*arrays, PAGE_TOKENS, torch.device("cpu")),
    )
    with torch.inference_mode():
        hidden = forward.hidden(torch.tensor(tokens), [batch] * len(caches), caches)
        return forward.logits(hidden[:-1])


def torch_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)
