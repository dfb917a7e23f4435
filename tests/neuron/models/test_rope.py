"""Rotary embeddings against transformers' own functions, and the order in which the rows of a head are read."""

import pathlib
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from neuron.layers.rope import Rope
from neuron.models.fields import JsonFields
from neuron.models.rope import rope_of

LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64,
    "short_factor": [1.0 + i / 8 for i in range(12)], "long_factor": [1.5 + i for i in range(12)],
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "original_max_position_embeddings": 64}
SCALINGS: dict[str, dict[str, Any]] = {
    "yarn": YARN,
    "yarn-not-truncated": {**YARN, "truncate": False},
    "yarn-mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2, "beta_fast": 8.0, "beta_slow": 2.0},
    "yarn-attention-factor": {**YARN, "attention_factor": 1.3},
    "yarn-partial": {**YARN, "partial_rotary_factor": 0.5},
    "yarn-empty-ramp": {**YARN, "beta_fast": 1e-3, "beta_slow": 1e-3},
    "longrope": LONG,
    "longrope-attention-factor": {**LONG, "attention_factor": 1.19},
    "longrope-factor": {**LONG, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
}


@pytest.mark.parametrize("context_tokens", [50, 700])
@pytest.mark.parametrize("name", SCALINGS)
def test_a_table_is_that_of_transformers(name: str, context_tokens: int) -> None:
    parameters = SCALINGS[name]
    config = transformers.LlamaConfig(
        hidden_size=96, num_attention_heads=4, head_dim=24, max_position_embeddings=256, rope_parameters=parameters
    )
    frequencies, amplitude = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu", seq_len=context_tokens)
    fields = JsonFields(pathlib.Path("config.json"), {"rope_parameters": parameters, "max_position_embeddings": 256})
    table = torch.tensor(rope_of(fields, 24).within(context_tokens).table())
    torch.testing.assert_close(table[: len(frequencies)], frequencies.float(), rtol=2e-6, atol=0)
    torch.testing.assert_close(table[12 : 12 + len(frequencies)], torch.full_like(frequencies, amplitude))
    assert (table[len(frequencies) : 12] == 0).all()
    assert (table[12 + len(frequencies) :] == 1).all()


def test_an_untruncated_ramp_is_that_of_gpt_oss() -> None:
    """Its pairs below 8.09 are not scaled, and those above 17.4 wholly."""
    parameters = {**YARN, "original_max_position_embeddings": 4096, "truncate": False}
    values = {"rope_parameters": parameters, "max_position_embeddings": 131072}
    found = rope_of(JsonFields(pathlib.Path("config.json"), values), 64).table()
    plain = Rope(150000.0, 64).table()
    ratios = [a / b for a, b in zip(found[:32], plain, strict=False)]
    assert ratios[8] == 1.0 > ratios[9]
    assert ratios[17] > ratios[18] == pytest.approx(1 / 32)
    assert found[32:] == pytest.approx([1.34657] * 32, abs=1e-5)


@pytest.mark.parametrize("adjacent", [False, True])
@pytest.mark.parametrize("rotary_dim", [0, 4, 10])
def test_rows_in_order_are_rotated_by_halves(rotary_dim: int, adjacent: bool) -> None:
    """The rotation of the whole head by the table, in this order, is that of the first elements as they are stored."""
    torch.manual_seed(4)
    rope = Rope(100.0, 10, rotary_dim=rotary_dim)
    order, table = list(rope.order(adjacent=adjacent) or range(10)), torch.tensor(rope.table())
    query, key = torch.randn(2, 10)

    def stored(x: torch.Tensor, position: int) -> torch.Tensor:
        first = x[:rotary_dim].view(-1, 2).unbind(-1) if adjacent else x[:rotary_dim].view(2, -1).unbind(0)
        turned = torch.complex(*first) * torch.polar(torch.ones(rotary_dim // 2), position * table[: rotary_dim // 2])
        return torch.cat((turned.real, turned.imag, x[rotary_dim:]))

    def ours(x: torch.Tensor, position: int) -> torch.Tensor:
        turned = torch.complex(*x[order].view(2, 5)) * torch.polar(table[5:], position * table[:5])
        return torch.cat((turned.real, turned.imag))

    for positions in ((3, 3), (9, 2)):
        expected = torch.dot(stored(query, positions[0]), stored(key, positions[1]))
        torch.testing.assert_close(torch.dot(ours(query, positions[0]), ours(key, positions[1])), expected)
