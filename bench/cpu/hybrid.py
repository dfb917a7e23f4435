"""Speed of hybrid models on this CPU: decoding beside the memory's limit and eager torch, and prompts in chunks.

``python bench/cpu/hybrid.py``: random weights of the shape of Qwen3.5-0.8B, and the trained model of the tests. The
limit of decoding is the probed bandwidth over the bytes of a token: the weights that it multiplies, the state read and
written, and the keys and values before it. The probe reads as many bytes, over and over: the trained model stays in the
second-level caches, whose speed it is held to, so that its share shows what a step costs apart from its bytes. A prompt
is also computed token by token, one a step. llama.cpp decodes the trained model where ``run.py --build-peer`` has built
it and it knows the architecture.
"""

import dataclasses
import gc
import json
import pathlib
import tempfile
from typing import Any

import numpy as np
import report
import torch
from cpu import run
from cpu.engine import PROMPT_TOKENS, Bench, bandwidth
from hybrid_gguf import write_gguf
from hybrid_models import TRAINED
from safetensors.torch import save_file

from cortex.wire.node import ModelSpec
from neuron.device import jobs
from neuron.device.probe import usable_cores
from neuron.engine.model_engine import ModelEngine
from neuron.engine.process_memory import keep_activations_mapped
from neuron.layers.cache import SequenceState
from neuron.models.config import read_config
from neuron.models.model import ModelConfig

SHAPE: dict[str, Any] = {
    "model_type": "qwen3_5_text", "architectures": ["Qwen3_5ForCausalLM"], "vocab_size": 248320, "hidden_size": 1024,
    "intermediate_size": 3584, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256,
    "rms_norm_eps": 1e-6, "max_position_embeddings": 8192, "linear_num_key_heads": 16, "linear_num_value_heads": 16,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}, "eos_token_id": 0,
}  # fmt: skip


TRAINED_TOKENS = 2000
"""Output of the trained model: a tenth of a second."""


def write_model(folder: pathlib.Path, num_layers: int) -> pathlib.Path:
    """Write random weights of Qwen3.5-0.8B, of so many layers, to ``folder``, and return this."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**SHAPE, "num_hidden_layers": num_layers}))
    shapes = read_config(folder).without_draft_head().tensor_shapes()
    torch.manual_seed(1)
    tensors = {name: torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def bytes_per_token(config: ModelConfig, weights_bytes: int, context_tokens: int) -> int:
    """Return the bytes that a token reads and writes."""
    if not config.head.tied:
        weights_bytes -= weights_bytes * config.vocab_size * config.hidden_size // config.num_parameters()
    states = [cache.tensors[1].num_bytes(4) for cache in config.caches() if isinstance(cache, SequenceState)]
    return weights_bytes + 2 * sum(states) + context_tokens * config.kv_bytes_per_token("bfloat16")


def load(path: pathlib.Path, *, cpu_kernels: bool = True) -> tuple[Bench, ModelEngine, int]:
    """Return a bench with the model of ``path``, and the bytes of its weights."""
    bench = Bench(jobs.SamplerSettings(temperature=0.0), cpu_kernels=cpu_kernels)
    spec = ModelSpec("m", "bench", prefix_cache=False, dtype="bfloat16", max_sequences=1)
    bench.send(jobs.Load(1, spec, str(path)))
    bench.run()
    result = bench.sent[-1]
    assert isinstance(result, jobs.Done), result
    model = bench.engine._models["m"]
    assert model.plan.native == cpu_kernels
    return bench, model, result.result.weights_bytes


def prefill(bench: Bench, model: ModelEngine, prompt: list[int], step_tokens: int) -> float:
    """Return the tokens a second of a prompt in steps of so many."""
    scheduler = model.scheduler
    scheduler.limits = dataclasses.replace(scheduler.limits, step_tokens=step_tokens, mixed_step_tokens=step_tokens)
    bench.generate(1, prompt, 1)
    return len(prompt) / bench.run()


def measure(name: str, path: pathlib.Path, options: Any, tokens: int) -> dict[str, Any]:
    """Return the row of a model that decodes so many tokens."""
    bench, model, weights_bytes = load(path)
    config, most = model.config, model.scheduler.limits.step_tokens
    prompt = np.random.default_rng(0).integers(3, config.vocab_size, options.prompt).tolist()
    read = bytes_per_token(config, weights_bytes, PROMPT_TOKENS + tokens // 2)
    rates, shares = [], []
    for _ in range(options.repeats):
        before = bandwidth(read)
        rates.append(bench.decode(1, prompt[:PROMPT_TOKENS], tokens))
        shares.append(rates[-1] * read / 1e9 / max(before, bandwidth(read)))
    found = {
        "model": name,
        "MB of a token": read / 1e6,
        "decode, tokens/s": max(rates),
        "share of the limit": sorted(shares)[len(shares) // 2],
        "prompt in chunks": max(prefill(bench, model, prompt, most) for _ in range(options.repeats)),
        "token by token": prefill(bench, model, prompt, 1),
    }
    del bench, model
    gc.collect()
    bench, _, _ = load(path, cpu_kernels=False)
    return {**found, "decode in eager torch": bench.decode(1, prompt[:PROMPT_TOKENS], min(tokens, 32))}


def peer_rate(folder: pathlib.Path, tokens: int, notes: list[str]) -> float | None:
    """Return llama.cpp's tokens a second on the trained model; ``None`` with a note where it cannot run it."""
    path = write_gguf(TRAINED["qwen3_5"], folder / "trained.gguf")
    build = next((each for each in (run.PEER, run.PEER_NO_AMX) if (each / "done").exists()), None)
    if build is None:
        notes.append("llama.cpp is not built: run.py --build-peer")
        return None
    try:
        return float(run.run(*run.peer(build, path, "--streams", 1, "--tokens", tokens, "--repeats", 1))["generate_1"])
    except run.SideFailedError as error:
        notes.append(f"FAILED llama.cpp: {error}")
        return None


def main() -> None:
    """Measure and print."""
    parser = report.arguments(__doc__)
    parser.add_argument("--layers", type=int, default=24, help="of the random model, a multiple of 4")
    parser.add_argument("--tokens", type=int, default=64, help="generated by a stream of the random model")
    parser.add_argument("--prompt", type=int, default=2000, help="tokens of the prompt")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    keep_activations_mapped()
    torch.set_num_threads(usable_cores())
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        large = measure("0.8B, random", write_model(folder / "random", options.layers), options, options.tokens)
        trained = measure("trained", TRAINED["qwen3_5"], options, TRAINED_TOKENS)
        trained["llama.cpp"] = peer_rate(folder, TRAINED_TOKENS, notes)
    ratios = {}
    for row, suffix in ((large, ""), (trained, "_trained")):
        ratios[f"decode_share{suffix}"] = row["share of the limit"]
        ratios[f"chunks_over_tokens{suffix}"] = row["prompt in chunks"] / row["token by token"]
        ratios[f"native_over_eager{suffix}"] = row["decode, tokens/s"] / row["decode in eager torch"]
    report.write(
        "hybrid",
        [large, trained],
        question="How fast do hybrid models decode on this CPU, beside the memory's limit, and read prompts in chunks?",
        packages=("torch",),
        ratios=ratios,
        keep=options.keep,
        notes=notes,
    )


if __name__ == "__main__":
    main()
