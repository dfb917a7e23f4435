"""Mixture of experts: the weighted sum of the few gated MLPs (SiLU) that a router picks for each token.

``x += sum_e p_e W_down,e (silu(W_gate,e y) * W_up,e y)`` with ``y = norm(x)`` and p the router's softmax
(arXiv:2101.03961, with several choices).
"""

import dataclasses
from typing import TYPE_CHECKING, Any

from neuron.layers.layer import Weights
from neuron.layers.norm import Norm
from neuron.layers.parameters import Fused, Matrix, Parameters, Tensor
from neuron.layers.shard import WHOLE, Shard

if TYPE_CHECKING:
    import torch

    from neuron.layers.step import Step


@dataclasses.dataclass(frozen=True, slots=True)
class Experts:
    """``num_experts`` of ``width``, ``choices`` of them for a token. Raises ``ValueError`` if there are fewer."""

    norm: Norm
    num_experts: int
    choices: int
    width: int
    normalise: bool = True
    """Whether the weights of the picked experts are normalised to sum to 1."""
    transposed: bool = False
    """Whether safetensors with one tensor for all experts may have their matrices as ``[in, out]``."""

    def __post_init__(self) -> None:
        """Check the sizes."""
        if self.choices > self.num_experts:
            raise ValueError(f"{self.choices} of {self.num_experts} experts are picked")

    def parameters(self, shard: Shard = WHOLE) -> Parameters:
        """See :class:`~neuron.layers.layer.Layer`."""
        hidden, run, numbers = self.norm.size, shard.width(self.width), range(self.num_experts)
        inner = tuple(
            Tensor(f"mlp.experts.{i}.{which}_proj.weight", f"ffn_{which}_exps.{i}", (self.width, hidden), run)
            for i in numbers
            for which in ("gate", "up")
        )
        outer = tuple(
            Tensor(f"mlp.experts.{i}.down_proj.weight", f"ffn_down_exps.{i}", (hidden, self.width), columns=run)
            for i in numbers
        )
        router = Tensor("mlp.gate.weight", "ffn_gate_inp.weight", (self.num_experts, hidden))
        return {
            "norm": self.norm.vector("post_attention_layernorm", "ffn_norm"),
            "router": Matrix((router,), quantised=False),
            "gate_up": Matrix(
                inner,
                fused=Fused("mlp.experts.gate_up_proj", "ffn_gate_up_exps.weight", self.transposed),
                num_experts=self.num_experts,
                gated=True,
            ),
            "down": Matrix(
                outer,
                fused=Fused("mlp.experts.down_proj", "ffn_down_exps.weight", self.transposed),
                num_experts=self.num_experts,
            ),
        }

    def cache(self, shard: Shard = WHOLE) -> None:
        """See :class:`~neuron.layers.layer.Layer`."""

    def workspace(self, shard: Shard = WHOLE) -> int:
        """See :class:`~neuron.layers.layer.Layer`: of each picked expert gate, up, their product and the output."""
        return self.choices * (3 * len(shard.width(self.width)) + self.norm.size)

    def forward(self, step: "Step", weights: Weights, residual: "torch.Tensor", cache: Any) -> None:
        """See :class:`~neuron.layers.layer.Layer`."""
        x = step.operations.rms_norm(residual, weights["norm"], self.norm.eps)
        router, gate_up, down = (weights[name].weight for name in ("router", "gate_up", "down"))
        step.add_experts(x, router, gate_up, down, residual, choices=self.choices, normalise=self.normalise)
