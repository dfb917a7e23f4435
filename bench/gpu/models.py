"""Whole models of random weights on a GPU: what `run.py --part models` measures.

The forward pass is the engine's own, in CUDA graphs as a decode step is; weights are random, since time does not depend
on them. Bytes of a step are those of all weights but the embedding, and of the cache that is read.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from neuron.models import decoder, quantization
from neuron.models.config import GenerationDefaults, ModelConfig
from neuron.models.qwen3 import QWEN3
from neuron.models.transfer import Transfer
from neuron.triton_kernels import dispatch
from neuron.triton_kernels.batch import Batch
from neuron.triton_kernels.quantized import QuantizedMatrix, StackedMatrix

DEVICE = torch.device("cuda")
PAGE = 16
SHAPES = {
    "0.6B": (1024, 28, 16, 8, 3072, True),
    "1.7B": (2048, 28, 16, 8, 6144, True),
    "8B": (4096, 36, 32, 8, 12288, False),
}
"""Of Qwen3: hidden size, layers, heads, key-value heads, width of the MLP, tied head."""


def config_of(name: str) -> ModelConfig:
    """Return the configuration of one of SHAPES."""
    hidden, layers, heads, kv_heads, width, tied = SHAPES[name]
    return ModelConfig(
        architecture=QWEN3, vocab_size=151936, hidden_size=hidden, num_layers=layers, num_heads=heads,
        num_kv_heads=kv_heads, head_dim=128, intermediate_size=width, rms_norm_eps=1e-6, rope_theta=1e6,
        rope_scaling=None, attention_bias=False, tie_embeddings=tied, context_tokens=40960, eos_ids=(), bos_id=None,
        generation=GenerationDefaults(),
    )  # fmt: skip


class RandomSource:
    """A checkpoint of noise, made on the device."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def read_into(self, name: str, destination: torch.Tensor, **where: Any) -> None:
        """Fill ``destination`` so that activations keep their size."""
        if destination.ndim == 1:
            destination.fill_(1.0)
        else:
            destination.normal_(std=destination.shape[-1] ** -0.5)


def weights_of(config: ModelConfig, quant: str) -> decoder.DecoderWeights:
    """Return random weights on the device."""
    loading = decoder.load_decoder(RandomSource(config), torch.bfloat16, DEVICE, quant=quant)  # type: ignore[arg-type]
    while True:
        try:
            next(loading)
        except StopIteration as finished:
            found: decoder.DecoderWeights = finished.value
            return found


def step_bytes(weights: decoder.DecoderWeights) -> int:
    """Return the bytes of weights that a decode step reads."""
    total, pending = 0, [weights.head, *(getattr(layer, f.name) for layer in weights.layers for f in fields_of(layer))]
    for thing in pending:
        if isinstance(thing, (torch.Tensor, QuantizedMatrix, StackedMatrix)):
            total += thing.nbytes
    return total


def fields_of(thing: Any) -> tuple[Any, ...]:
    """Return the fields of a dataclass."""
    return dataclasses.fields(thing)


class Step:
    """A decode step of ``batch`` sequences at ``context`` tokens, or one prompt of so many with ``batch`` 0."""

    def __init__(self, config: ModelConfig, weights: decoder.DecoderWeights, batch: int, context: int) -> None:
        self.config, self.weights = config, weights
        sequences = max(batch, 1)
        tokens = batch or context
        pages = -(-context // PAGE)
        table = torch.arange(1, sequences * pages + 1, device=DEVICE, dtype=torch.int32).view(sequences, pages)
        places = torch.full((tokens,), context - 1, device=DEVICE) if batch else torch.arange(context, device=DEVICE)
        rows = torch.arange(tokens, device=DEVICE) if batch else torch.zeros(tokens, device=DEVICE, dtype=torch.int64)
        self.batch = Batch(
            positions=places.to(torch.int32),
            slots=table[rows, places // PAGE].long() * PAGE + places % PAGE,
            cu_seqlens=torch.arange(sequences + 1, device=DEVICE, dtype=torch.int32) * (tokens // sequences),
            page_table=table,
            context_lens=torch.full((sequences,), context, device=DEVICE, dtype=torch.int32),
            num_decodes=batch,
        )
        shape = (config.num_layers, sequences * pages + 1, PAGE, config.num_kv_heads, config.head_dim)
        self.keys, self.values = (torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
        self.ids = torch.zeros(tokens, dtype=torch.int32, device=DEVICE)

    def run(self, operations: dispatch.Operations | None = None) -> torch.Tensor:
        """Compute the step; the tokens sampled are the next step's input, as in the engine."""
        hidden = decoder.forward(self.config, self.weights, self.ids, self.batch, self.keys, self.values, operations)
        last = hidden.index_select(0, self.batch.cu_seqlens[1:] - 1)
        ids = decoder.logits(self.weights, last, operations).argmax(-1).to(torch.int32)
        if self.batch.num_decodes:
            self.ids.copy_(ids)
        return ids

    def cache_bytes(self) -> int:
        """Return the bytes of keys and values that the step reads."""
        return int(self.batch.context_lens.sum()) * self.config.kv_bytes_per_token("bfloat16")


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Return the seconds of one call: of the best of three runs of ``repeats``."""
    call()
    best = float("inf")
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - start) / repeats)
    return best


def graph_of(step: Step) -> torch.cuda.CUDAGraph:
    """Return the step captured."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step.run()
    return graph


def decode_rows(ceiling: float, name: str, quant: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of one model: each batch in a graph, and by launches from Python where that is asked."""
    config = config_of(name)
    weights = weights_of(config, quant)
    nbytes = step_bytes(weights)
    for batch in (1, 8, 32, 128):
        step = Step(config, weights, batch, 512)
        graph = graph_of(step)
        spent = seconds(graph.replay, 20)
        launch_us = host_us(graph)
        rate = (nbytes + step.cache_bytes()) / spent / 1e9
        row = {"model": name, "weights": quant, "batch": batch, "context": 512, "ms": spent * 1e3}
        row |= {"tok/s": batch / spent, "GB/s": rate, "share of copy": rate / ceiling, "host us": launch_us}
        if batch in (1, 32):
            row["launched ms"] = seconds(step.run, 5) * 1e3
        yield row
        del step, graph
        torch.cuda.empty_cache()


def host_us(graph: torch.cuda.CUDAGraph) -> float:
    """Return the microseconds that launching a graph keeps the host, the device being busy already."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(4):
        graph.replay()
    spent = (time.perf_counter() - start) / 4
    torch.cuda.synchronize()
    return spent * 1e6


def prefill_rows(name: str) -> Iterator[dict[str, Any]]:
    """Yield the products' rate of prompts of one model."""
    config = config_of(name)
    weights = weights_of(config, quantization.NONE)
    for tokens in (512, 2048, 8192):
        step = Step(config, weights, 0, tokens)
        spent = seconds(step.run, 3)
        matrices = config.num_parameters() - config.vocab_size * config.hidden_size * (
            1 if config.tie_embeddings else 2
        )
        work = 2 * tokens * matrices + 2 * tokens * tokens * config.num_heads * config.head_dim * config.num_layers
        row = {"model": name, "tokens": tokens, "ms": spent * 1e3, "tok/s": tokens / spent}
        yield row | {"TFLOP/s": work / spent / 1e12}


def load_rows() -> Iterator[dict[str, Any]]:
    """Yield the rate of copies to the device, as a load makes them and as one pageable copy."""
    source = torch.empty(1 << 30, dtype=torch.bfloat16)
    source.fill_(1.0)
    target = torch.empty_like(source, device=DEVICE)
    pinned = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    room = torch.empty_like(pinned, device=DEVICE)
    ceiling = pinned.nbytes / seconds(lambda: room.copy_(pinned, non_blocking=True), 4) / 1e9
    transfer = Transfer(DEVICE)
    ways: tuple[tuple[str, Callable[[], object]], ...] = (
        ("two pinned buffers", lambda: transfer.copy(source, target)),
        ("pageable", lambda: target.copy_(source)),
    )
    for name, copy in ways:
        rate = source.nbytes / seconds(copy, 1) / 1e9
        yield {"how": name, "GB/s": rate, "share of pinned": rate / ceiling}
