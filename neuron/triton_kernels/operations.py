"""The operations of a decoder's layer by Triton kernels: which kernel for how many rows.

Up to SKINNY_ROWS rows a projection is bound by its weights' bytes and takes the norm before it and the residual after
it into the same kernel; above, the large matmul and kernels of their own. A step of decodes alone takes five kernels a
layer: norm + qkv; norm, rotation, cache and attention; output + residual; norm + gate/up + activation; down + residual.
"""

import torch

from neuron.triton_kernels import activation, decode_attention, matmul, norm, prefill_attention, rope, skinny_matmul
from neuron.triton_kernels.batch import Batch
from neuron.triton_kernels.dispatch import SKINNY_ROWS, Norm, Rotary


class TritonOperations:
    """Launchers behind :class:`neuron.triton_kernels.dispatch.Operations`."""

    def normed_linear(
        self, x: torch.Tensor, norm_of: Norm, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return ``norm(x) weight^T + bias``."""
        if _fuses_norm(x):
            return skinny_matmul.skinny_matmul(x, weight, bias, norm=norm_of)
        return self._linear(norm.rms_norm(x, *norm_of), weight, bias)

    def normed_mlp_in(self, x: torch.Tensor, norm_of: Norm, gate_up: torch.Tensor) -> torch.Tensor:
        """Return ``silu(gate) * up`` of ``norm(x) gate_up^T``."""
        if _fuses_norm(x):
            return skinny_matmul.skinny_matmul(x, gate_up, norm=norm_of, activation="silu")
        return activation.silu_and_mul(self._linear(norm.rms_norm(x, *norm_of), gate_up, None))

    def add_linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
    ) -> None:
        """Add ``x weight^T + bias`` to ``residual`` in place."""
        if len(x) <= SKINNY_ROWS:
            skinny_matmul.skinny_matmul(x, weight, bias, residual=residual)
        else:
            residual.add_(matmul.matmul(x, weight, bias))

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
    ) -> torch.Tensor:
        """Norm and rotate heads, write keys and values, and attend: ``[T, H D]``."""
        decodes, sequences = batch.num_decodes, batch.context_lens.shape[0]
        if decodes == sequences:
            return decode_attention.rope_decode_attention(
                qkv, qk_norm, eps, rotary, key_cache, value_cache, batch, scale
            )
        q = rope.rope_and_cache(qkv, qk_norm, eps, rotary, batch.slots, key_cache, value_cache)
        out = torch.empty_like(q)
        if decodes:
            decode_attention.decode_attention(q, key_cache, value_cache, batch, scale, out, num_sequences=decodes)
        prefill_attention.prefill_attention(q, key_cache, value_cache, batch, scale, out, first_sequence=decodes)
        return out.view(len(q), -1)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Return ``x`` normalised."""
        return norm.rms_norm(x, weight, eps)

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return ``x weight^T``."""
        return self._linear(x, weight, None)

    def _linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if len(x) <= SKINNY_ROWS:
            return skinny_matmul.skinny_matmul(x, weight, bias)
        return matmul.matmul(x, weight, bias)


def _fuses_norm(x: torch.Tensor) -> bool:
    """Whether the norm can be a prologue: not for several rows of float16, which ``x g`` could overflow."""
    return len(x) == 1 or (len(x) <= SKINNY_ROWS and x.dtype != torch.float16)
