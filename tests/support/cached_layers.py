"""A small layer for tests of the cache that no family uses yet, a latent one, and models of it."""

import dataclasses
import json
import pathlib
from typing import Any

import torch
from safetensors.torch import save_file

from neuron.layers.cache import Latent
from neuron.layers.layer import Weights
from neuron.layers.parameters import Parameters
from neuron.layers.shard import WHOLE, Shard
from neuron.layers.step import Step
from neuron.models.config import read_config
from neuron.models.family import Family, attention_of, blocks_of, decoder_of, mlp_of
from neuron.models.fields import Fields
from neuron.models.model import ModelConfig
from neuron.models.registry import FAMILIES

WIDTH = 24
CONFIG = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "eos_token_id": 0,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Mean:
    """Layer that adds the mean of the first elements of a sequence's tokens so far, which it caches."""

    def parameters(self, shard: Shard = WHOLE) -> Parameters:
        return {}

    def cache(self, shard: Shard = WHOLE) -> Latent:
        return Latent(WIDTH)

    def workspace(self, shard: Shard = WHOLE) -> int:
        return WIDTH

    def forward(self, step: Step, weights: Weights, residual: torch.Tensor, cache: Any) -> None:
        (latents,), batch = cache, step.batch
        latents.view(-1, WIDTH).index_copy_(0, batch.slot_mapping, residual[:, :WIDTH].contiguous())
        starts = batch.cu_seqlens.tolist()
        for index, length in enumerate(batch.context_lens.tolist()):
            own = latents[batch.page_table[index].long()].view(-1, WIDTH)[:length]
            means = own.cumsum(0) / torch.arange(1, length + 1)[:, None]
            residual[starts[index] : starts[index + 1], :WIDTH] += means[starts[index] - starts[index + 1] :]


def build(fields: Fields) -> ModelConfig:
    layers = attention_of(fields, qk_norm=True), Mean(), mlp_of(fields)
    return decoder_of("latent", fields, blocks_of(fields, *layers))


FAMILY = Family("latent", ("latentForCausalLM",), build)


def make_model(folder: pathlib.Path) -> pathlib.Path:
    """Write a random model of the family, which the registry has; return its folder."""
    assert FAMILY.name in FAMILIES
    (folder / "config.json").write_text(
        json.dumps({**CONFIG, "model_type": FAMILY.name, "architectures": FAMILY.class_names})
    )
    torch.manual_seed(3)
    shapes = read_config(folder).tensor_shapes()
    save_file({key: torch.randn(shape) * 0.3 for key, shape in shapes.items()}, folder / "model.safetensors")
    return folder
