"""Measure the engine on a CPU through its messages, and print the figures as JSON: the one side of ``cpu.py``."""

import array
import json
import pathlib
import resource
import sys
import time
from typing import Any

import msgspec
import numpy as np
import torch

from cortex.wire.node import ModelSpec
from neuron.device import jobs
from neuron.device.probe import usable_cores
from neuron.engine.engine import Engine
from neuron.engine.process_memory import keep_activations_mapped

DECODER = msgspec.msgpack.Decoder(jobs.FromWorker)


def resident_bytes() -> int:
    """Return the most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def bandwidth(num_bytes: int = 256 << 20, repeats: int = 8) -> float:
    """Return the best rate, in GB/s, at which all cores read memory."""
    data = torch.ones(num_bytes // 4, dtype=torch.float32)
    best = 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        data.sum()
        best = max(best, num_bytes / (time.perf_counter() - start) / 1e9)
    return best


class Bench:
    """An engine, driven as a device loop drives it."""

    def __init__(self) -> None:
        self.sent: list[jobs.FromWorker] = []
        free = 8 << 30
        self.engine = Engine("cpu:0", self._take, lambda: (free, free), lambda: None)

    def _take(self, message: bytes) -> None:
        self.sent.append(DECODER.decode(message))

    def tell(self, message: jobs.ToWorker) -> None:
        """Send a job."""
        self.engine.handle(msgspec.msgpack.encode(message))

    def generate(self, number: int, prompt: list[int], max_tokens: int) -> None:
        """Start a sequence."""
        ids = array.array("i", prompt).tobytes()
        self.tell(jobs.Generate(number, "m", ids, max_tokens, (), jobs.SamplerSettings(temperature=0.0)))

    def rows(self) -> int:
        """Return how many tokens came."""
        return sum(len(message.rows) for message in self.sent if isinstance(message, jobs.Tokens))

    def run(self) -> float:
        """Step until nothing is left; return the seconds it took."""
        start = time.perf_counter()
        while self.engine.busy:
            self.engine.step()
        return time.perf_counter() - start


def main() -> None:
    """Measure, print, end."""
    path, max_tokens, repeats = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    keep_activations_mapped()
    torch.set_num_threads(usable_cores())
    found: dict[str, Any] = {"bandwidth_gb_s": bandwidth(), "import_bytes": resident_bytes()}
    bench = Bench()
    prompt = np.random.default_rng(0).integers(100, 49000, 512).tolist()
    pathlib.Path(path).read_bytes()  # the page cache is warm
    start = time.perf_counter()
    bench.tell(jobs.Load(1, ModelSpec("m", "bench", prefix_cache=False), path))
    bench.run()
    found["load_s"] = time.perf_counter() - start
    result = bench.sent[-1]
    assert isinstance(result, jobs.Done), result
    found["weights_bytes"] = result.result.weights_bytes
    bench.generate(1, prompt[:16], 1)
    bench.run()
    found["load_to_first_token_s"] = time.perf_counter() - start
    for streams in (1, 4, 8, 16):
        best = 0.0
        for _ in range(repeats):
            for number in range(streams):
                bench.generate(number, prompt[:64], max_tokens)
            bench.sent.clear()
            # Until everybody decodes; the rest is what is timed.
            while not (bench.sent and isinstance(bench.sent[-1], jobs.Tokens) and len(bench.sent[-1].rows) == streams):
                bench.engine.step()
            bench.sent.clear()
            elapsed = bench.run()
            best = max(best, bench.rows() / elapsed)
        found[f"generate_{streams}"] = best
    best = 0.0
    for _ in range(repeats):
        bench.generate(1, prompt, 1)
        best = max(best, 512 / bench.run())
    found["prompt_512"] = best
    found["peak_bytes"] = resident_bytes()
    found["bandwidth_gb_s"] = max(found["bandwidth_gb_s"], bandwidth())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
