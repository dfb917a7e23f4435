"""Configurations as published: each has the size that its authors tell, its context, and its rotated part of a head."""

import json
import pathlib

import pytest

from neuron.layers.attention import Attention
from neuron.models.config import read_config

PUBLISHED = json.loads(pathlib.Path(__file__).with_name("published.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_has_the_published_size(name: str, tmp_path: pathlib.Path) -> None:
    published = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(published["config"]))
    config = read_config(tmp_path)
    assert round(config.num_parameters() / 1e9, 2) == published["billions"]
    assert config.context_tokens == published["context_tokens"]
    last = config.blocks[-1][0]
    assert isinstance(last, Attention)
    assert last.rope.rotary_dim == published["rotary_dim"]
