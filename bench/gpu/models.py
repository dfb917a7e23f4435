"""Whole models of random weights, as the engine computes them; times do not depend on the weights' values.

Bytes of a step are all weights but the embedding, and the part of the cache that is read.
"""

import dataclasses
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import safetensors.torch
import torch
from devices import Gpu
from kernels import Bench, Rows

from cortex.wire.node import ModelSpec
from neuron.device import jobs
from neuron.engine import multi_step
from neuron.engine.graph_executor import GraphExecutor
from neuron.engine.loading import eager_executor, load_model
from neuron.engine.model_engine import ModelEngine
from neuron.engine.sequence import Sequence
from neuron.engine_settings import DEFAULTS, EngineSettings
from neuron.layers.attention import Attention
from neuron.layers.step import Linear
from neuron.models import decoder, quantization
from neuron.models.config import read_config
from neuron.models.model import ModelConfig
from neuron.models.prebuild import Preparation, any_plan
from neuron.models.sizing import PAGE_TOKENS, MemoryPlan
from neuron.models.transfer import Transfer
from neuron.triton_kernels import dispatch
from neuron.triton_kernels.batch import Batch

MAX_COMPILERS = 16
WARM_UP = 12
"""Tokens of each sequence before the timed ones: a graph is captured in each of the first steps."""
WAYS = {"multi-step": DEFAULTS, "one by one": DEFAULTS, "launched": EngineSettings(cuda_graphs=False)}
"""Modes of decoding and their settings: several steps in one call of the loop; one graph a step, launched before the
previous step is settled; without graphs."""


def config_of(bench: Bench, name: str) -> ModelConfig:
    """Return the configuration of a model."""
    with tempfile.TemporaryDirectory() as folder:
        bench.sizes.write_config(name, pathlib.Path(folder))
        return read_config(pathlib.Path(folder))


class RandomSource:
    """Checkpoint of random weights, made on the device."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def read_into(self, name: str, destination: torch.Tensor, **where: Any) -> None:
        """Fill ``destination`` so that activations keep their size."""
        if destination.ndim == 1:
            destination.fill_(1.0)
        else:
            destination.normal_(std=destination.shape[-1] ** -0.5)


def finished(steps: Iterator[float]) -> Any:
    """Return the result of a generator."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def weights_of(gpu: Gpu, config: ModelConfig, quant: str) -> decoder.DecoderWeights:
    """Return random weights on the device."""
    source: Any = RandomSource(config)
    weights: decoder.DecoderWeights = finished(decoder.load_decoder(source, torch.bfloat16, gpu.device, quant=quant))
    return weights


def step_bytes(weights: decoder.DecoderWeights) -> int:
    """Return the bytes of weights that a decode step reads."""
    loaded = [each for layer in (*weights.layers, weights.head) for each in layer.values()]
    parts = [part for each in loaded for part in (each if isinstance(each, Linear) else (each,))]
    return sum(part.nbytes for part in parts if part is not None)


def prepare(gpu: Gpu, config: ModelConfig, plan: MemoryPlan) -> None:
    """Load a model's kernels onto the device; a launch of any other is an error from then on."""
    kernels = Preparation(config, plan, gpu.device, num_processes=min(os.cpu_count() or 1, MAX_COMPILERS))
    for _ in kernels.finish((99, 0)):
        pass
    kernels.close()


class Step:
    """Forward pass alone: of ``batch`` decodes at ``context`` tokens, or with ``batch`` 0 of one prompt."""

    def __init__(
        self, gpu: Gpu, config: ModelConfig, weights: decoder.DecoderWeights, batch: int, context: int
    ) -> None:
        self.forward = decoder.Decoder(config, weights, dispatch.operations_for(gpu.device, torch.bfloat16))
        device = gpu.device
        sequences = max(batch, 1)
        tokens = batch or context
        pages = -(-context // PAGE_TOKENS)
        table = torch.arange(1, sequences * pages + 1, device=device, dtype=torch.int32).view(sequences, pages)
        places = torch.full((tokens,), context - 1, device=device) if batch else torch.arange(context, device=device)
        rows = torch.arange(tokens, device=device) if batch else torch.zeros(tokens, device=device, dtype=torch.int64)
        self.batch = Batch(
            positions=places.to(torch.int32),
            slot_mapping=table[rows, places // PAGE_TOKENS].long() * PAGE_TOKENS + places % PAGE_TOKENS,
            cu_seqlens=torch.arange(sequences + 1, device=device, dtype=torch.int32) * (tokens // sequences),
            page_table=table,
            context_lens=torch.full((sequences,), context, device=device, dtype=torch.int32),
            num_decodes=batch,
        )
        self.caches = decoder.new_caches(
            config,
            [sequences * pages + 1] * len(config.layers),
            1 + sequences,
            torch.bfloat16,
            lambda shape, dtype: torch.randn(shape, device=device).to(dtype),
        ).layers
        self.ids = torch.randint(config.vocab_size, (tokens,), dtype=torch.int32, device=device)

    @torch.inference_mode()
    def run(self) -> torch.Tensor:
        """Compute the step's logits."""
        hidden = self.forward.hidden(self.ids, [self.batch] * len(self.caches), self.caches)
        return self.forward.logits(hidden.index_select(0, self.batch.cu_seqlens[1:] - 1))


def decode_rows(bench: Bench, name: str, quant: str) -> Rows:
    """Yield one model's decodes: the forward pass in a graph, then the engine's own steps in each of its WAYS."""
    gpu, sizes = bench.gpu, bench.sizes
    config = config_of(bench, name)
    weights = weights_of(gpu, config, quant)
    most = max(sizes.batches)
    pages = -(-(sizes.context + WARM_UP + sizes.output) // PAGE_TOKENS) * most
    plan = dataclasses.replace(
        any_plan(config, "bfloat16", quant), max_sequences=most, sampled_rows=most, num_pages=pages
    )
    with gpu.graphs() as graphs:
        prepare(gpu, config, plan)
        for batch in sizes.batches:
            step = Step(gpu, config, weights, batch, sizes.context)
            replay = gpu.captured(step.run)
            spent = gpu.seconds(replay, 20)
            nbytes = step_bytes(weights) + batch * sizes.context * config.kv_bytes_per_token("bfloat16")
            row: dict[str, Any] = {"model": name, "weights": quant, "batch": batch, "context": sizes.context}
            yield row | {
                "way": "forward alone", "ms": spent * 1e3, "tok/s": batch / spent, "GB/s": nbytes / spent / 1e9,
                "share of copy": nbytes / spent / 1e9 / bench.copy_gb_s, "host us": gpu.host_us(replay),
            }  # fmt: skip
            del step, replay
            gpu.forget()
        for batch in sizes.batches:
            for way, settings in WAYS.items():
                eager = eager_executor(config, weights, plan, gpu.device, settings)
                executor = GraphExecutor(eager, plan, graphs(), settings)
                model = ModelEngine(name, config, plan, executor, pathlib.Path(), prefix_cache=False)
                spent, host_s = serve(model, batch, sizes.context, sizes.output, is_multi_step=way == "multi-step")
                nbytes = step_bytes(weights)
                nbytes += batch * (sizes.context + sizes.output // 2) * config.kv_bytes_per_token("bfloat16")
                row = {"model": name, "weights": quant, "batch": batch, "context": sizes.context, "way": way}
                yield row | {
                    "ms": spent * 1e3, "tok/s": batch / spent, "GB/s": nbytes / spent / 1e9,
                    "share of copy": nbytes / spent / 1e9 / bench.copy_gb_s, "host us": host_s * 1e6,
                }  # fmt: skip
                model.close()
                del model, executor, eager
                gpu.forget()


def serve(model: ModelEngine, batch: int, context: int, output: int, *, is_multi_step: bool) -> tuple[float, float]:
    """Generate; return the seconds of a step of ``batch`` decodes, and of these the host's own between two steps."""
    generator = np.random.default_rng(batch)
    settings = jobs.SamplerSettings(temperature=1.0)
    for number in range(batch):
        prompt = generator.integers(0, model.config.vocab_size, context, dtype=np.int32)
        model.scheduler.add(Sequence(number, prompt, WARM_UP + output, frozenset(), settings))
    done = dict.fromkeys(range(batch), 0)

    def run(until: int) -> None:
        while min(done.values()) < until:
            found = model.step()
            if found.failures:
                raise RuntimeError(f"{found.failures[0][1].code}: {found.failures[0][1].message}")
            for row in found.rows:
                done[row.sequence] += len(row.ids) // 4

    with mock.patch.object(multi_step, "HOST_BOUND", float("inf") if is_multi_step else 0.0):
        run(WARM_UP)
        before, began = sum(done.values()), time.perf_counter()
        run(WARM_UP + output)
        spent = time.perf_counter() - began
    while model.busy:
        model.step()
    return spent * batch / (sum(done.values()) - before), model._step_timer.host_s


def prefill_rows(bench: Bench, name: str) -> Rows:
    """Yield the products' rate of prompts of one model."""
    gpu, config = bench.gpu, config_of(bench, name)
    weights = weights_of(gpu, config, quantization.NONE)
    prepare(gpu, config, any_plan(config, "bfloat16"))
    matrices = config.num_parameters() - config.vocab_size * config.hidden_size * (1 if config.head.tied else 2)
    scores = sum(layer.num_heads * layer.head_dim for layer in config.layers if isinstance(layer, Attention))
    for tokens in bench.sizes.prefill_tokens:
        spent = gpu.seconds(Step(gpu, config, weights, 0, tokens).run, 3)
        work = 2 * tokens * matrices + 2 * tokens * tokens * scores
        row = {"model": name, "tokens": tokens, "ms": spent * 1e3, "tok/s": tokens / spent}
        yield row | {"TFLOP/s": work / spent / 1e12}
        gpu.forget()


def transfer_rows(bench: Bench) -> Rows:
    """Yield the rate of copies to the device, by a load's transfer and by one pageable copy."""
    gpu = bench.gpu
    source = torch.ones(bench.sizes.copy_bytes, dtype=torch.bfloat16)
    target = torch.empty_like(source, device=gpu.device)
    pinned = gpu.pinned(bench.sizes.copy_bytes // 4)
    copied = torch.empty_like(pinned, device=gpu.device)
    ceiling = pinned.nbytes / gpu.seconds(lambda: copied.copy_(pinned, non_blocking=True), 4) / 1e9
    transfer = Transfer(gpu.device)
    ways: tuple[tuple[str, Callable[[], object]], ...] = (
        ("two pinned buffers", lambda: transfer.copy(source, target)),
        ("pageable", lambda: target.copy_(source)),
    )
    for name, copy in ways:
        rate = source.nbytes / gpu.seconds(copy, 1) / 1e9
        yield {"what": name, "GB": source.nbytes / 1e9, "GB/s": rate, "share of pinned": rate / ceiling}


def load_rows(bench: Bench, name: str) -> Rows:
    """Yield whole loads from safetensors that lie in the page cache: the first, and one in exchange for it (a swap)."""
    gpu = bench.gpu
    with tempfile.TemporaryDirectory() as temporary, gpu.graphs() as graphs:
        folder = pathlib.Path(temporary)
        bench.sizes.write_config(name, folder)
        shapes = read_config(folder).tensor_shapes()
        tensors = {key: (torch.randn(shape) / 32).bfloat16() for key, shape in shapes.items()}
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
        del tensors
        model: ModelEngine | None = None
        for what in ("first load", "swap"):
            began = time.perf_counter()
            if model is not None:
                model.close()
                del model
                gpu.forget()
            spec = ModelSpec("bench", "bench", dtype="bfloat16", max_sequences=8, context_tokens=512)
            settings = EngineSettings(cpu_kernels=False)
            model = finished(load_model(spec, folder, gpu.device, gpu.free_bytes, graphs=graphs, settings=settings))
            if not gpu.rehearses:
                torch.cuda.synchronize()
            spent = time.perf_counter() - began
            yield {"what": f"{name}, {what}", "GB": nbytes / 1e9, "seconds": spent, "GB/s": nbytes / spent / 1e9}
