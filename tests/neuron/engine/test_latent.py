"""A layer with a latent cache, made for the test: its pages are those of all layers without a window."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from neuron.device import jobs
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
from neuron.models.sizing import PAGE_TOKENS

WIDTH = 24
CONFIG = {
    "model_type": "latent", "architectures": ["LatentForCausalLM"], "vocab_size": 64, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "eos_token_id": 0,
}  # fmt: skip
PROMPT = [1 + 7 * i % 60 for i in range(70)]


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
    blocks = blocks_of(fields, attention_of(fields, qk_norm=True), Mean(), mlp_of(fields))
    return decoder_of("latent", fields, blocks)


@pytest.fixture
def latent(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> pathlib.Path:
    monkeypatch.setitem(FAMILIES, "latent", Family("latent", ("LatentForCausalLM",), build))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(3)
    shapes = read_config(tmp_path).tensor_shapes()
    save_file({name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    return tmp_path


def test_latents_are_paged_counted_shared_and_cleared(latent: pathlib.Path, harness: Callable[..., Any]) -> None:
    driver = harness()
    assert isinstance(driver.load(latent), jobs.Done)
    model = driver.model()
    # Keys and values of 2 heads of 8, and the latents, in each of 2 blocks.
    assert model.plan.kv_cache_bytes == model.plan.num_pages * PAGE_TOKENS * 4 * 2 * (2 * 2 * 8 + WIDTH)
    tensors = [tensor for cache in model.executor.caches.layers for tensor in cache or ()]
    assert sum(tensor[1:].nbytes for tensor in tensors) == model.plan.kv_cache_bytes
    alone = driver.output_alone(PROMPT, 20)
    driver.generate(1, PROMPT, 20)
    for number in range(2, 6):
        driver.generate(number, [*PROMPT[: 9 * number], 5], 30)
    driver.run()
    assert driver.outputs()[1] == alone
    assert driver.rows[0].prompt_cached == 64
    plain = harness()
    plain.load(latent, prefix_cache=False)
    for number in range(2, 6):
        assert plain.output_alone([*PROMPT[: 9 * number], 5], 30) == driver.outputs()[number]
    pages = torch.arange(1, 4, dtype=torch.int32).numpy()
    model.executor.clear_pages((pages,))
    assert not any(tensor[1:4].any() for tensor in tensors)
