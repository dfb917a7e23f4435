"""Worker on a stub CUDA device: torch's CUDA build and Triton, over the library of cuda.c."""

import array
import collections
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from cortex.wire.node import ModelSpec
from neuron.device import jobs
from neuron.device.channel import Channel, socket_pair
from neuron.engine_settings import EngineSettings, WorkerSettings

HERE = pathlib.Path(__file__).parent
PROMPT = array.array("i", range(3, 23)).tobytes()


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    import nvidia.cu13  # type: ignore[import-not-found]

    built = tmp_path_factory.mktemp("cuda") / "libcuda.so.1"
    headers = pathlib.Path(next(iter(nvidia.cu13.__path__))) / "include"
    command = ["gcc", "-shared", "-fPIC", "-O1", "-g", "-Wall", "-Wno-unused", "-Werror", "-fvisibility=hidden"]
    command += [f"-I{headers}", "-Wl,-soname,libcuda.so.1", str(HERE / "cuda.c"), "-o", str(built)]
    subprocess.run(command, check=True)
    (built.parent / "libnvidia-ml.so.1").symlink_to(built)
    return built


@pytest.fixture(scope="session")
def environment(library: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment variables with which a process finds the stub device."""
    caches = tmp_path_factory.mktemp("caches")
    return {
        "LD_PRELOAD": str(library),
        "LD_LIBRARY_PATH": str(library.parent),
        "TRITON_LIBCUDA_PATH": str(library.parent),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "NEURON_ENGINE__KERNEL_CACHE": str(caches / "kernels"),
        "NEURON_ENGINE__SPECULATION": "false",
    }


SMALL = {
    "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 32, "intermediate_size": 96, "tie_word_embeddings": False, "max_position_embeddings": 40960,
}  # fmt: skip
MODELS = {
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
    "qwen3_moe": {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 48, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
    },
    "gemma3": {
        "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention"], "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 32, "tie_word_embeddings": True,
    },
}  # fmt: skip


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], pathlib.Path]:
    """Factory of small models of random weights, by a key of MODELS."""
    import torch
    from safetensors.torch import save_file

    from neuron.models.config import read_config

    def make(kind: str) -> pathlib.Path:
        folder = tmp_path_factory.mktemp(kind)
        (folder / "config.json").write_text(json.dumps({**SMALL, **MODELS[kind]}))
        shapes = read_config(folder).tensor_shapes()
        save_file({name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}, folder / "model.safetensors")
        return folder

    return make


@pytest.fixture(scope="session")
def model(make_model: Callable[[str], pathlib.Path]) -> pathlib.Path:
    return make_model("qwen3")


@dataclasses.dataclass
class Device:
    """Process of a worker, and the messages received from it."""

    channel: Channel
    process: subprocess.Popen[bytes]
    log: pathlib.Path
    model: pathlib.Path
    tokens: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    failures: dict[int, str] = dataclasses.field(default_factory=dict)
    ends: tuple[int, ...] = (0, jobs.EXIT_POISONED)
    """Exit statuses that it may end with."""

    def send(self, message: jobs.ToWorker) -> None:
        self.channel.send(msgspec.msgpack.encode(message))

    def receive(self) -> Any:
        message = msgspec.msgpack.decode(self.channel.recv(200.0), type=jobs.FromWorker)
        if isinstance(message, jobs.Tokens):
            for row in message.rows:
                self.tokens[row.sequence] += len(row.ids) // 4
        elif isinstance(message, jobs.SequenceFailed):
            self.failures[message.sequence] = message.error.code
        return message

    def until(self, *kinds: type) -> Any:
        while not isinstance(message := self.receive(), kinds):
            pass
        return message

    def load(self, name: str = "m", **spec: Any) -> Any:
        settings = {"dtype": "bfloat16", "max_sequences": 4, "context_tokens": 512, **spec}
        self.send(jobs.Load(1, ModelSpec(name, "test", **settings), str(self.model)))
        return self.until(jobs.Done, jobs.JobFailed)

    def used_bytes(self) -> int:
        self.send(jobs.QueryMemory(9))
        found: int = self.until(jobs.Done).result.used_bytes
        return found

    def generate(self, *numbers: int, max_tokens: int = 30, **settings: Any) -> None:
        """Run sequences to their ends."""
        sampler = jobs.SamplerSettings(**{"temperature": 1.0, **settings})
        for number in numbers:
            self.send(jobs.Generate(number, "m", PROMPT, max_tokens, (), sampler))
        ended: set[int] = set()
        while len(ended) < len(numbers):
            message = self.until(jobs.Tokens, jobs.SequenceFailed)
            rows = message.rows if isinstance(message, jobs.Tokens) else ()
            ended |= {row.sequence for row in rows if row.end is not None} | (self.failures.keys() & set(numbers))

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture
def start(environment: dict[str, str], model: pathlib.Path, tmp_path: pathlib.Path) -> Iterator[Callable[..., Device]]:
    started: list[Device] = []
    log = tmp_path / "log"

    def start_one(**settings: str) -> Device:
        ours, theirs = socket_pair()
        engine = EngineSettings(speculation=False, kernel_cache=environment["NEURON_ENGINE__KERNEL_CACHE"])
        worker = msgspec.json.encode(WorkerSettings(engine)).decode()
        command = [sys.executable, "-m", "neuron.engine", "--device", "cuda:0", "--channel-fd", str(theirs)]
        command += ["--settings", worker]
        variables = {**os.environ, **environment, "STUB_CUDA_LOG": str(log), **settings}
        process = subprocess.Popen(command, pass_fds=[theirs], env=variables)
        os.close(theirs)
        started.append(Device(Channel(ours), process, log, model))
        started[-1].until(jobs.Ready)
        return started[-1]

    yield start_one
    for device in started:
        device.channel.close()
        assert device.process.wait(30) in device.ends
        assert not [line for line in device.lines() if "FORBIDDEN" in line]
