"""Repositories made for embeddings: bare names, no head, and settings as sentence-transformers writes them."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from neuron.device import jobs
from neuron.device.jobs import Pooling
from neuron.models.config import read_config
from neuron.models.embedding_folder import pooling_of
from neuron.models.errors import CorruptWeightsError, UnsupportedArchitectureError
from neuron.models.weights import open_weights

PROMPT = [5, 17, 99, 4, 2]


def settings(folder: pathlib.Path, steps: list[str], **pooling: Any) -> None:
    """Write the settings of sentence-transformers beside a model."""
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize", "Dense": "2_Dense"}
    written = [
        {"idx": index, "name": str(index), "path": paths[step], "type": f"sentence_transformers.models.{step}"}
        for index, step in enumerate(steps)
    ]
    (folder / "modules.json").write_text(json.dumps(written))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    values = {"word_embedding_dimension": 48, "pooling_mode_cls_token": False, "include_prompt": True, **pooling}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(values))


@pytest.fixture
def headless(
    make_checkpoint: Callable[..., pathlib.Path], tmp_path: pathlib.Path, request: pytest.FixtureRequest
) -> pathlib.Path:
    """A tiny random Qwen3 as its embedding models are published: of many shards, or of one file."""
    changes = {"tie_word_embeddings": False, **getattr(request, "param", {})}
    model = transformers.Qwen3Model.from_pretrained(make_checkpoint("qwen3", **changes), dtype=torch.float32)
    model.save_pretrained(tmp_path)
    settings(tmp_path, ["Transformer", "Pooling", "Normalize"], pooling_mode_lasttoken=True)
    return tmp_path


def rename(folder: pathlib.Path, class_name: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [class_name]}))


@pytest.mark.parametrize("headless", [{}, {"tie_word_embeddings": True}], indirect=True)
@pytest.mark.parametrize("class_name", ["Qwen3Model", "Qwen3ForCausalLM"])
@pytest.mark.parametrize("pooling", list(Pooling))
def test_embeddings_equal_transformers(
    headless: pathlib.Path, class_name: str, pooling: Pooling, harness: Any, executor: str
) -> None:
    names = {Pooling.LAST: "pooling_mode_lasttoken", Pooling.MEAN: "pooling_mode_mean_tokens"}
    settings(headless, ["Transformer", "Pooling", "Normalize"], **{names[pooling]: True})
    rename(headless, class_name)
    config = read_config(headless)
    assert (config.pooling, config.generates) == (pooling, False)
    driver = harness()
    driver.load(headless)
    driver.post(jobs.Embed(1, "m", np.array(PROMPT, np.int32).tobytes(), config.pooling, ""))
    driver.run()
    found = next(np.frombuffer(sent.vector, np.float32) for sent in driver.sent if isinstance(sent, jobs.Embedding))
    model = transformers.Qwen3Model.from_pretrained(headless, dtype=torch.float32).eval()
    with torch.no_grad():
        hidden = model(torch.tensor([PROMPT])).last_hidden_state[0]
    expected = hidden[-1] if pooling is Pooling.LAST else hidden.mean(0)
    np.testing.assert_allclose(found, expected / expected.norm(), atol=1e-4)


def test_a_sharded_one_is_read(headless: pathlib.Path, tmp_path: pathlib.Path) -> None:
    model = transformers.Qwen3Model.from_pretrained(headless, dtype=torch.float32)
    (headless / "model.safetensors").unlink()
    model.save_pretrained(headless, max_shard_size="30KB")
    assert (headless / "model.safetensors.index.json").exists()
    source = open_weights(headless)
    try:
        assert source.config.head.tied, "there is no head to load"
        assert set(source.shapes()) == set(source.config.tensor_shapes())
    finally:
        source.close()


def test_a_model_that_writes_text_still_lacks_its_head(make_checkpoint: Callable[..., pathlib.Path]) -> None:
    """A checkpoint without a head makes embeddings only where its files declare it."""
    folder = make_checkpoint("qwen3", tie_word_embeddings=False)
    config = read_config(folder)
    assert config.generates
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CorruptWeightsError, match=r"lacks lm_head\.weight"):
        open_weights(folder)


@pytest.mark.parametrize(
    ("steps", "pooling", "message"),
    [
        (["Transformer", "Pooling", "Dense", "Normalize"], {"pooling_mode_lasttoken": True}, "step 'Dense'"),
        (["Transformer", "Pooling"], {"pooling_mode_cls_token": True}, "cls_token"),
        (["Transformer", "Pooling"], {"pooling_mode_max_tokens": True}, "max_tokens"),
        (["Transformer", "Pooling"], {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": True}, "mean_tokens"),
        (["Transformer", "Pooling"], {"pooling_mode": "weightedmean"}, "weightedmean"),
    ],
)
def test_other_ways_to_a_vector_are_refused(
    headless: pathlib.Path, steps: list[str], pooling: dict[str, Any], message: str
) -> None:
    settings(headless, steps, **pooling)
    with pytest.raises(UnsupportedArchitectureError, match=message):
        read_config(headless)


@pytest.mark.parametrize("text", ["{}x", "3", '[{"type": 3, "path": "../x"}]', '[{"path": ""}]', "[" * 5000])
def test_steps_that_are_none(headless: pathlib.Path, text: str) -> None:
    (headless / "modules.json").write_text(text)
    with pytest.raises(CorruptWeightsError, match=r"modules\.json"):
        read_config(headless)


def test_newer_settings_name_their_way(headless: pathlib.Path) -> None:
    settings(headless, ["Transformer", "Pooling"], pooling_mode="mean")
    assert read_config(headless).pooling is Pooling.MEAN


@pytest.mark.parametrize("where", ["..", ".", "../1_Pooling", "/etc", "a/b"])
def test_a_step_lies_within_the_folder(tmp_path: pathlib.Path, where: str) -> None:
    steps = [{"type": "sentence_transformers.models.Pooling", "path": where}]
    (tmp_path / "modules.json").write_text(json.dumps(steps))
    with pytest.raises(CorruptWeightsError, match="outside"):
        pooling_of(tmp_path)
