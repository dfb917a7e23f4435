"""The gated delta rule by its definition: in chunks, token by token, and where its numbers are extreme."""

from typing import Any

import pytest
import torch

from neuron.triton_kernels.batch import Batch
from neuron.triton_kernels.gated_delta import gated_delta

H, K, DK, DV = 4, 2, 16, 8


def step_of(num_tokens: int, *, decodes: bool = False) -> Batch:
    """Return a step of one sequence, in slot 1."""
    ends = torch.arange(num_tokens + 1) if decodes else torch.tensor([0, num_tokens])
    one = torch.ones(len(ends) - 1, dtype=torch.int32)
    return Batch(one, one.long(), ends.int(), one[:, None], one, num_decodes=int(decodes), state_slots=one)


def inputs(num_tokens: int, **changes: torch.Tensor) -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "qkv": torch.randn(num_tokens, 2 * K * DK + H * DV), "gates": torch.randn(num_tokens, 2 * H),
        "decay": -torch.rand(H) / 10, "bias": torch.randn(H), "states": torch.zeros(2, H, DK, DV), "tiled": False,
        **changes,
    }  # fmt: skip


def by_token(given: dict[str, Any]) -> torch.Tensor:
    """Return what the recurrence makes of each token in turn."""
    found = [
        gated_delta.eager(
            **{**given, "qkv": given["qkv"][t : t + 1], "gates": given["gates"][t : t + 1]},
            batch=step_of(1, decodes=True), chunk_tokens=64,
        )
        for t in range(len(given["qkv"]))
    ]  # fmt: skip
    return torch.cat(found)


def extremes(num_tokens: int) -> dict[str, dict[str, Any]]:
    plain = inputs(num_tokens)
    strong = torch.cat((torch.full((num_tokens, H), 8.0), torch.zeros(num_tokens, H)), 1)
    alike = plain["qkv"][:1].expand(num_tokens, -1) + 1e-3 * plain["qkv"]
    return {
        "plain": plain,
        "tiled": {**plain, "tiled": True},
        "keys alike, no decay": {**plain, "qkv": alike, "gates": strong, "decay": torch.full((H,), -1e-6)},
        "the same token": {**plain, "qkv": plain["qkv"][:1].repeat(num_tokens, 1), "gates": strong},
        "decay of 40": {**plain, "decay": torch.full((H,), -40.0), "gates": strong + 1},
        "zero keys": {**plain, "qkv": torch.zeros_like(plain["qkv"])},
    }


@pytest.mark.parametrize("name", extremes(1))
def test_chunks_equal_the_recurrence(name: str) -> None:
    given = extremes(150)[name]
    one, other = ({**given, "states": given["states"].clone()} for _ in range(2))
    found = gated_delta.eager(**one, batch=step_of(150), chunk_tokens=64)
    expected = by_token(other)
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-4)
    torch.testing.assert_close(one["states"], other["states"], atol=2e-5, rtol=2e-4)


def test_a_prompt_cut_at_chunks_has_the_same_bits() -> None:
    given = inputs(200)
    whole = gated_delta.eager(**{**given, "states": given["states"].clone()}, batch=step_of(200), chunk_tokens=64)
    parts = [
        gated_delta.eager(
            **{**given, "qkv": given["qkv"][run], "gates": given["gates"][run]},
            batch=step_of(len(range(200)[run])), chunk_tokens=64,
        )
        for run in (slice(0, 64), slice(64, 192), slice(192, 200))
    ]  # fmt: skip
    assert torch.equal(torch.cat(parts), whole)


def test_ten_thousand_tokens_stay_finite_and_bounded() -> None:
    """A state of values below 1 keeps below a bound, however slowly it decays."""
    given = inputs(10_000)
    given["decay"], given["qkv"] = torch.full((H,), -1e-5), given["qkv"].clamp(-1, 1)
    found = gated_delta.eager(**given, batch=step_of(10_000), chunk_tokens=64)
    assert found.isfinite().all()
    assert given["states"].abs().max() < 20


def test_other_slots_are_left_alone() -> None:
    given = inputs(70, states=torch.full((3, H, DK, DV), torch.nan))
    given["states"][1] = 0
    assert gated_delta.eager(**given, batch=step_of(70), chunk_tokens=64).isfinite().all()
    assert given["states"][[0, 2]].isnan().all()
