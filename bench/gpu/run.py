"""The kernels and whole models on a GPU: right on it, and how near to what the card can do?

Ceilings are measured in the same run: a copy for bytes, cuBLAS for products, torch's scaled dot product attention for
prefill. Times are of whole CUDA graphs of many nodes, so that launches cost what they cost in a decode step.
Run from the root of a checkout: `python bench/gpu/run.py --keep`, or in two calls of under ten minutes each with
`--part kernels` and `--part models`. It needs torch, triton and msgspec, and no build: nothing native is imported.
"""

import os
import pathlib
import statistics
import sys
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "bench" / "gpu")]

import report  # noqa: E402

PACKAGES = ("torch", "triton", "numpy")
NODES = 20


def graph_us(torch: Any, call: Callable[[int], object]) -> float:
    """Return the time of one ``call`` in microseconds: the median of replays of a graph of NODES calls."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(3):
            call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(NODES):
            call(i)
    samples = []
    for _ in range(12):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        samples.append(start.elapsed_time(stop) * 1e3 / NODES)
    return statistics.median(samples[2:])


def numbers(torch: Any, keep: bool) -> bool:
    """Check every kernel on the device against its reference; return whether all are right."""
    from neuron.triton_kernels import cases

    device = torch.device("cuda")
    rows, good = [], True
    for case in cases.numeric_cases():
        # The matrix units make TF32 of float32, which no model is run in here.
        if case.dtype == torch.float32 and case.name not in ("norm", "activation", "rope", "sampling"):
            continue
        torch.manual_seed(0)
        error = case.error(device)
        good &= error <= case.tolerance
        verdict = "right" if error <= case.tolerance else "WRONG"
        rows.append({"case": case.name, "dtype": str(case.dtype), "error": error, "verdict": verdict})
    report.write("gpu_numbers", rows, question="Are the kernels right on this card?", packages=PACKAGES, keep=keep)
    return good


def copy_gb_s(torch: Any) -> float:
    """Return the bandwidth of a copy of 1 GiB, counting both ways."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / graph_us(torch, lambda _: target.copy_(source)) / 1e3


def gemv(torch: Any, ceiling: float) -> list[dict[str, Any]]:
    """Time projections of 1 to 64 rows; each node reads other weights, so that nothing is in the cache."""
    from neuron.triton_kernels import launch
    from neuron.triton_kernels.skinny_matmul import skinny_matmul

    here = launch.target_of(torch.device("cuda"))
    rows = []
    for width, depth in ((1024, 1024), (4096, 4096), (24576, 4096), (4096, 12288), (151936, 4096)):
        copies = max(1, min(8, (1 << 30) // (2 * width * depth)))
        weights = [torch.randn(width, depth, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
        for batch in (1, 8, 64):
            x = torch.randn(batch, depth, device="cuda", dtype=torch.bfloat16)
            nbytes = weights[0].nbytes + x.nbytes + 2 * batch * width
            row: dict[str, Any] = {"rows": batch, "N": width, "K": depth}
            for name, capability in (("dependent", here.capability), ("plain", min(here.capability, 80))):
                if name == "dependent" and not here.has_dependent_launch:
                    continue
                with launch.targeting(launch.Target(capability, here.num_sms)):
                    us = graph_us(torch, lambda i, x=x, w=weights: skinny_matmul(x, w[i % len(w)]))
                row |= {f"{name} GB/s": nbytes / us / 1e3, f"{name} share of copy": nbytes / us / 1e3 / ceiling}
            us = graph_us(torch, lambda i, x=x, w=weights: torch.mm(x, w[i % len(w)].t()))
            rows.append(row | {"cuBLAS GB/s": nbytes / us / 1e3})
    return rows


def products(torch: Any) -> list[dict[str, Any]]:
    """Time the large matmul beside cuBLAS."""
    from neuron.triton_kernels.matmul import matmul

    rows = []
    for width, depth in ((6144, 4096), (24576, 4096), (4096, 12288)):
        weight = torch.randn(width, depth, device="cuda", dtype=torch.bfloat16)
        for batch in (16, 128, 256, 512, 2048, 8192):
            x = torch.randn(batch, depth, device="cuda", dtype=torch.bfloat16)
            work = 2 * batch * width * depth / 1e6
            ours = work / graph_us(torch, lambda _, x=x, w=weight: matmul(x, w))
            theirs = work / graph_us(torch, lambda _, x=x, w=weight: torch.mm(x, w.t()))
            rows.append({"M": batch, "N": width, "K": depth, "TFLOP/s": ours, "cuBLAS": theirs, "share": ours / theirs})
    return rows


def attention(torch: Any, ceiling: float) -> list[dict[str, Any]]:
    """Time prefill attention beside torch's, and decode attention beside the copy."""
    from neuron.triton_kernels.cases import random_batch
    from neuron.triton_kernels.decode_attention import decode_attention
    from neuron.triton_kernels.prefill_attention import prefill_attention

    device, rows = torch.device("cuda"), []
    for num_heads, num_kv_heads, head_dim in ((32, 8, 128), (9, 3, 64)):
        for tokens in (1024, 8192):
            batch, pages = random_batch([(tokens, tokens)], device)
            caches = torch.randn(2, pages, 16, num_kv_heads, head_dim, device="cuda", dtype=torch.bfloat16)
            q = torch.randn(tokens, num_heads, head_dim, device="cuda", dtype=torch.bfloat16)
            out = torch.empty_like(q)
            us = graph_us(torch, lambda _: prefill_attention(q, *caches, batch, 0.1, out))  # noqa: B023
            heads = q.transpose(0, 1)[None]
            keys, values = (
                c[1:].reshape(-1, num_kv_heads, head_dim)[:tokens].transpose(0, 1)[None].contiguous() for c in caches
            )
            sdpa = torch.nn.functional.scaled_dot_product_attention
            other = graph_us(torch, lambda _: sdpa(heads, keys, values, is_causal=True, enable_gqa=True))  # noqa: B023
            work = 2 * tokens * tokens * num_heads * head_dim / 1e6
            row = {"kind": "prefill", "B": 1, "S": tokens, "H": num_heads, "D": head_dim, "us": us}
            rows.append(row | {"TFLOP/s": work / us, "SDPA TFLOP/s": work / other, "share": other / us})
        for sequences, context in ((1, 4096), (1, 32768), (32, 4096), (128, 1024)):
            batch, pages = random_batch([(1, context)] * sequences, device)
            caches = torch.randn(2, pages, 16, num_kv_heads, head_dim, device="cuda", dtype=torch.bfloat16)
            q = torch.randn(sequences, num_heads, head_dim, device="cuda", dtype=torch.bfloat16)
            out = torch.empty_like(q)
            us = graph_us(torch, lambda _: decode_attention(q, *caches, batch, 0.1, out, num_sequences=len(q)))  # noqa: B023
            rate = caches.nbytes / us / 1e3
            row = {"kind": "decode", "B": sequences, "S": context, "H": num_heads, "D": head_dim, "us": us}
            # Under 50 MB the cache stays in the second level between replays, and the share can exceed 1.
            rows.append(row | {"GB/s": rate, "share": rate / ceiling})
    return rows


def quantised(torch: Any, ceiling: float) -> list[dict[str, Any]]:
    """Time products with weights in each form; each node reads others."""
    from neuron.triton_kernels.cases import quantized_forms
    from neuron.triton_kernels.quantized_matmul import quantized_matmul

    rows = []
    width, depth = 12288, 4096
    small = quantized_forms(torch.randn(256, depth))
    for name, matrix in small.items():
        if name == "fp8" and torch.cuda.get_device_capability() < (8, 9):
            continue
        whole = matrix.map(lambda array: array.to("cuda").repeat(width // 256, 1))
        copies = [whole.map(lambda array: array.clone()) for _ in range(8)]
        for batch in (1, 8, 64, 2048):
            x = torch.randn(batch, depth, device="cuda", dtype=torch.bfloat16)
            us = graph_us(torch, lambda i, x=x, w=copies: quantized_matmul(x, w[i % len(w)]))
            rate = whole.nbytes / us / 1e3
            row = {"form": name, "rows": batch, "N": width, "K": depth, "us": us, "GB/s": rate}
            rows.append(row | {"share of copy": rate / ceiling, "TFLOP/s": 2 * batch * width * depth / us / 1e6})
    return rows


def pointwise(torch: Any, ceiling: float) -> list[dict[str, Any]]:
    """Time what moves bytes only, the experts, and the sampler."""
    from neuron.triton_kernels import activation, moe_matmul, norm, sampling, sampling_cases
    from neuron.triton_kernels.routing import route

    rows = []

    def add(name: str, nbytes: int, call: Callable[[int], object]) -> None:
        us = graph_us(torch, call)
        rows.append({"kernel": name, "us": us, "GB/s": nbytes / us / 1e3, "share of copy": nbytes / us / 1e3 / ceiling})

    def random(*shape: int) -> Any:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    x, gain, wide = random(8192, 4096), random(4096), random(8192, 24576)
    add("norm 8192 x 4096", 2 * x.nbytes, lambda _: norm.rms_norm(x, gain, 1e-6))
    add("silu and mul 8192 x 24576", 3 * wide.nbytes // 2, lambda _: activation.silu_and_mul(wide))
    for tokens in (1, 32, 512):
        experts, few = random(128, 1536, 2048), random(tokens, 2048)
        routing = route(random(tokens, 128), 8)
        used = int((routing.starts.diff() > 0).sum()) * experts[0].nbytes
        add(f"experts, {tokens} tokens", used, lambda _, r=routing, e=experts, f=few: moe_matmul.moe_matmul(f, e, r))
    for num_rows in (1, 64):
        asked = sampling_cases.random_rows(num_rows, 151936, torch.device("cuda"), everything=False)
        logits = torch.randn(num_rows, 151936, device="cuda")
        add(f"sampling, {num_rows} rows", logits.nbytes, lambda _, a=asked, v=logits: sampling.sample_rows(v, a))
    return rows


def nodes(torch: Any) -> list[dict[str, Any]]:
    """Time a node that does next to nothing, with and without dependent launch."""
    from neuron.triton_kernels import launch
    from neuron.triton_kernels.skinny_matmul import skinny_matmul

    here = launch.target_of(torch.device("cuda"))
    x = torch.randn(1, 64, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(64, 64, device="cuda", dtype=torch.bfloat16)
    rows = []
    for name, capability in (("dependent launch", here.capability), ("plain launch", min(here.capability, 80))):
        if name == "plain launch" or here.has_dependent_launch:
            with launch.targeting(launch.Target(capability, here.num_sms)):
                rows.append({"node": name, "us": graph_us(torch, lambda _: skinny_matmul(x, weight))})
    return rows


def table(name: str, question: str, parts: Iterable[Callable[[], Iterable[dict[str, Any]]]], **settings: Any) -> bool:
    """Write what ``parts`` yield, as far as each gets, so that one that fails costs no other its figures."""
    rows: list[dict[str, Any]] = []
    good = True
    for part in parts:
        try:
            for row in part():
                rows.append(row)
        except Exception:  # noqa: BLE001 (whatever it is, it is this part's)
            traceback.print_exc()
            good = False
    report.write(name, rows, question=question, notes=() if good else ("a part of it failed",), **settings)
    return good


def models(ceiling: float, settings: dict[str, Any]) -> bool:
    """Measure whole models; return whether all went well."""
    import models as whole

    wanted = [(name, "none") for name in whole.SHAPES] + [("8B", "int8"), ("8B", "int4")]
    decode = [partial(whole.decode_rows, ceiling, name, quant) for name, quant in wanted]
    prefill = [partial(whole.prefill_rows, name) for name in ("1.7B", "8B")]
    good = table("gpu_decode", "Decode: how much of the copy's bandwidth?", decode, **settings)
    good &= table("gpu_prefill", "Prefill: how many products a second?", prefill, **settings)
    return table("gpu_load", "Loading: how much of the bus?", [whole.load_rows], **settings) and good


def main() -> int:
    """Run all, or say why not."""
    parser = report.arguments(__doc__)
    parser.add_argument("--part", choices=("all", "kernels", "models"), default="all")
    options = parser.parse_args()
    try:
        import torch
        import triton
    except ModuleNotFoundError as error:
        print(f"skipped: {error.name} is not installed")
        return 0
    if not torch.cuda.is_available():
        print("skipped: no CUDA device")
        return 0
    if os.environ.get("TRITON_INTERPRET"):
        print("skipped: TRITON_INTERPRET is set")
        return 0
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)
    good = options.part == "models" or numbers(torch, options.keep)
    ceiling = copy_gb_s(torch)
    ratios = {"copy GB/s": ceiling}
    settings: dict[str, Any] = {"packages": PACKAGES, "keep": options.keep, "ratios": ratios}
    if options.part != "kernels":
        good &= models(ceiling, settings)
    if options.part == "models":
        return 0 if good else 1
    for name, question, call in (
        ("gpu_nodes", "What does a node of a graph cost?", partial(nodes, torch)),
        ("gpu_quantised", "Quantised products?", partial(quantised, torch, ceiling)),
        ("gpu_pointwise", "The other kernels?", partial(pointwise, torch, ceiling)),
        ("gpu_gemv", "GEMV: how much of the copy's bandwidth?", partial(gemv, torch, ceiling)),
        ("gpu_matmul", "Matmul: how much of cuBLAS?", partial(products, torch)),
        ("gpu_attention", "Attention: SDPA and the copy?", partial(attention, torch, ceiling)),
    ):
        good &= table(name, question, [call], **settings)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
