"""Rate at which weights load, beside reading the same bytes, and the memory that a load needs.

A random Llama in bfloat16 is written to a file and loaded from the page cache through the engine's messages, on the
native kernels (which repack every matrix) and in eager torch (which copies it). The peer is ``readinto`` of the same
files into new memory. Peak memory is the anonymous memory that a load adds to its process: pages of the
mapped file are the page cache's.

    python bench/engine/load.py [--keep]
"""

import json
import mmap
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import report

SIZES: dict[str, int] = {
    "vocab_size": 32_000, "hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 16,
    "num_attention_heads": 12, "num_key_value_heads": 4, "max_position_embeddings": 2048,
}  # fmt: skip
REPEATS = 3
CHUNK_BYTES = 8 << 20


def write_checkpoint(folder: pathlib.Path) -> int:
    """Write a model of random weights; return its bytes."""
    import safetensors.torch
    import torch

    settings = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True, **SIZES}
    (folder / "config.json").write_text(json.dumps(settings))
    from neuron.models.config import read_config

    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator).to(torch.bfloat16)
        for name, shape in read_config(folder).tensor_shapes().items()
    }
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    return sum(tensor.nbytes for tensor in tensors.values())


def read_rate(path: pathlib.Path) -> float:
    """Return the bytes per second at which the page cache fills new memory, best of several."""
    best = 0.0
    for _ in range(REPEATS + 1):  # the first warms the cache
        start = time.perf_counter()
        buffer = memoryview(mmap.mmap(-1, path.stat().st_size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        with path.open("rb", buffering=0) as file:
            done = 0
            while count := file.readinto(buffer[done : done + CHUNK_BYTES]):
                done += count
        best = max(best, done / (time.perf_counter() - start))
    return best


LOAD = """
import json, pathlib, sys, time
import msgspec, torch
from cortex.wire.node import ModelSpec
from neuron.device import jobs
from neuron.device.probe import usable_cores
from neuron.engine.engine import Engine
from neuron.engine_settings import EngineSettings
from neuron.engine.process_memory import keep_activations_mapped

keep_activations_mapped()
torch.set_num_threads(usable_cores())
sent = []
decode = msgspec.msgpack.Decoder(jobs.FromWorker).decode
FREE = (12 << 30, 12 << 30)
settings = EngineSettings(cpu_kernels=sys.argv[3] == "on")
engine = Engine("cpu:0", lambda data: sent.append(decode(data)), lambda: FREE, lambda: None, settings=settings)
found = []

def own_bytes():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024

before = peak = own_bytes()
for number in range(int(sys.argv[2])):
    start = time.perf_counter()
    engine.handle(msgspec.msgpack.encode(jobs.Load(number, ModelSpec("m", "x", dtype="bfloat16"), sys.argv[1])))
    while engine.busy:
        engine.step()
        peak = max(peak, own_bytes())
    found.append(time.perf_counter() - start)
    assert isinstance(sent[-1], jobs.Done), sent[-1]
    weights_bytes = sent[-1].result.weights_bytes
    engine.handle(msgspec.msgpack.encode(jobs.Unload(100 + number, "m")))
print(json.dumps({"seconds": min(found), "weights_bytes": weights_bytes, "peak_bytes": peak - before}))
"""


def load(folder: pathlib.Path, kernels: str) -> dict[str, Any]:
    """Load in a process of its own; return what it measured."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", LOAD, str(folder), str(REPEATS), kernels],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure and print."""
    options = report.arguments(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        num_bytes = write_checkpoint(folder)
        rate = read_rate(folder / "model.safetensors")
        rows: list[dict[str, Any]] = [{"what": "read the file", "GB/s": rate / 1e9}]
        ratios = {}
        for name, kernels in (("native", "on"), ("eager", "off")):
            found = load(folder, kernels)
            rows.append(
                {
                    "what": f"load, {name}", "GB/s": num_bytes / found["seconds"] / 1e9, "s": found["seconds"],
                    "peak over weights": found["peak_bytes"] / found["weights_bytes"],
                }
            )  # fmt: skip
            ratios[f"load_{name}_over_read"] = num_bytes / found["seconds"] / rate
            ratios[f"peak_{name}_over_weights"] = found["peak_bytes"] / found["weights_bytes"]
    report.write(
        "load", rows, question="How fast weights come from the page cache into a worker", packages=("torch",),
        ratios=ratios, keep=options.keep,
    )  # fmt: skip


if __name__ == "__main__":
    main()
