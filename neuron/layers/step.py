"""Step of T tokens, as the forward pass of layers gets it: operations, the batch, and values that layers share."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from neuron.formats.matrix import Matrix
from neuron.layers.cache import CHUNK_TOKENS
from neuron.triton_kernels.batch import AttentionParameters, Batch, PagedCache
from neuron.triton_kernels.gated_delta import DeltaRule
from neuron.triton_kernels.moe_matmul import Experts
from neuron.triton_kernels.moe_routing import Picks
from neuron.triton_kernels.norm import Norm
from neuron.triton_kernels.operations import Operations
from neuron.triton_kernels.rotary import Rotary

OverRanks = Callable[[torch.Tensor], torch.Tensor]
"""Sum or gather of a tensor over the ranks that hold a model, in place or not."""


class Linear(NamedTuple):
    """Loaded matrix ``[out, in]``, maybe quantised, and its bias ``[out]``."""

    weight: Matrix
    bias: torch.Tensor | None


class Step:
    """Step on one device; ``sum_ranks`` where several ranks hold the model."""

    def __init__(
        self, operations: Operations, batch: Batch, dtype: torch.dtype, sum_ranks: OverRanks | None = None
    ) -> None:
        self.operations = operations
        self.batch = batch
        """The step with the page table of the layer that runs."""
        self._dtype = dtype
        self._sum_ranks = sum_ranks
        self._rotary: dict[int, Rotary] = {}
        self._query_scales: dict[tuple[float, int], torch.Tensor] = {}

    def rotary(self, rope: torch.Tensor) -> Rotary:
        """Return cosine and sine of the batch's positions, computed once a step for each ``rope``: Rope.table()."""
        found = self._rotary.get(id(rope))
        if found is None:
            found = self.operations.rotary_table(self.batch.positions, rope, self._dtype)
            self._rotary[id(rope)] = found
        return found

    def query_scales(self, factor: float, context_tokens: int) -> torch.Tensor:
        """Return the factors ``[T, 1]`` by which queries grow with their positions, computed once a step."""
        found = self._query_scales.get((factor, context_tokens))
        if found is None:
            contexts = torch.div(self.batch.positions, context_tokens, rounding_mode="floor")
            found = torch.log1p(contexts.float()).mul_(factor).add_(1).to(self._dtype).unsqueeze(1)
            self._query_scales[factor, context_tokens] = found
        return found

    def attend(
        self,
        qkv: torch.Tensor,
        rotary: Rotary,
        cache: PagedCache,
        *,
        scale: float,
        window: int,
        qk_norm: torch.Tensor | None,
        eps: float,
    ) -> torch.Tensor:
        """Return the attention ``[T, H D]`` of the projections ``qkv``, whose keys and values are written."""
        parameters = AttentionParameters(scale, window, qk_norm=qk_norm, eps=eps)
        return self.operations.attention(qkv, rotary, cache, self.batch, parameters)

    def ungated(self, x: torch.Tensor, num_kv_heads: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return queries, keys and values ``[T, (H + 2 K) D]``, and gates ``[T, H D]``, of projections of all these.

        In ``x`` ``[T, 2 (H + K) D]`` the gate of each query head stands behind it.
        """
        width = x.shape[1] - 2 * num_kv_heads * head_dim
        queries, gates = x[:, :width].view(len(x), -1, 2, head_dim).unbind(2)
        return torch.cat((queries.flatten(1), x[:, width:]), dim=1), gates.flatten(1)

    def side_by_side(self, *parts: torch.Tensor) -> torch.Tensor:
        """Return the columns of all ``parts`` ``[T, ...]`` in one tensor."""
        return torch.cat(parts, dim=1)

    def regrouped(self, x: torch.Tensor, num_groups: int, widths: Sequence[int]) -> torch.Tensor:
        """Return ``x`` with the parts of ``widths`` of all its groups side by side, instead of all parts of each group.

        ``[T, num_groups * sum(widths)]``.
        """
        parts = torch.split(x.view(len(x), num_groups, -1), list(widths), dim=2)
        return torch.cat([part.flatten(1) for part in parts], dim=1)

    def add_linear(self, x: torch.Tensor, linear: Linear, norm: Norm | None, residual: torch.Tensor) -> None:
        """Add ``x weight^T + bias``, summed over the ranks and normalised where ``norm`` is given, to ``residual``."""
        operations = self.operations
        if norm is None and self._sum_ranks is None:
            operations.add_linear(x, linear.weight, linear.bias, residual)
            return
        x = operations.linear(x, linear.weight, linear.bias)
        if self._sum_ranks is not None:
            x = self._sum_ranks(x)
        residual.add_(x if norm is None else operations.rms_norm(x, *norm))

    def begin_sum(self, residual: torch.Tensor) -> torch.Tensor:
        """Return the tensor to which a layer adds several results: the residual, unless ranks sum them first."""
        return residual if self._sum_ranks is None else torch.zeros_like(residual)

    def end_sum(self, added: torch.Tensor, residual: torch.Tensor) -> None:
        """Add the sum over the ranks of what :meth:`begin_sum` has returned."""
        if self._sum_ranks is not None:
            residual.add_(self._sum_ranks(added))

    def delta_rule(self, weights: Mapping[str, Any], *, tiled: bool) -> DeltaRule:
        """Return the constants of a gated delta net."""
        return DeltaRule(weights["decay"], weights["bias"], tiled, CHUNK_TOKENS)

    def add_experts(
        self,
        x: torch.Tensor,
        router: torch.Tensor,
        gate_up: Experts,
        down: Experts,
        added: torch.Tensor,
        *,
        correction: torch.Tensor | None,
        **picks: Any,
    ) -> None:
        """Add the weighted sum of the experts that ``router`` ``[E, hidden]`` picks for each row, as in ``picks``."""
        operations, chosen = self.operations, Picks(**picks)
        routing = operations.route(operations.linear(x, router), chosen, correction)
        inner = operations.gated_activation(operations.moe_matmul(x, gate_up, routing), "silu")
        operations.add_choices(operations.moe_matmul(inner, down, routing, weighted=True), chosen.choices, added)
