"""Small layers for tests of the caches that no family uses yet: a latent cache, and a state of two tensors."""

import dataclasses
import json
import pathlib
from typing import Any

import torch
from safetensors.torch import save_file

from neuron.layers.cache import Latent, SequenceState, StateTensor
from neuron.layers.layer import Layer, Weights
from neuron.layers.norm import Norm
from neuron.layers.parameters import Matrix, Parameters, Tensor, Vector
from neuron.layers.shard import WHOLE, Shard, scaled
from neuron.layers.step import Step
from neuron.models.config import read_config
from neuron.models.family import Family, attention_of, blocks_of, decoder_of, mlp_of, norm_of
from neuron.models.fields import Fields
from neuron.models.model import ModelConfig
from neuron.models.registry import FAMILIES

WIDTH = 24
KERNEL = 4
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


@dataclasses.dataclass(frozen=True, slots=True)
class Recurrence:
    """Gated linear recurrence ``h <- a h + k v^T`` of each head, read by ``q h``, behind a causal convolution.

    It keeps the recurrence's state in float32 and the last inputs of the convolution in the model's dtype.
    """

    norm: Norm
    num_heads: int
    head_dim: int

    def parameters(self, shard: Shard = WHOLE) -> Parameters:
        width, hidden, heads = self.num_heads * self.head_dim, self.norm.size, shard.share(self.num_heads)
        rows = scaled(heads, self.head_dim)

        def matrix(kind: str, columns: int) -> Matrix:
            tensors = [Tensor(f"mixer.{x}_{kind}", f"mixer_{x}_{kind}", (width, columns), rows) for x in "qkv"]
            return Matrix(tuple(tensors), quantised=False, rounded=False)

        return {
            "norm": self.norm.vector("mixer_layernorm", "mixer_norm"),
            "inputs": matrix("proj", hidden),
            "convolution": matrix("conv", KERNEL),
            "decay": Vector((Tensor("mixer.decay", "mixer_decay", (self.num_heads,), heads),)),
            "output": Matrix((Tensor("mixer.o_proj", "mixer_output", (hidden, width), columns=rows),)),
        }

    def cache(self, shard: Shard = WHOLE) -> SequenceState:
        num_heads, dim = len(shard.share(self.num_heads)), self.head_dim
        inputs = StateTensor((KERNEL - 1, 3 * num_heads * dim))
        return SequenceState((inputs, StateTensor((num_heads, dim, dim), in_float32=True)))

    def workspace(self, shard: Shard = WHOLE) -> int:
        return 6 * len(shard.share(self.num_heads)) * self.head_dim

    def forward(self, step: Step, weights: Weights, residual: torch.Tensor, cache: Any) -> None:
        (inputs, states), batch = cache, step.batch
        x = step.operations.normed_linear(residual, (weights["norm"], self.norm.eps), weights["inputs"].weight, None)
        decay = weights["decay"].float().sigmoid()[:, None, None]
        out = torch.empty((len(x), x.shape[1] // 3), dtype=x.dtype)
        starts = batch.cu_seqlens.tolist()
        for index, slot in enumerate(batch.state_slots.tolist()):
            rows = slice(starts[index], starts[index + 1])
            seen = torch.cat((inputs[slot], x[rows]))
            inputs[slot] = seen[1 - KERNEL :]
            y = (seen.unfold(0, KERNEL, 1) * weights["convolution"].weight).sum(-1).float()
            state = states[slot].clone()
            for row, (q, k, v) in enumerate(y.view(len(y), 3, -1, self.head_dim), rows.start):
                state = decay * state + k[:, :, None] * v[:, None, :]
                out[row] = (q[:, None, :] @ state).flatten()
            states[slot] = state
        step.add_linear(out, weights["output"], None, residual)


def latent_blocks(fields: Fields) -> tuple[Layer, ...]:
    return attention_of(fields, qk_norm=True), Mean(), mlp_of(fields)


def recurrent_blocks(fields: Fields) -> tuple[Layer, ...]:
    return attention_of(fields), Recurrence(norm_of(fields), 3, 8), mlp_of(fields)


BLOCKS = {"latent": latent_blocks, "recurrent": recurrent_blocks}


def family(name: str) -> Family:
    """Return the family of models with such blocks."""

    def build(fields: Fields) -> ModelConfig:
        return decoder_of(name, fields, blocks_of(fields, *BLOCKS[name](fields)))

    return Family(name, (f"{name}ForCausalLM",), build)


FAMILIES_OF_TESTS = {name: family(name) for name in BLOCKS}


def make_model(name: str, folder: pathlib.Path) -> pathlib.Path:
    """Write a random model of a family that the registry has; return its folder."""
    assert name in FAMILIES
    (folder / "config.json").write_text(
        json.dumps({**CONFIG, "model_type": name, "architectures": [f"{name}ForCausalLM"]})
    )
    torch.manual_seed(3)
    shapes = read_config(folder).tensor_shapes()
    save_file({key: torch.randn(shape) * 0.3 for key, shape in shapes.items()}, folder / "model.safetensors")
    return folder
