"""The operations of a decoder's layer by Triton kernels, chosen by the number of rows.

Up to SKINNY_ROWS rows a projection is bound by its weights' bytes and takes the norm before it and the residual after
it into the same kernel; above, the large matmul and separate kernels. A step of decodes alone takes five kernels a
layer: norm + qkv; norm, rotation, cache and attention; output + residual; norm + gate/up + activation; down + residual.
Quantised weights take eight: their products fuse the residual, not the norm or the activation.
"""

import torch

from neuron.triton_kernels import (
    activation,
    decode_attention,
    decode_step,
    matmul,
    moe_matmul,
    moe_routing,
    norm,
    prefill_attention,
    quantized_matmul,
    rope,
    rotary,
    sampling,
    skinny_matmul,
)
from neuron.triton_kernels.batch import Batch
from neuron.triton_kernels.decode_state import DecodeState
from neuron.triton_kernels.operations import SKINNY_ROWS, Experts, Norm, Picks, Rotary
from neuron.triton_kernels.quantized import Matrix, QuantizedMatrix, StackedMatrix
from neuron.triton_kernels.routing import Routing, route
from neuron.triton_kernels.sampling_rows import SamplingRows


class TritonOperations:
    """Launchers behind :class:`neuron.triton_kernels.operations.Operations`."""

    def normed_linear(self, x: torch.Tensor, norm_of: Norm, weight: Matrix, bias: torch.Tensor | None) -> torch.Tensor:
        """Return ``norm(x) weight^T + bias``."""
        if isinstance(weight, torch.Tensor) and _fuses_norm(x):
            return skinny_matmul.skinny_matmul(x, weight, bias, norm=norm_of)
        return self.linear(norm.rms_norm(x, *norm_of), weight, bias)

    def normed_mlp_in(self, x: torch.Tensor, norm_of: Norm, gate_up: Matrix, function: str) -> torch.Tensor:
        """Return ``f(gate) * up`` of ``norm(x) gate_up^T``."""
        if isinstance(gate_up, torch.Tensor) and _fuses_norm(x):
            return skinny_matmul.skinny_matmul(x, gate_up, norm=norm_of, activation=function)
        return _gated(self.linear(norm.rms_norm(x, *norm_of), gate_up), function)

    def add_linear(self, x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None, residual: torch.Tensor) -> None:
        """Add ``x weight^T + bias`` to ``residual`` in place."""
        if isinstance(weight, QuantizedMatrix):
            quantized_matmul.quantized_matmul(x, weight, bias, residual=residual)
        elif isinstance(weight, torch.Tensor) and len(x) <= SKINNY_ROWS:
            skinny_matmul.skinny_matmul(x, weight, bias, residual=residual)
        else:
            residual.add_(self.linear(x, weight, bias))

    def add_normed(self, x: torch.Tensor, norm_of: Norm, residual: torch.Tensor) -> None:
        """Add ``norm(x)`` to ``residual`` in place."""
        residual.add_(norm.rms_norm(x, *norm_of))

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
        decodes, sequences = batch.num_decodes, batch.context_lens.shape[0]
        if decodes == sequences:
            return decode_attention.rope_decode_attention(
                qkv, qk_norm, eps, rotary, key_cache, value_cache, batch, scale, window=window
            )
        q = rope.rope_and_cache(qkv, qk_norm, eps, rotary, batch.slot_mapping, key_cache, value_cache)
        out = torch.empty_like(q)
        caches = key_cache, value_cache
        if decodes:
            decode_attention.decode_attention(q, *caches, batch, scale, out, num_sequences=decodes, window=window)
        prefill_attention.prefill_attention(q, *caches, batch, scale, out, first_sequence=decodes, window=window)
        return out.view(len(q), -1)

    def rotary_table(self, positions: torch.Tensor, inverse_frequencies: torch.Tensor, dtype: torch.dtype) -> Rotary:
        """Return cosine and sine of ``positions``."""
        return rotary.rotary_table(positions, inverse_frequencies, dtype)

    def add_experts(
        self,
        x: torch.Tensor,
        router: torch.Tensor,
        gate_up: Experts,
        down: Experts,
        picks: Picks,
        residual: torch.Tensor,
    ) -> None:
        """Add the weighted sum of the experts picked: two grouped matmuls, without a copy to the host."""
        chosen = moe_routing.route if len(x) <= moe_routing.MAX_TOKENS else route
        routing = chosen(self.linear(x, router), picks.choices, normalise=picks.normalise)
        inner = activation.silu_and_mul(_grouped(x, gate_up, routing, weighted=False))
        moe_routing.add_choices(_grouped(inner, down, routing, weighted=True), picks.choices, residual)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Return ``x`` normalised."""
        return norm.rms_norm(x, weight, eps)

    def linear(self, x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return ``x weight^T + bias``."""
        match weight:
            case QuantizedMatrix():
                return quantized_matmul.quantized_matmul(x, weight, bias)
            case StackedMatrix():
                out = quantized_matmul.quantized_matmul(x, weight, bias)
                start = 0
                for part in weight.parts:
                    columns = slice(start, start + part.shape[0])
                    start = columns.stop
                    if isinstance(part, torch.Tensor):
                        out[:, columns] = self.linear(x, part, None if bias is None else bias[columns])
                return out
            case _ if len(x) <= SKINNY_ROWS:
                return skinny_matmul.skinny_matmul(x, weight, bias)
            case _:
                return matmul.matmul(x, weight, bias)

    def sample(self, logits: torch.Tensor, rows: SamplingRows) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a token id int32 and its log-probability for each row."""
        return sampling.sample_rows(logits, rows)

    def begin_step(self, state: DecodeState) -> None:
        """Replace negative tokens, which name rows of the step before, by their sampled ids."""
        decode_step.begin_step(state)

    def end_step(self, state: DecodeState, ids: torch.Tensor, page_tokens: int) -> None:
        """Publish ``ids`` and advance each row that has not ended."""
        decode_step.end_step(state, ids, page_tokens)


def _gated(gate_up: torch.Tensor, function: str) -> torch.Tensor:
    return activation.silu_and_mul(gate_up) if function == "silu" else activation.gelu_and_mul(gate_up)


def _grouped(x: torch.Tensor, weight: Experts, routing: Routing, *, weighted: bool) -> torch.Tensor:
    if isinstance(weight, QuantizedMatrix):
        return quantized_matmul.quantized_moe_matmul(x, weight, routing, weighted=weighted)
    return moe_matmul.moe_matmul(x, weight, routing, weighted=weighted)


def _fuses_norm(x: torch.Tensor) -> bool:
    """Whether the norm can be a prologue: not for several rows of float16, which ``x g`` could overflow."""
    return len(x) == 1 or (len(x) <= SKINNY_ROWS and x.dtype != torch.float16)
