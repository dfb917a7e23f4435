"""The known models: each entry agrees with the code of its family, by the published configuration. No network."""

import functools
import json
import pathlib
import tempfile
from typing import Any

import msgspec
import pytest

from cortex.config import ModelProfile
from cortex.fleet import placement
from cortex.fleet.state import FleetState, Node
from cortex.known_models import BITS, KnownModel, known_models, search
from cortex.wire.node import (
    Capability,
    Device,
    DeviceKind,
    Discovery,
    Health,
    ModelSpec,
    NodeState,
    WorkerState,
)
from neuron.layers.cache import PagedKV, SequenceState
from neuron.load import source
from neuron.load.choices import tag_of
from neuron.models.config import read_config
from neuron.models.gguf import TensorKind
from neuron.models.model import ModelConfig
from neuron.models.sizing import plan_memory

ROOT = pathlib.Path(__file__).parents[2]
GIB = 1 << 30
PUBLISHED: dict[str, Any] = json.loads((ROOT / "tests/neuron/models/published.json").read_text())
CONFIGURATIONS: dict[str, str | tuple[str, dict[str, int]]] = {
    "smollm2-135m": "SmolLM2-135M",
    "smollm3-3b": "SmolLM3-3B",
    "gemma-3-270m": "gemma-3-270m",
    "gemma-3-1b": "gemma-3-1b",
    "gemma-3-4b": "gemma-3-4b-it",
    "llama-3.2-1b": "Llama-3.2-1B",
    "llama-3.1-8b": "Llama-3.1-8B",
    "qwen2.5-7b": "Qwen2.5-7B",
    "qwen3-0.6b": "Qwen3-0.6B",
    "qwen3-1.7b": "Qwen3-1.7B",
    "qwen3-4b": "Qwen3-4B",
    "qwen3-8b": "Qwen3-8B",
    "qwen3-14b": "Qwen3-14B",
    "qwen3-32b": "Qwen3-32B",
    "qwen3-30b-a3b": "Qwen3-30B-A3B",
    "qwen3-4b-2507": ("Qwen3-4B", {"max_position_embeddings": 262144}),
    "qwen3-30b-a3b-2507": ("Qwen3-30B-A3B", {"max_position_embeddings": 262144}),
    "qwen3-coder-30b-a3b": ("Qwen3-30B-A3B", {"max_position_embeddings": 262144}),
    "qwen3-next-80b-a3b": "Qwen3-Next-80B-A3B",
    "qwen3.5-0.8b": "Qwen3.5-0.8B",
    "qwen3.5-9b": "Qwen3.5-9B",
    "qwen3.5-27b": "Qwen3.5-27B",
    "qwen3.5-35b-a3b": "Qwen3.5-35B-A3B",
    "qwen3.6-27b": "Qwen3.5-27B",
    "phi-4-mini": "Phi-4-mini",
    "mistral-small-3.1-24b": "Mistral-Small-3.1-24B",
    "devstral-small-2": "Devstral-Small-2",
    "glm-4.5-air": "GLM-4.5-Air",
}
"""Configuration of each: a folder of packaging/kernels or an entry of published.json, with what differs in it."""
MODELS = known_models()


def raw_configuration(name: str) -> dict[str, Any]:
    given = CONFIGURATIONS[name]
    shape, changes = (given, {}) if isinstance(given, str) else given
    path = ROOT / "packaging" / "kernels" / shape / "config.json"
    raw: dict[str, Any] = json.loads(path.read_text()) if path.exists() else PUBLISHED[shape]["config"]
    return raw | changes


@functools.cache
def configuration(name: str) -> ModelConfig:
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder, "config.json").write_text(json.dumps(raw_configuration(name)))
        return read_config(pathlib.Path(folder))


def test_every_known_model_has_a_configuration_that_it_is_held_to() -> None:
    assert set(CONFIGURATIONS) == set(MODELS)


@pytest.mark.parametrize("model", MODELS.values(), ids=lambda model: model.name)
def test_the_sizes_are_those_of_the_family(model: KnownModel) -> None:
    config = configuration(model.name)
    assert raw_configuration(model.name)["model_type"].removesuffix("_text") == model.architecture
    assert config.num_parameters() == model.parameters
    assert config.context_tokens == model.context_tokens
    token_bytes = state_bytes = 0
    for cache in config.caches():
        if isinstance(cache, SequenceState):
            state_bytes += cache.num_bytes(2)
        elif isinstance(cache, PagedKV):
            token_bytes += 0 if cache.window_tokens else 2 * cache.elements_per_token
            state_bytes += 2 * cache.elements_per_token * cache.window_tokens
    assert (token_bytes, state_bytes) == (model.cache_bytes_per_token, model.state_bytes)


@pytest.mark.parametrize("model", MODELS.values(), ids=lambda model: model.name)
def test_an_entry_makes_a_model_of_the_catalogue(model: KnownModel) -> None:
    profile = msgspec.convert(msgspec.to_builtins(model.profile()), ModelProfile)
    assert (profile.id, profile.source, profile.sampling) == (model.name, model.source, model.sampling)
    source.parse(profile.source)
    assert model.profile("Q8_0").source == f"{model.source}:Q8_0"
    assert set(model.quants) <= set(BITS)
    assert len(set(model.capabilities) & {Capability.CHAT, Capability.COMPLETION}) == 1


def test_memory_is_about_what_a_load_takes() -> None:
    """Weights and cache of one sequence; work space and further sequences come to it."""
    model, config = MODELS["qwen3-0.6b"], configuration("qwen3-0.6b")
    for tokens in (8192, 32768):
        spec = ModelSpec("m", "hf:o/n", context_tokens=tokens, max_sequences=1, kv_cache_bytes=0)
        plan = plan_memory(config, spec, "cuda:0", 80 * GIB)
        assert plan.weights_bytes == pytest.approx(model.weights_bytes("BF16"), rel=0.01)
        least = model.weights_bytes("BF16") + tokens * model.cache_bytes_per_token
        assert model.memory_bytes("BF16", tokens) == least
        assert least <= plan.total_bytes
    assert model.memory_bytes("Q8_0", 1 << 30) == model.memory_bytes("Q8_0", model.context_tokens)


def test_bits_are_those_of_the_formats() -> None:
    for name in ("Q4_1", "Q8_0", "BF16"):
        assert BITS[name] == 8 * TensorKind[name].block_bytes / TensorKind[name].block
    assert 8 * TensorKind.Q4_K.block_bytes / TensorKind.Q4_K.block < BITS["Q4_K_M"]
    assert all(tag_of(f"m-{name}.gguf") == name for name in BITS)


@pytest.mark.parametrize(
    ("words", "found"),
    [("SMOLLM2", {"smollm2-135m"}), ("qwen3.5 reasoning", {n for n in MODELS if n.startswith("qwen3.5")}),
     ("no such", set()), ("", set(MODELS))],
)  # fmt: skip
def test_a_search_finds_what_has_all_words(words: str, found: set[str]) -> None:
    assert {model.name for model in search(words, MODELS)} == found


def test_a_known_size_places_a_model_that_no_node_has_loaded() -> None:
    def node(name: str, gib: int) -> Node:
        device = Device("cpu:0", DeviceKind.CPU, "a CPU", gib * GIB, gib * GIB, worker=WorkerState.READY)
        discovery = Discovery(name, "0", "host", "linux", None, None, (device,), ("torch",), ())
        return Node(name, "", up=True, polled=True, discovery=discovery, health=Health(NodeState.READY, 1.0, ()))

    state = FleetState.of([node("small", 4), node("large", 16)])
    chosen = placement.choose(state, MODELS["qwen3.5-9b"].profile())
    assert [candidate.node for candidate in chosen] == ["large"]
