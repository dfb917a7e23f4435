"""The operations in eager torch: compositions of :mod:`neuron.triton_kernels.reference`."""

import torch

from neuron.triton_kernels import reference, sampling_reference
from neuron.triton_kernels.batch import Batch
from neuron.triton_kernels.decode_state import DecodeState
from neuron.triton_kernels.operations import Experts, Norm, Picks, Rotary
from neuron.triton_kernels.quantized import Matrix
from neuron.triton_kernels.routing import route
from neuron.triton_kernels.sampling_rows import SamplingRows


class EagerOperations:
    """:class:`neuron.triton_kernels.operations.Operations` in eager torch."""

    def normed_linear(self, x: torch.Tensor, norm: Norm, weight: Matrix, bias: torch.Tensor | None) -> torch.Tensor:
        """Return ``norm(x) weight^T + bias``."""
        return reference.linear(reference.rms_norm(x, *norm), weight, bias)

    def normed_mlp_in(self, x: torch.Tensor, norm: Norm, gate_up: Matrix, activation: str) -> torch.Tensor:
        """Return ``f(gate) * up`` of ``norm(x) gate_up^T``."""
        product = reference.linear(reference.rms_norm(x, *norm), gate_up)
        return reference.silu_and_mul(product) if activation == "silu" else reference.gelu_and_mul(product)

    def add_linear(self, x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None, residual: torch.Tensor) -> None:
        """Add ``x weight^T + bias`` to ``residual`` in place."""
        residual.add_(reference.linear(x, weight, bias))

    def add_normed(self, x: torch.Tensor, norm: Norm, residual: torch.Tensor) -> None:
        """Add ``norm(x)`` to ``residual`` in place."""
        residual.add_(reference.rms_norm(x, *norm))

    def attention(
        self,
        qkv: torch.Tensor,
        qk_norm: torch.Tensor | None,
        eps: float,
        rotary: Rotary,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: Batch,
        scale: float,
        window: int,
    ) -> torch.Tensor:
        """Norm and rotate heads, write keys and values, and attend: ``[T, H D]``."""
        q = reference.rope_and_cache(qkv, qk_norm, eps, rotary, batch.slot_mapping, key_cache, value_cache)
        return reference.paged_attention(q, key_cache, value_cache, batch, scale, window)

    def rotary_table(self, positions: torch.Tensor, inverse_frequencies: torch.Tensor, dtype: torch.dtype) -> Rotary:
        """Return cosine and sine of ``positions``."""
        return reference.rotary_table(positions, inverse_frequencies, dtype)

    def add_experts(
        self,
        x: torch.Tensor,
        router: torch.Tensor,
        gate_up: Experts,
        down: Experts,
        picks: Picks,
        residual: torch.Tensor,
    ) -> None:
        """Add the weighted sum of the experts picked."""
        routing = route(reference.matmul(x, router), picks.choices, normalise=picks.normalise)
        inner = reference.silu_and_mul(reference.moe_matmul(x, gate_up, routing))
        reference.add_choices(reference.moe_matmul(inner, down, routing, weighted=True), picks.choices, residual)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Return ``x`` normalised."""
        return reference.rms_norm(x, weight, eps)

    def linear(self, x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return ``x weight^T + bias``."""
        return reference.linear(x, weight, bias)

    def sample(self, logits: torch.Tensor, rows: SamplingRows) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a token id int32 and its log-probability for each row."""
        return sampling_reference.sample_rows(logits, rows)

    def begin_step(self, state: DecodeState) -> None:
        """Replace negative tokens, which name rows of the step before, by their sampled ids."""
        sampling_reference.begin_step(state)

    def end_step(self, state: DecodeState, ids: torch.Tensor, page_tokens: int) -> None:
        """Publish ``ids`` and advance each row that has not ended."""
        sampling_reference.end_step(state, ids, page_tokens)
