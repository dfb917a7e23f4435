"""The fit of a repository's weights to free memory, and surveys of a served repository."""

import asyncio
import dataclasses
import functools
import json
import pathlib
import tempfile
from collections.abc import Iterator

import gguf
import pytest
from file_server import FileServer, publish_repository, serve_files
from hypothesis import example, given, settings
from hypothesis import strategies as st
from local_texts import LocalTexts
from model_files import QUANTISED, safetensors_file

from cortex.wire.node import WANTED_TOKENS, ModelSpec
from neuron.device.jobs import Memory
from neuron.errors import InvalidSourceError, SourceNotFoundError, SourceUnavailableError
from neuron.layers.shard import Shard
from neuron.load.choices import Choice, RepositoryFile
from neuron.load.fit import Candidate, estimated, fit
from neuron.load.hub import Hub, HubSource
from neuron.load.survey import candidate_at, survey
from neuron.models.config import read_config
from neuron.models.errors import DoesNotFitError, UnsupportedArchitectureError
from neuron.models.gguf import TensorKind, read_header
from neuron.models.model import ModelConfig
from neuron.models.sizing import least_bytes, plan_memory
from neuron.torch_harness import TorchHarness

GIB = 1 << 30
SPEC = ModelSpec("m", "hf:o/n")
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
BITS = {"Q2_K": 2.6, "Q4_0": 4.5, "Q4_K": 4.5, "Q6_K": 6.6, "Q8_0": 8.5, "BF16": 16.0, "F32": 32.0}


@functools.cache
def llama() -> ModelConfig:
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder, "config.json").write_text(json.dumps(LLAMA))
        return read_config(pathlib.Path(folder))


@functools.cache
def candidates() -> tuple[Candidate, ...]:
    """Return a choice of each kind, the largest first."""
    config = llama()
    found = []
    for tag, bits in sorted(BITS.items(), key=lambda item: -item[1]):
        kinds = {name: TensorKind[tag] if len(t.shape) > 1 else TensorKind.F32 for name, t in config.tensors().items()}
        file = RepositoryFile(f"m-{tag}.gguf", int(config.num_parameters() * bits / 8))
        found.append(Candidate(Choice(tag, (file,), tag), dataclasses.replace(config, tensor_kinds=kinds)))
    return tuple(found)


def held(size_bytes: int) -> int:
    """Return the bytes that a file of ``size_bytes`` holds of the model."""
    return min(size_bytes, 2 * llama().num_parameters())


def context_of(candidate: Candidate, free_bytes: int, device: str, spec: ModelSpec) -> int:
    """Return the context that a load would give a candidate, 0 if it does not fit.

    Where none is asked for, the cache of a CPU takes a share of its memory and not all of it.
    """
    assert candidate.config is not None
    try:
        return plan_memory(candidate.config, spec, device, free_bytes).context_tokens
    except DoesNotFitError:
        return 0


devices = st.dictionaries(st.sampled_from(["cuda:0", "cuda:1", "cuda:2"]), st.integers(0, 12 * GIB)) | st.dictionaries(
    st.just("cpu:0"), st.integers(0, 12 * GIB)
)


@given(devices, st.sampled_from([0, 2000, 30000]))
@example({"cpu:0": 2541243008}, 0)
@settings(max_examples=25, deadline=None)
def test_the_choice_is_what_the_preflight_takes_and_no_larger_one_would_be(free: dict[str, int], tokens: int) -> None:
    spec = ModelSpec("m", "hf:o/n", context_tokens=tokens)
    found = fit(candidates(), free, spec)
    assert len(found.passed_over) == len(candidates()) - (found.chosen is not None)
    assert all(passed.reason for passed in found.passed_over)

    def fits(candidate: Candidate, on: tuple[str, ...], context_tokens: int) -> bool:
        asked = ModelSpec("m", "hf:o/n", context_tokens=context_tokens, tensor_parallel=len(on))
        assert candidate.config is not None
        need = max(least_bytes(candidate.config, asked, on[0], Shard(rank, len(on))) for rank in range(len(on)))
        return need <= min(free[device] for device in on)

    if found.chosen is None:
        assert not any(fits(candidate, (device,), tokens) for candidate in candidates() for device in free)
        return
    chosen = found.chosen
    by_name = {candidate.choice.name: candidate for candidate in candidates()}
    assert fits(by_name[chosen.choice], chosen.devices, chosen.context_tokens)
    wanted = min(chosen.context_tokens, tokens or WANTED_TOKENS)
    larger = [each for each in candidates() if held(each.choice.size_bytes) > held(chosen.size_bytes)]
    assert all(context_of(each, free[device], device, spec) < wanted for each in larger for device in free)


@given(st.lists(st.integers(0, 12 * GIB), min_size=2, max_size=4), st.sampled_from(["cpu:0", "cuda:0"]))
@settings(max_examples=25, deadline=None)
def test_more_memory_never_means_less(sizes: list[int], device: str) -> None:
    found = [fit(candidates(), {device: free}, SPEC) for free in sorted(sizes)]
    reached = [
        (min(each.chosen.context_tokens, WANTED_TOKENS), held(each.chosen.size_bytes)) if each.chosen else (0, 0)
        for each in found
    ]
    assert reached == sorted(reached)


@given(st.integers(0, 8 * GIB), st.integers(0, 8 * GIB), st.sampled_from(["cpu:0", "cuda:0"]))
@settings(max_examples=25, deadline=None)
def test_evictions_are_for_better_weights_only(free: int, idle: int, device: str) -> None:
    """What evictions free counts as much as free memory, and is not used where the choice gains nothing by it."""
    alone = fit(candidates(), {device: free}, SPEC).chosen
    found = fit(candidates(), {device: free}, SPEC, evictable_bytes={device: idle}).chosen
    empty = fit(candidates(), {device: free + idle}, SPEC).chosen
    assert (found is None) == (empty is None)
    if found is None or empty is None:
        return
    assert found.rank(0)[:3] == empty.rank(0)[:3]
    assert found.evicts == (alone is None or alone.rank(0)[:3] < empty.rank(0)[:3])
    if not found.evicts:
        assert found == alone


def test_a_file_of_float32_is_no_better_than_one_of_bfloat16() -> None:
    found = fit(candidates(), {"cuda:0": 100 * GIB}, SPEC)
    assert found.chosen is not None
    assert found.chosen.choice == "BF16"
    assert found.chosen.context_tokens == 32768
    assert {passed.choice: passed.reason for passed in found.passed_over}["F32"] == "holds no more than BF16"


def test_a_gpu_is_taken_before_the_cpu_and_two_where_one_is_too_small() -> None:
    found = fit(candidates(), {"cpu:0": 100 * GIB, "cuda:0": 2 * GIB}, SPEC)
    assert found.chosen is not None
    assert found.chosen.devices == ("cuda:0",)
    both = fit(candidates()[1:2], {"cuda:0": 2 * GIB, "cuda:1": 2 * GIB, "cuda:2": GIB}, SPEC)
    assert both.chosen is not None
    assert both.chosen.devices == ("cuda:0", "cuda:1")


def test_reasons_have_the_figures() -> None:
    refused = Candidate(candidates()[0].choice, None, "cannot be read")
    found = fit([refused, *candidates()[1:]], {"cuda:0": GIB // 4}, SPEC)
    assert found.chosen is None
    reasons = {passed.choice: passed.reason for passed in found.passed_over}
    assert reasons["F32"] == "cannot be read"
    assert "cuda:0: needs" in reasons["Q4_K"]
    assert "free 0.25 GiB" in reasons["Q4_K"]
    assert fit(candidates()[:1], {}, SPEC).passed_over[0].reason == "no device takes loads"


@pytest.fixture
def hub(tmp_path: pathlib.Path) -> Iterator[tuple[Hub, FileServer]]:
    with serve_files() as site:
        yield Hub(site.address, tmp_path / "cache"), site


def test_a_survey_reads_headers_and_lets_the_chosen_one_stand_on_its_own(
    hub: tuple[Hub, FileServer], smollm2_gguf: pathlib.Path
) -> None:
    (here, site), data = hub, smollm2_gguf.read_bytes()
    # The smallest is cut, the next one is what the largest is estimated from.
    files = {"m-Q4_K_M.gguf": data[:-1], "m-Q8_0.gguf": data, "m-Q6_K.gguf": data + b"x", "mmproj-F16.gguf": b"x" * 200}
    publish_repository(site, files, "o/n")
    found = survey(here, HubSource("o/n", None, None), {"cuda:0": 100 * GIB}, SPEC)
    assert found.chosen is not None
    assert found.chosen.choice == "Q6_K"
    assert found.chosen.required_bytes == fit_alone(Candidate(Choice("", (), "m"), read_config(smollm2_gguf)))
    reasons = {passed.choice: passed.reason for passed in found.passed_over}
    assert reasons["Q4_K_M"].startswith("m-Q4_K_M.gguf: tensor")
    assert reasons["Q8_0"] == "holds no more than Q6_K"
    assert any(hit.endswith("m-Q6_K.gguf") for hit in site.hits)
    assert sum(int(asked.partition("-")[2]) for asked in site.ranges) < len(data), "headers only"
    site.hits.clear()
    nothing = survey(here, HubSource("o/n", None, None), {"cuda:0": GIB // 64}, SPEC)
    assert nothing.chosen is None
    assert not any(hit.endswith("m-Q6_K.gguf") for hit in site.hits), "an estimate is enough to pass over"


@pytest.mark.parametrize(("tag", "kind"), [("UD-Q4_K_XL", "Q4_K"), ("IQ4_XS", "IQ4_XS"), ("Q8_0", "Q8_0"), ("Q4", "")])
def test_an_estimate_by_tag(tag: str, kind: str) -> None:
    found = estimated(candidates()[0], Choice(tag, (), tag))
    assert (found is None) == (not kind)
    if found is not None and found.config is not None:
        assert {each.name for each in found.config.tensor_kinds.values()} == {kind, "F32"}


def test_a_survey_of_quantised_safetensors_reads_their_headers(hub: tuple[Hub, FileServer]) -> None:
    """The forms of the weights are there; the weights themselves are not read."""
    here, site = hub
    config = QUANTISED | {"quantization_config": {"quant_method": "fp8"}, "max_position_embeddings": 4096}
    weights = safetensors_file("fp8")
    files = {"config.json": json.dumps(config).encode(), "tokenizer.json": b"{}", "model.safetensors": weights}
    publish_repository(site, files, "o/n")
    found = survey(here, HubSource("o/n", None, None), {"cuda:0": GIB}, SPEC)
    assert found.chosen is not None, found.passed_over
    assert sum(int(asked.partition("-")[2]) for asked in site.ranges) < len(weights)
    publish_repository(site, files | {"model.safetensors": weights[:-1]}, "o/n")
    found = survey(here, HubSource("o/n", None, None), {"cuda:0": GIB}, SPEC)
    assert "in bytes" in found.passed_over[0].reason


def test_a_survey_of_a_split_file(
    hub: tuple[Hub, FileServer], smollm2_gguf: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    here, site = hub
    whole, header = gguf.GGUFReader(smollm2_gguf), read_header(smollm2_gguf)
    writer = gguf.GGUFWriter(tmp_path / "m-Q4_1.gguf", "llama", split_max_tensors=100)
    for key, value in header.metadata.items():
        if key.startswith(("llama.", "tokenizer.ggml.eos", "tokenizer.ggml.bos")):
            writer.add_key_value(key, value, whole.fields[key].types[0])
    for tensor in whole.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(tmp_path.glob("m-Q4_1-*.gguf"))
    assert len(parts) > 2
    publish_repository(site, {f"Q4_1/{part.name}": part.read_bytes() for part in parts}, "o/n")
    found = survey(here, HubSource("o/n", None, "q4_1"), {"cuda:0": 100 * GIB}, SPEC)
    assert found.chosen is not None, found.passed_over
    assert found.chosen.size_bytes == sum(part.stat().st_size for part in parts)
    assert found.chosen.required_bytes == fit_alone(Candidate(Choice("", (), "m"), read_config(parts[0])))


def fit_alone(candidate: Candidate) -> int:
    found = fit([candidate], {"cuda:0": 100 * GIB}, SPEC).chosen
    assert found is not None
    return found.required_bytes


def test_surveys_that_fail(hub: tuple[Hub, FileServer]) -> None:
    here, site = hub
    source = HubSource("o/n", None, None)
    with pytest.raises(SourceNotFoundError):
        survey(here, source, {}, SPEC)
    publish_repository(site, {"notes.txt": b"x"}, "o/n")
    with pytest.raises(SourceNotFoundError, match="no weights"):
        survey(here, source, {}, SPEC)
    files = {"model.safetensors": b"x" * 200, "tokenizer.json": b"{}", "config.json": json.dumps(LLAMA).encode()}
    publish_repository(site, files, "o/n")
    found = survey(here, source, {"cuda:0": 100 * GIB}, SPEC)
    assert found.chosen is not None
    assert found.chosen.choice == "safetensors"
    publish_repository(site, files | {"config.json": b'{"model_type": "unheard-of"}'}, "o/n")
    with pytest.raises(UnsupportedArchitectureError):
        survey(here, source, {"cuda:0": 100 * GIB}, SPEC)
    publish_repository(site, {"m-Q4_0.gguf": b"GGUF" * 100}, "o/n")
    assert survey(here, source, {"cuda:0": 100 * GIB}, SPEC).chosen is None
    with pytest.raises(SourceUnavailableError):
        survey(dataclasses.replace(here, offline=True), source, {}, SPEC)


def test_a_node_is_asked_for_its_fit(
    hub: tuple[Hub, FileServer], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, site = hub
    monkeypatch.setenv("HF_ENDPOINT", site.address)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    files = {"model.safetensors": b"x" * 200, "tokenizer.json": b"{}", "config.json": json.dumps(LLAMA).encode()}
    publish_repository(site, files, "o/n")

    class Roomy:
        device_id = "cpu:0"
        ready = True

        async def memory(self) -> Memory:
            return Memory(100 * GIB, 100 * GIB, 0)

    harness = TorchHarness({"cpu:0": Roomy()}, LocalTexts())  # type: ignore[dict-item]
    found = asyncio.run(harness.fit(ModelSpec("m", "hf:o/n", context_tokens=4096), {}))
    assert found.chosen is not None
    assert (found.chosen.choice, found.chosen.devices, found.chosen.context_tokens) == ("safetensors", ("cpu:0",), 4096)
    with pytest.raises(InvalidSourceError, match="nothing to choose"):
        asyncio.run(harness.fit(ModelSpec("m", "pypi:weights==1.0"), {}))
    with pytest.raises(SourceNotFoundError):
        asyncio.run(harness.fit(ModelSpec("m", "/models/m.gguf"), {}))


def test_weights_at_a_path_are_their_only_choice(smollm2_gguf: pathlib.Path) -> None:
    found = fit([candidate_at(smollm2_gguf)], {"cpu:0": 100 * GIB}, SPEC).chosen
    assert found is not None
    assert (found.choice, found.size_bytes) == (smollm2_gguf.name, smollm2_gguf.stat().st_size)


def test_what_is_in_the_cache_is_chosen_from_where_the_hub_is_down(
    hub: tuple[Hub, FileServer], smollm2_gguf: pathlib.Path
) -> None:
    here, site = hub
    data = smollm2_gguf.read_bytes()
    publish_repository(site, {"m-Q4_1.gguf": data, "m-Q8_0.gguf": data + b"x"}, "o/n")
    here.fetch(HubSource("o/n", None, "Q4_1"), "", lambda done, total: None)
    offline = dataclasses.replace(here, offline=True)
    for choice in (None, "q4_1"):
        found = survey(offline, HubSource("o/n", None, choice), {"cpu:0": 100 * GIB}, SPEC)
        assert found.chosen is not None
        assert (found.chosen.choice, found.passed_over) == ("Q4_1", ())
    with pytest.raises(SourceNotFoundError, match="Q4_1"):
        survey(offline, HubSource("o/n", None, "Q8_0"), {"cpu:0": 100 * GIB}, SPEC)
