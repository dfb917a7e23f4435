"""Interface of the operations of a decoder's layer, fused as far as a kernel fuses them, and of sampling.

A forward pass is written once against :class:`Operations`; :mod:`neuron.triton_kernels.eager_operations` and
:mod:`neuron.triton_kernels.triton_operations` implement it, and :mod:`neuron.triton_kernels.dispatch` chooses.
"""

from typing import Final, NamedTuple, Protocol

import torch

from neuron.triton_kernels.batch import Batch
from neuron.triton_kernels.decode_state import DecodeState
from neuron.triton_kernels.quantized import Matrix, QuantizedMatrix
from neuron.triton_kernels.sampling_rows import SamplingRows

SKINNY_ROWS: Final = 64
"""Most rows for which a projection is bound by the weights' bytes."""

Rotary = tuple[torch.Tensor, torch.Tensor]
Norm = tuple[torch.Tensor, float]
Experts = torch.Tensor | QuantizedMatrix
"""Weights of experts: ``[E, N, K]``, or ``[E N, K]`` quantised."""


class Picks(NamedTuple):
    """Number of experts of a token, and whether their weights are normalised to sum to 1."""

    choices: int
    normalise: bool


class Operations(Protocol):
    """Operations of a decoder's layer; shapes as in :mod:`neuron.triton_kernels.reference`."""

    def normed_linear(self, x: torch.Tensor, norm: Norm, weight: Matrix, bias: torch.Tensor | None) -> torch.Tensor:
        """Return ``norm(x) weight^T + bias``."""

    def normed_mlp_in(self, x: torch.Tensor, norm: Norm, gate_up: Matrix, activation: str) -> torch.Tensor:
        """Return ``f(gate) * up`` of ``norm(x) gate_up^T``, f being ``"silu"`` or ``"gelu"``."""

    def add_linear(self, x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None, residual: torch.Tensor) -> None:
        """Add ``x weight^T + bias`` to ``residual`` in place."""

    def add_normed(self, x: torch.Tensor, norm: Norm, residual: torch.Tensor) -> None:
        """Add ``norm(x)`` to ``residual`` in place."""

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
        """Norm and rotate heads, write keys and values, and attend to the last ``window`` or all: ``[T, H D]``."""

    def rotary_table(self, positions: torch.Tensor, inverse_frequencies: torch.Tensor, dtype: torch.dtype) -> Rotary:
        """Return cosine and sine of ``positions``."""

    def add_experts(
        self,
        x: torch.Tensor,
        router: torch.Tensor,
        gate_up: Experts,
        down: Experts,
        picks: Picks,
        residual: torch.Tensor,
    ) -> None:
        """Add the weighted sum of the experts that ``router`` ``[E, hidden]`` picks for each row (SiLU)."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Return ``x`` normalised."""

    def linear(self, x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return ``x weight^T + bias``."""

    def sample(self, logits: torch.Tensor, rows: SamplingRows) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a token id int32 and its log-probability for each row of ``logits`` ``[R, V]``."""

    def begin_step(self, state: DecodeState) -> None:
        """Replace negative tokens, which name rows of the step before, by their sampled ids."""

    def end_step(self, state: DecodeState, ids: torch.Tensor, page_tokens: int) -> None:
        """Publish ``ids`` ``[B]`` and advance each row that has not ended."""
