"""Each kernel beside the GPU's ceiling: a copy for bytes, cuBLAS for products, torch's attention for a prompt."""

import dataclasses
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import kernel_cases
import torch
from devices import Gpu
from sizes import Sizes

from neuron.triton_kernels import launch, moe_routing
from neuron.triton_kernels.activation import gated_activation
from neuron.triton_kernels.batch import AttentionParameters, PagedCache
from neuron.triton_kernels.cache_codes import FORMATS as FORMATS_OF_CACHES
from neuron.triton_kernels.cache_codes import new_cache, write
from neuron.triton_kernels.decode_attention import decode_attention
from neuron.triton_kernels.matmul import matmul
from neuron.triton_kernels.moe_matmul import moe_matmul
from neuron.triton_kernels.operations import KERNELS
from neuron.triton_kernels.prefill_attention import prefill_attention
from neuron.triton_kernels.quantized_matmul import FORMS, quantized_matmul
from neuron.triton_kernels.random_batch import PAGE, random_batch
from neuron.triton_kernels.sampling import SamplingRows
from neuron.triton_kernels.skinny_matmul import skinny_matmul

Rows = Iterator[dict[str, Any]]
PLAIN = AttentionParameters(0.1)
EXACT = ("rms norm", "gated activation", "rope and cache", "rotary table", "sample", "begin step", "end step")
"""Cases without products: the matrix units compute float32 as TF32, which no model here uses."""
QUICK = ("rms norm", "moe matmul of floats", "sample", "begin step", "end step")
"""Cases of a rehearsal."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """GPU, sizes, and the bandwidth of a copy in GB/s, counting both ways."""

    gpu: Gpu
    sizes: Sizes
    copy_gb_s: float

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """Return normal random numbers on the GPU: zeros would hide errors, and be faster than real data."""
        return torch.randn(*shape, device=self.gpu.device, dtype=dtype)

    def rate(self, nbytes: int, us: float) -> dict[str, float]:
        """Return the columns of a call that reads and writes ``nbytes``."""
        return {"us": us, "GB/s": nbytes / us / 1e3, "share of copy": nbytes / us / 1e3 / self.copy_gb_s}


def copy_gb_s(gpu: Gpu, sizes: Sizes) -> float:
    """Return the bandwidth of a copy, both directions counted."""
    source = torch.randint(256, (sizes.copy_bytes,), dtype=torch.uint8, device=gpu.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / gpu.graph_us(lambda _: target.copy_(source)) / 1e3


def numbers(gpu: Gpu) -> Rows:
    """Yield whether each kernel is right, on fresh inputs; a kernel that fails to run is wrong."""
    for case in kernel_cases.numeric_cases():
        if case.dtype == torch.float32 and case.name not in EXACT:
            continue
        if gpu.rehearses and case.name not in QUICK:
            continue
        row: dict[str, Any] = {"case": case.name, "dtype": str(case.dtype).removeprefix("torch.")}
        try:
            error = case.error(gpu.device)
        except Exception as failure:  # noqa: BLE001 (whatever it is, it is this case's)
            traceback.print_exc()
            yield row | {"verdict": f"FAILED: {type(failure).__name__}"}
        else:
            yield row | {"error": error, "verdict": "right" if error <= case.tolerance else "WRONG"}


def nodes(bench: Bench) -> Rows:
    """Yield the time of a nearly empty node, with and without dependent launch."""
    here = launch.target_of(bench.gpu.device)
    x, weight = bench.random(1, 64), bench.random(64, 64)
    for name, capability in (("dependent launch", here.capability), ("plain launch", min(here.capability, 80))):
        if name == "plain launch" or here.has_dependent_launch:
            with launch.targeting(launch.Target(capability, here.num_sms)):
                yield {"node": name, "us": bench.gpu.graph_us(lambda _: skinny_matmul.triton(x, weight))}


def projections(bench: Bench) -> Rows:
    """Yield projections of few rows; each call reads other weights, so that nothing is in the cache."""
    here = launch.target_of(bench.gpu.device)
    for width, depth in bench.sizes.gemv:
        copies = max(2, min(8, bench.sizes.weights_bytes // (2 * width * depth)))
        weights = [bench.random(width, depth) for _ in range(copies)]
        for batch in bench.sizes.skinny_rows:
            x = bench.random(batch, depth)
            nbytes = weights[0].nbytes + x.nbytes + 2 * batch * width
            row: dict[str, Any] = {"rows": batch, "N": width, "K": depth}
            for name, capability in (("", here.capability), ("plain ", min(here.capability, 80))):
                if name == "plain " and not here.has_dependent_launch:
                    continue
                with launch.targeting(launch.Target(capability, here.num_sms)):
                    us = bench.gpu.graph_us(lambda i, x=x, w=weights: skinny_matmul.triton(x, w[i % len(w)]))
                row |= {name + key: value for key, value in bench.rate(nbytes, us).items()}
            us = bench.gpu.graph_us(lambda i, x=x, w=weights: torch.mm(x, w[i % len(w)].t()))
            yield row | {"cuBLAS GB/s": nbytes / us / 1e3}


def products(bench: Bench) -> Rows:
    """Yield the large matmul beside cuBLAS."""
    for width, depth in bench.sizes.matmul:
        weight = bench.random(width, depth)
        for batch in bench.sizes.matmul_rows:
            x = bench.random(batch, depth)
            work = 2 * batch * width * depth / 1e6
            ours = work / bench.gpu.graph_us(lambda _, x=x, w=weight: matmul.triton(x, w))
            theirs = work / bench.gpu.graph_us(lambda _, x=x, w=weight: torch.mm(x, w.t()))
            yield {"M": batch, "N": width, "K": depth, "TFLOP/s": ours, "cuBLAS": theirs, "share": ours / theirs}


def caches(bench: Bench, *shape: int) -> Iterator[tuple[str, PagedCache]]:
    """Yield a random cache of ``shape`` ``[P, page, K, D]`` in each format that the GPU has, by its name."""
    num_slots = shape[0] * shape[1]
    for name, dtype in {"bfloat16": torch.bfloat16, **FORMATS_OF_CACHES}.items():
        if name == "fp8" and launch.target_of(bench.gpu.device).capability < 89:
            continue
        cache = new_cache(shape, dtype, lambda size, kind: torch.zeros(size, dtype=kind, device=bench.gpu.device))
        pools = (bench.random(num_slots, *shape[2:]) for _ in range(2))
        write(cache, torch.arange(num_slots, device=bench.gpu.device), *pools)
        yield name, cache


def attention(bench: Bench) -> Rows:
    """Yield attention of prompts beside torch's, and of decodes beside the copy, over each format of the cache."""
    gpu = bench.gpu
    for num_heads, num_kv_heads, head_dim in bench.sizes.heads:
        shape = {"H": num_heads, "K": num_kv_heads, "D": head_dim}
        for tokens in bench.sizes.prompts:
            batch, pages = random_batch([(tokens, tokens)], gpu.device)
            q = bench.random(tokens, num_heads, head_dim)
            out = torch.empty_like(q)
            each = q.transpose(0, 1)[None], *(bench.random(1, num_kv_heads, tokens, head_dim) for _ in range(2))

            def theirs(_: int, a: Any = each) -> torch.Tensor:
                return torch.nn.functional.scaled_dot_product_attention(*a, is_causal=True, enable_gqa=True)

            other, work = gpu.graph_us(theirs), 2 * tokens * tokens * num_heads * head_dim / 1e6
            for name, cache in caches(bench, pages, PAGE, num_kv_heads, head_dim):

                def ours(_: int, a: Any = (q, cache, batch, PLAIN, out)) -> None:
                    prefill_attention.triton(*a)

                us = gpu.graph_us(ours)
                row = {"kind": "prefill", "B": 1, "S": tokens, **shape, "cache": name, "us": us, "TFLOP/s": work / us}
                yield row | {"SDPA TFLOP/s": work / other, "share of SDPA": other / us}
        for sequences, context in bench.sizes.contexts:
            batch, pages = random_batch([(1, context)] * sequences, gpu.device)
            q = bench.random(sequences, num_heads, head_dim)
            out = torch.empty_like(q)
            for name, cache in caches(bench, pages, PAGE, num_kv_heads, head_dim):

                def decode(_: int, a: Any = (q, cache, batch, PLAIN, out)) -> None:
                    decode_attention.triton(*a, num_sequences=len(a[0]))

                # Data smaller than the second-level cache stays there between calls, and its share can exceed 1.
                nbytes = sum(pool.nbytes for pool in cache)
                row = {"kind": "decode", "B": sequences, "S": context, **shape, "cache": name}
                yield row | bench.rate(nbytes, gpu.graph_us(decode)) | {"MB": nbytes / 1e6}


def quantised(bench: Bench) -> Rows:
    """Yield products with weights in each form; each call reads other weights."""
    width, depth = bench.sizes.quantized
    for name, form in FORMS.items():
        if name == "fp8" and launch.target_of(bench.gpu.device).capability < 89:
            continue
        matrix = form(torch.randn(min(width, 256), depth))
        repeats = width // min(width, 256)
        whole = matrix.map(lambda array, n=repeats: array.to(bench.gpu.device).repeat(n, 1))
        copies = [whole.map(lambda array: array.clone()) for _ in range(8)]
        for batch in bench.sizes.quantized_rows:
            x = bench.random(batch, depth)
            us = bench.gpu.graph_us(lambda i, x=x, w=copies: quantized_matmul.triton(x, w[i % len(w)]))
            row: dict[str, Any] = {"form": name, "rows": batch, "N": width, "K": depth}
            yield row | bench.rate(whole.nbytes, us) | {"TFLOP/s": 2 * batch * width * depth / us / 1e6}


def pointwise(bench: Bench) -> Rows:
    """Yield the pointwise kernels, the experts, and the sampler."""

    def row(name: str, nbytes: int, function: Callable[..., object], *arguments: object) -> dict[str, Any]:
        return {"kernel": name, **bench.rate(nbytes, bench.gpu.graph_us(lambda _: function(*arguments)))}

    rows, hidden, width = bench.sizes.pointwise
    x, gain, wide = bench.random(rows, hidden), bench.random(hidden), bench.random(rows, 2 * width)
    yield row(f"norm {rows} x {hidden}", 2 * x.nbytes, KERNELS.rms_norm, x, gain, 1e-6)
    yield row(f"silu and mul {rows} x {width}", 3 * wide.nbytes // 2, gated_activation.triton, wide, "silu")
    count, choices, inner, model = bench.sizes.experts
    for tokens in bench.sizes.expert_tokens:
        experts, few = bench.random(count, 2 * inner, model), bench.random(tokens, model)
        routing = moe_routing.route.eager(bench.random(tokens, count), moe_routing.Picks(choices))
        used = int((routing.starts.diff() > 0).sum()) * experts[0].nbytes
        yield row(f"experts, {tokens} tokens", used, moe_matmul.triton, few, experts, routing)
        if tokens <= moe_routing.MAX_TOKENS:
            scores = bench.random(tokens, count)
            yield row(
                f"routing, {tokens} tokens", scores.nbytes, moe_routing.route.triton, scores, moe_routing.Picks(choices)
            )
    for num_rows in bench.sizes.sampled_rows:
        logits = bench.random(num_rows, bench.sizes.vocab, dtype=torch.float32)
        for name, asked in (("greedy", {"temperature": 0.0}), ("plain", {}), *FILTERS.items()):
            wanted = _sampling_rows(num_rows, bench.gpu.device, **{**NO_FILTER, **asked})
            yield row(f"sampling, {num_rows} rows, {name}", logits.nbytes, KERNELS.sample, logits, wanted)


NO_FILTER = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
FILTERS = {
    "top-k 20 and top-p 0.95": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    "top-p 0.95 of flat logits": {"temperature": 10.0, "top_p": 0.95},
}
"""Filters that Qwen3's authors recommend, and the filter with the most candidates."""


def _sampling_rows(num_rows: int, device: torch.device, **asked: float) -> SamplingRows:
    def all_rows(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((num_rows,), value, dtype=dtype, device=device)

    return SamplingRows(
        temperature=all_rows(asked["temperature"], torch.float32),
        top_k=all_rows(asked["top_k"], torch.int32),
        top_p=all_rows(asked["top_p"], torch.float32),
        min_p=all_rows(asked["min_p"], torch.float32),
        seeds=torch.arange(num_rows, device=device),
        counters=all_rows(0, torch.int32),
    )
