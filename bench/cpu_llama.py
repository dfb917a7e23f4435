"""Measure llama.cpp through llama-cpp-python, and print the figures as JSON: the other side of ``cpu.py``.

Runs in an environment of its own, with nothing of this project. Every batch asks for all its logits' rows, as a server
that samples must; tokens are given, not chosen, so the time is that of ``llama_decode`` alone.
"""

import ctypes
import json
import pathlib
import random
import resource
import sys
import time
from typing import Any

import llama_cpp as api


def decode(context: Any, tokens: list[int], positions: list[int], sequences: list[int], wanted: list[int]) -> None:
    """Run one batch and wait for it."""
    batch = api.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, positions[i], 1, wanted[i]
        batch.seq_id[i][0] = sequences[i]
    assert api.llama_decode(context, batch) == 0
    api.llama_synchronize(context)
    api.llama_batch_free(batch)


def main() -> None:
    """Measure, print, end."""
    path, max_tokens, repeats, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    quiet = api.llama_log_callback(lambda *_: None)
    api.llama_log_set(quiet, ctypes.c_void_p(0))
    api.llama_backend_init()
    pathlib.Path(path).read_bytes()
    start = time.perf_counter()
    model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
    settings = api.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_seq_max = 4096, 2048, 512, 16
    settings.n_threads = settings.n_threads_batch = threads
    settings.kv_unified = True
    context = api.llama_init_from_model(model, settings)
    found: dict[str, float] = {"load_s": time.perf_counter() - start}
    memory = api.llama_get_memory(context)
    prompt = random.Random(0).choices(range(100, 49000), k=512)
    decode(context, prompt[:16], list(range(16)), [0] * 16, [0] * 15 + [1])
    found["load_to_first_token_s"] = time.perf_counter() - start
    for streams in (1, 4, 8, 16):
        best = 0.0
        for _ in range(repeats):
            api.llama_memory_clear(memory, True)
            for sequence in range(streams):
                decode(context, prompt[:64], list(range(64)), [sequence] * 64, [0] * 63 + [1])
            start = time.perf_counter()
            for i in range(max_tokens - 1):
                decode(context, prompt[i : i + 1] * streams, [64 + i] * streams, list(range(streams)), [1] * streams)
            best = max(best, streams * (max_tokens - 1) / (time.perf_counter() - start))
        found[f"generate_{streams}"] = best
    best = 0.0
    for _ in range(repeats):
        api.llama_memory_clear(memory, True)
        start = time.perf_counter()
        decode(context, prompt, list(range(512)), [0] * 512, [0] * 511 + [1])
        best = max(best, 512 / (time.perf_counter() - start))
    found["prompt_512"] = best
    found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(found))


if __name__ == "__main__":
    main()
