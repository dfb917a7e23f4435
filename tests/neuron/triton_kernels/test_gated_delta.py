"""The gated delta rule by its definition: in chunks, token by token, and where its numbers are extreme."""

import dataclasses
from typing import Any

import pytest
import torch

from neuron.triton_kernels.batch import Batch
from neuron.triton_kernels.causal_convolution import causal_convolution
from neuron.triton_kernels.gated_delta import DeltaRule, gated_delta
from neuron.triton_kernels.replay import replay_drafts

H, K, DK, DV = 4, 2, 16, 8
DRAFTS = 3


def step_of(num_tokens: int, *, decodes: bool = False) -> Batch:
    """Return a step of one sequence, in slot 1."""
    ends = torch.arange(num_tokens + 1) if decodes else torch.tensor([0, num_tokens])
    one = torch.ones(len(ends) - 1, dtype=torch.int32)
    return Batch(one, one.long(), ends.int(), one[:, None], one, num_decodes=int(decodes), state_slots=one)


def inputs(num_tokens: int, **changes: torch.Tensor) -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "qkv": torch.randn(num_tokens, 2 * K * DK + H * DV), "gates": torch.randn(num_tokens, 2 * H),
        "decay": -torch.rand(H) / 10, "bias": torch.randn(H), "states": torch.zeros(2, H, DK, DV),
        "drafted": torch.zeros(2, DRAFTS, 2 * H), "tiled": False,
        **changes,
    }  # fmt: skip


def run(given: dict[str, Any], batch: Batch) -> torch.Tensor:
    rule = DeltaRule(given["decay"], given["bias"], given["tiled"], chunk_tokens=64)
    return gated_delta.eager(given["qkv"], given["gates"], rule, given["states"], given["drafted"], batch)


def by_token(given: dict[str, Any]) -> torch.Tensor:
    """Return what the recurrence makes of each token in turn."""
    found = [
        run(
            {**given, "qkv": given["qkv"][t : t + 1], "gates": given["gates"][t : t + 1]}, step_of(1, decodes=True)
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
    found = run(one, step_of(150))
    expected = by_token(other)
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-4)
    torch.testing.assert_close(one["states"], other["states"], atol=2e-5, rtol=2e-4)


def test_a_prompt_cut_at_chunks_has_the_same_bits() -> None:
    given = inputs(200)
    whole = run({**given, "states": given["states"].clone()}, step_of(200))
    parts = [
        run(
            {**given, "qkv": given["qkv"][part], "gates": given["gates"][part]}, step_of(len(range(200)[part]))
        )
        for part in (slice(0, 64), slice(64, 192), slice(192, 200))
    ]  # fmt: skip
    assert torch.equal(torch.cat(parts), whole)


def test_ten_thousand_tokens_stay_finite_and_bounded() -> None:
    """A state of values below 1 keeps below a bound, however slowly it decays, and does not drift."""
    given = inputs(10_000)
    given["decay"], given["qkv"] = torch.full((H,), -1e-5), given["qkv"].clamp(-1, 1)
    found = run(given, step_of(10_000))
    assert found.isfinite().all()
    assert given["states"].abs().max() < 20
    expected = in_float64(given)
    error = (given["states"][1] - expected).abs().max() / expected.abs().max()
    assert error < 1e-5, f"the state is off by {error:.1e}"


def in_float64(given: dict[str, Any]) -> torch.Tensor:
    """Return the state ``[H, DK, DV]`` in float64 that the recurrence of the definition ends with."""
    _, k, v = given["qkv"].double().split((K * DK, K * DK, H * DV), 1)
    k = k.view(-1, K, DK)
    k = (k * (k.square().sum(-1, keepdim=True) + 1e-6).rsqrt()).repeat_interleave(H // K, 1)
    beta, alpha = given["gates"].double().split(H, 1)
    kept = (given["decay"] * torch.nn.functional.softplus(alpha + given["bias"])).exp()
    state = torch.zeros(H, DK, DV, dtype=torch.float64)
    for key, value, strength, factor in zip(k, v.view(-1, H, DV), beta.sigmoid(), kept, strict=True):
        state = state * factor[:, None, None]
        change = strength[:, None] * (value - torch.einsum("hkv,hk->hv", state, key))
        state = state + key[:, :, None] * change[:, None]
    return state


def test_other_slots_are_left_alone() -> None:
    given = inputs(70, states=torch.full((3, H, DK, DV), torch.nan))
    given["states"][1] = 0
    assert run(given, step_of(70)).isfinite().all()
    assert given["states"][[0, 2]].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verified_drafts_leave_the_state_of_decodes_to_the_bit(dtype: torch.dtype) -> None:
    """Every number of accepted tokens, behind every other; outputs of accepted tokens are equal too."""
    given = inputs(60)
    x, gates = torch.randn(60, 2 * K * DK + H * DV).to(dtype), given["gates"].to(dtype)
    weight = torch.randn(x.shape[1], 4).to(dtype)
    rule = DeltaRule(given["decay"], given["bias"], tiled=False, chunk_tokens=64)

    def step(
        kept: list[torch.Tensor], rows: torch.Tensor, own_gates: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        convolved, states, drafted = kept
        if batch.replays is not None:
            replay_drafts.eager(convolved, weight, drafted, rule, states, batch)
        qkv = causal_convolution.eager(rows, weight, convolved, batch)
        return gated_delta.eager(qkv, own_gates, rule, states, drafted, batch), kept

    def fresh() -> list[torch.Tensor]:
        shape = (2, DRAFTS, 2 * H)
        return [
            torch.zeros(2, 3 + DRAFTS, x.shape[1]).to(dtype), torch.zeros(2, H, DK, DV), torch.zeros(shape).to(dtype)
        ]  # fmt: skip

    decoded, kept = fresh(), fresh()
    expected, states = [], []
    for t in range(60):
        expected.append(step(decoded, x[t : t + 1], gates[t : t + 1], step_of(1, decodes=True))[0])
        states.append([decoded[0][1, :3].clone(), decoded[1][1].clone()])
    at, accepted = 0, 0
    plan = [(3, 0), (3, 3), (0, 0), (2, 1), (0, 0), (3, 2), (3, 1), (1, 1), (1, 0), (2, 2), (3, 3), (0, 0)]
    for count, right in plan:
        rows, own = x[at : at + 1 + count].clone(), gates[at : at + 1 + count].clone()
        rows[1 + right :], own[1 + right :] = 7.0, -3.0
        batch = step_of(1 + count, decodes=not count)
        batch = dataclasses.replace(
            batch, num_drafting=int(count > 0), replays=torch.tensor([accepted]) if accepted else None
        )
        out, _ = step(kept, rows, own, batch)
        assert torch.equal(out[: 1 + right], torch.cat(expected[at : at + 1 + right]))
        for found, wanted in zip((kept[0][1, :3], kept[1][1]), states[at], strict=True):
            assert torch.equal(found, wanted)
        at, accepted = at + 1 + right, right
