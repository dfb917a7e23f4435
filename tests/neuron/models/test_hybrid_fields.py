"""Files of gated delta nets with any values in their fields, or with wrong tensors: refused by the name of either."""

import contextlib
import dataclasses
import json
import pathlib
import tracemalloc
from typing import Any

import hybrid_models
import pytest
import torch
from hybrid_gguf import write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_files import HYBRID, check_weights
from safetensors.torch import load_file, save_file

from cortex.wire.errors import ApiError, ErrorInfo
from cortex.wire.node import ModelSpec
from neuron.layers.gated_delta import GatedDelta
from neuron.models.config import config_from_gguf, read_config
from neuron.models.gguf import GgufHeader
from neuron.models.gguf_parts import read_parts
from neuron.models.model import ModelConfig
from neuron.models.sizing import least_bytes

MOST_BYTES = 32 << 20
"""Most memory that a configuration takes to be read: names of a thousand layers and their experts."""
ABSENT = object()
LARGE = (1 << 20, 1 << 24, (1 << 31) - 1, 1 << 31, 1 << 63, 10**30)
KINDS = st.lists(st.sampled_from(["linear_attention", "full_attention", "sliding_attention", "", 1, None]), max_size=6)
VALUES = st.one_of(
    st.just(ABSENT), st.none(), st.booleans(), st.integers(-2, 12), st.integers(1, 600), st.sampled_from(LARGE),
    st.floats(), st.text(max_size=4), KINDS, st.lists(st.booleans(), max_size=6), st.just({}),
    st.just({"rope_type": "default", "rope_theta": 1e4}), st.just({"rope_type": "yarn", "factor": 1e300}),
)  # fmt: skip


def check(config: ModelConfig) -> None:
    """A configuration that is read can be sized, and its heads share out."""
    spec = ModelSpec("m", "s", dtype="bfloat16")
    assert 0 < least_bytes(config, spec, "cuda:0") < 1 << 63
    for layer in config.layers:
        if isinstance(layer, GatedDelta):
            assert layer.num_value_heads % layer.num_key_heads == 0
            assert min(layer.key_dim, layer.value_dim, layer.num_key_heads) > 0


def check_named(error: ApiError, changes: dict[str, Any]) -> None:
    """An error is the client's, and names a field that was changed, or one within it."""
    inner = [name for value in changes.values() if isinstance(value, dict) for name in value]
    assert 400 <= error.status < 500
    assert any(name in str(error) for name in (*changes, *inner)), (changes, str(error))


def json_values(kind: str) -> dict[str, Any]:
    if kind == "qwen3_next":
        return HYBRID
    values: dict[str, Any] = json.loads((hybrid_models.TRAINED[kind] / "config.json").read_text())
    return values


@pytest.mark.parametrize("kind", [*hybrid_models.TRAINED, "qwen3_next"])
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_values_in_config_json(kind: str, tmp_path: pathlib.Path, data: st.DataObject) -> None:
    sound = json_values(kind)
    names = sorted(sound.keys() - {"model_type", "architectures"})  # a family by another name has other fields
    changes = data.draw(st.dictionaries(st.sampled_from(names), VALUES, min_size=1, max_size=2))
    values = {name: value for name, value in {**sound, **changes}.items() if value is not ABSENT}
    (tmp_path / "config.json").write_text(json.dumps(values))
    try:
        check(read_config(tmp_path))
    except ApiError as error:
        check_named(error, changes)


@pytest.fixture(scope="module", params=hybrid_models.TRAINED)
def header(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GgufHeader:
    """Header of a GGUF file, with its tensors outside of blocks: those of blocks would not fit other sizes."""
    path = write_gguf(hybrid_models.TRAINED[request.param], tmp_path_factory.mktemp("gguf") / "model.gguf")
    found = read_parts(path)
    return dataclasses.replace(found, tensors=tuple(t for t in found.tensors if not t.name.startswith("blk.")))


@settings(max_examples=50)
@given(data=st.data())
def test_any_values_in_gguf(header: GgufHeader, data: st.DataObject) -> None:
    architecture = header.metadata["general.architecture"]
    names = [name for name in header.metadata if name.startswith(f"{architecture}.")]
    names += [f"{architecture}.attention.recurrent_layers"]
    changes = data.draw(st.dictionaries(st.sampled_from(names), VALUES, min_size=1, max_size=2))
    metadata = {name: value for name, value in {**header.metadata, **changes}.items() if value is not ABSENT}
    try:
        check(config_from_gguf(pathlib.Path("model.gguf"), dataclasses.replace(header, metadata=metadata)))
    except ApiError as error:
        check_named(error, {name.removeprefix(f"{architecture}."): value for name, value in changes.items()})


def test_a_tensor_that_is_missing_or_of_another_shape_is_named(tmp_path: pathlib.Path) -> None:
    path = hybrid_models.make_model("small", tmp_path, with_draft_head=True) / "model.safetensors"
    tensors = load_file(path)
    assert isinstance(check_weights(tmp_path), ModelConfig)
    for name, tensor in tensors.items():
        if "layers.2." in name:
            continue  # as in layer 0
        rest = {other: tensors[other] for other in tensors if other != name}
        save_file({**rest, name: torch.cat((tensor, tensor[:1]))}, path)
        found = check_weights(tmp_path)
        assert isinstance(found, ErrorInfo), name
        assert (found.code, name in found.message) == ("corrupt_weights", True)
        save_file(rest, path)
        found = check_weights(tmp_path)
        if name.startswith("mtp.") and "layers." not in name:
            assert isinstance(found, ModelConfig), "without its drafts a model has the same output"
            assert found.draft_head is None
        else:
            # Parts of a fused tensor may be tensors of their own.
            own = name.replace("qkv", "k").replace("conv1d", "conv1d_k")
            assert isinstance(found, ErrorInfo), name
            assert found.code == "corrupt_weights"
            assert own in found.message.partition("lacks")[2]


@pytest.mark.parametrize("kind", hybrid_models.TRAINED)
def test_large_sizes_take_little_memory(kind: str, tmp_path: pathlib.Path) -> None:
    sound = json_values(kind)
    tracemalloc.start()
    for name, value in sound.items():
        if isinstance(value, int) and not isinstance(value, bool):
            for large in (1000, *LARGE):
                (tmp_path / "config.json").write_text(json.dumps({**sound, "layer_types": None, name: large}))
                with contextlib.suppress(ApiError):
                    check(read_config(tmp_path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MOST_BYTES
