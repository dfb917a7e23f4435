"""Worker of a GPU with torch's CUDA build, Triton's launchers and a stub driver.

Kernels compute nothing, so tokens are counted and not read.
"""

from collections.abc import Callable
from typing import Any

import pytest

from neuron.device import jobs
from neuron.engine.graph_executor import buckets

pytestmark = pytest.mark.stub_cuda


def captured(device: Any) -> list[list[str]]:
    """Return the launches of each capture."""
    found: list[list[str]] = []
    inside = False
    for line in device.lines():
        if line == "capture begins":
            found.append([])
            inside = True
        elif line.startswith("capture ends"):
            inside = False
        elif inside and line.endswith(" captured"):
            found[-1].append(line.removesuffix(" captured"))
    return found


def test_a_model_is_served_and_gives_its_memory_back(start: Callable[..., Any]) -> None:
    device = start()
    assert isinstance(device.load(), jobs.Done)
    assert isinstance(device.load("other", quant="int8"), jobs.Done)
    loaded_bytes = device.used_bytes()
    device.generate(1)
    device.generate(2, 3, top_k=5)
    device.generate(4, 5, repetition_penalty=1.2, top_logprobs=3)
    assert device.tokens == dict.fromkeys(range(1, 6), 30)
    for name in ("m", "other"):
        device.send(jobs.Unload(2, name))
        assert isinstance(device.until(jobs.Done, jobs.JobFailed), jobs.Done)
    assert loaded_bytes > 2 * 40 << 20
    assert device.used_bytes() <= 4 << 20, "what kernels count in stays"
    device.send(jobs.Shutdown())
    assert device.process.wait(30) == 0


def test_a_graph_holds_kernels_alone(start: Callable[..., Any]) -> None:
    device = start()
    device.load()
    device.generate(1, 2)
    graphs = captured(device)
    assert len(graphs) == len(buckets(4))
    for graph in graphs:
        ours = [line for line in graph if line.startswith("kernel ")]
        layers = [line for line in ours if "_skinny" in line or "_gemv" in line or "attention" in line]
        assert len(layers) == 2 * 5 + 1, "five a layer, and the head"
        assert all(line.endswith(" dependent") for line in layers)
        assert not [line for line in graph if line.startswith(("copy", "malloc"))]
        # Each costs more than a microsecond of every step: those of torch fetch embeddings and widen the logits.
        assert len(ours) - len(layers) == 5, "the two ends of a step, angles, the last norm, sampling"
        assert len(graph) - len(ours) == 2
    # A step is launched as one, and copies nothing from memory that a device cannot reach.
    lines = device.lines()
    since = max(index for index, line in enumerate(lines) if line.startswith("capture ends"))
    steps = [line for line in lines[since:] if line.startswith("graph of")]
    assert len(steps) > 20
    assert not [line for line in lines[since:] if "pageable" in line]


@pytest.mark.parametrize(
    ("kind", "quant"),
    [("qwen3", "int4"), ("qwen3", "fp8"), ("qwen3_moe", "none"), ("qwen3_moe", "int8"), ("gemma3", "none")],
)
def test_every_form_is_captured(
    start: Callable[..., Any], make_model: Callable[[str], Any], kind: str, quant: str
) -> None:
    device = start()
    device.model = make_model(kind)
    answer = device.load(quant=quant)
    assert isinstance(answer, jobs.Done), answer
    device.generate(1, 2)
    assert device.tokens == {1: 30, 2: 30}
    assert [line for line in device.lines() if line.startswith("graph of")]
    if kind == "qwen3_moe":
        num_kernels = {"none": 10, "int8": 11}[quant]  # a norm of its own before what is quantised
        assert {len(graph) for graph in captured(device)} == {2 * num_kernels + 8}


def test_no_memory_for_a_model(start: Callable[..., Any]) -> None:
    device = start(STUB_CUDA_BYTES=str(24 << 20))
    answer = device.load(context_tokens=0, kv_cache_bytes=20 << 20)
    assert isinstance(answer, jobs.JobFailed)
    assert answer.error.code in {"model_does_not_fit", "out_of_memory"}
    assert isinstance(device.load(kv_cache_bytes=2 << 20), jobs.Done)
    device.generate(1)
    assert device.tokens[1] == 30


def test_no_memory_for_a_graph(start: Callable[..., Any]) -> None:
    device = start(STUB_CUDA_FAIL="cudaMalloc:0:2")
    device.load()
    device.generate(1, 2)
    assert device.tokens == {1: 30, 2: 30}
    assert not device.failures
    lines = device.lines()
    assert "cudaMalloc fails as asked" in lines
    assert not [line for line in lines if line.startswith("graph of")], "without graphs"


def test_no_memory_for_a_graph_to_be_launched_from(start: Callable[..., Any]) -> None:
    device = start(STUB_CUDA_FAIL="cuGraphInstantiateWithFlags:2:2")
    device.load()
    device.generate(1, 2)
    assert device.tokens == {1: 30, 2: 30}
    assert [line for line in device.lines() if line.startswith("graph of")], "the first one serves all"


def test_no_memory_for_a_kernel(start: Callable[..., Any]) -> None:
    device = start(STUB_CUDA_FAIL="cuModuleLoadData:3:2")
    answer = device.load()
    assert isinstance(answer, jobs.JobFailed)
    assert answer.error.code == "out_of_memory"
    assert isinstance(device.load(), jobs.Done)
    device.generate(1)
    assert device.tokens[1] == 30


@pytest.mark.parametrize("fault", ["cuGraphLaunch:7:700", "cuLaunchKernelEx:40:700"])
def test_a_fault_ends_the_worker_and_is_reported(start: Callable[..., Any], fault: str) -> None:
    device = start(STUB_CUDA_FAIL=fault)
    device.load()
    device.send(jobs.Generate(1, "m", b"\3\0\0\0" * 20, 100, (), jobs.SamplerSettings(temperature=1.0)))
    message = device.until(jobs.Poisoned)
    assert fault.partition(":")[0] in message.reason or "illegal memory access" in message.reason
    assert device.process.wait(30) == jobs.EXIT_POISONED
