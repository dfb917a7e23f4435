"""Gated MLP (arXiv:2002.05202): ``x += norm_out(W_down (f(W_gate y) * W_up y))`` with ``y = norm(x)``."""

import dataclasses
from typing import TYPE_CHECKING, Any

from neuron.cpu_kernels import native
from neuron.layers.layer import Weights
from neuron.layers.norm import Norm
from neuron.layers.parameters import Fused, Matrix, Parameters, Tensor
from neuron.layers.shard import WHOLE, Shard

if TYPE_CHECKING:
    import torch

    from neuron.layers.step import Step


@dataclasses.dataclass(frozen=True, slots=True)
class GatedMlp:
    """Gated MLP of ``width``."""

    norm: Norm
    width: int
    activation: str = "silu"
    """Activation of the gate: ``silu``, or ``gelu`` in its tanh form."""
    out_norm: bool = False
    """Whether the output is normalised before it is added to the residual; its norms have other names then."""
    gguf_norm: str = "ffn_norm"
    """Name of the norm in GGUF."""

    def parameters(self, shard: Shard = WHOLE) -> Parameters:
        """See :class:`~neuron.layers.layer.Layer`."""
        hidden, run = self.norm.size, shard.width(self.width)
        gate, up = (
            Tensor(f"mlp.{which}_proj.weight", f"ffn_{which}.weight", (self.width, hidden), (run,))
            for which in ("gate", "up")
        )
        down = Tensor("mlp.down_proj.weight", "ffn_down.weight", (hidden, self.width), columns=(run,))
        before = "pre_feedforward" if self.out_norm else "post_attention"
        found: Parameters = {
            "norm": self.norm.vector(f"{before}_layernorm", self.gguf_norm),
            "gate_up": Matrix((gate, up), fused=Fused("mlp.gate_up_proj.weight", "ffn_up.weight"), gated=True),
            "down": Matrix((down,)),
        }
        if self.out_norm:
            found["out_norm"] = self.norm.vector("post_feedforward_layernorm", "post_ffw_norm")
        return found

    def cache(self, shard: Shard = WHOLE) -> None:
        """See :class:`~neuron.layers.layer.Layer`."""

    def workspace(self, shard: Shard = WHOLE) -> int:
        """See :class:`~neuron.layers.layer.Layer`: gate and up, and their product."""
        return 3 * len(shard.width(self.width))

    def forward(self, step: "Step", weights: Weights, residual: "torch.Tensor", cache: Any) -> None:
        """See :class:`~neuron.layers.layer.Layer`."""
        eps = self.norm.eps
        x = step.operations.normed_mlp_in(residual, (weights["norm"], eps), weights["gate_up"].weight, self.activation)
        step.add_linear(x, weights["down"], (weights["out_norm"], eps) if self.out_norm else None, residual)

    def pack(self, model: native.Model, weights: Weights) -> None:
        """See :class:`~neuron.layers.layer.PackedLayer`."""
        model.add_mlp(
            norm=weights["norm"],
            eps=self.norm.eps,
            gate_up=weights["gate_up"][0],
            down=weights["down"][0],
            width=self.width,
            gelu=self.activation != "silu",
            out_norm=weights.get("out_norm"),
        )
