"""Mixture of experts: the weighted sum of the few gated MLPs (SiLU) that a router picks for each token.

``x += sum_e p_e W_down,e (silu(W_gate,e y) * W_up,e y)`` with ``y = norm(x)`` and p of the router (arXiv:2101.03961,
with several choices); and where there is one, an expert that all tokens share (arXiv:2401.06066).
"""

import dataclasses
from typing import TYPE_CHECKING, Any

from neuron.layers.layer import Weights
from neuron.layers.norm import Norm
from neuron.layers.parameters import Fused, Matrix, Parameters, Tensor, Vector
from neuron.layers.shard import WHOLE, Shard

if TYPE_CHECKING:
    import torch

    from neuron.layers.step import Step


@dataclasses.dataclass(frozen=True, slots=True)
class Router:
    """Router of each token to ``choices`` of its experts. Raises ``ValueError`` for groups that are too small."""

    num_experts: int
    choices: int
    normalise: bool = True
    """Whether the weights of the picked experts are normalised to sum to 1."""
    sigmoid: bool = False
    """Whether an expert's weight is the sigmoid of its score, not its share by softmax."""
    corrected: bool = False
    """Whether a bias is added to the weights for the choice alone (arXiv:2408.15664)."""
    num_groups: int = 1
    """Number of groups of experts; those of the ``top_groups`` with the best two experts are picked from."""
    top_groups: int = 1
    scale: float = 1.0
    """Factor of the weights."""

    def __post_init__(self) -> None:
        """Check the sizes."""
        if self.choices > self.num_experts:
            raise ValueError(f"{self.choices} of {self.num_experts} experts are picked")
        if self.num_groups == 1:
            return
        size, rest = divmod(self.num_experts, self.num_groups)
        if rest or size < 2 or self.top_groups > self.num_groups or self.choices > self.top_groups * size:
            groups = f"{self.top_groups} of {self.num_groups} groups"
            raise ValueError(f"{self.choices} of {self.num_experts} experts are picked from {groups}")

    def parameters(self, hidden: int) -> Parameters:
        """Return its parameters."""
        scores = Tensor("mlp.gate.weight", "ffn_gate_inp.weight", (self.num_experts, hidden))
        found: Parameters = {"router": Matrix((scores,), quantised=False)}
        if self.corrected:
            bias = Tensor("mlp.gate.e_score_correction_bias", "exp_probs_b.bias", (self.num_experts,))
            # In half precision its small differences, on which the choice depends, would be lost.
            found["correction"] = Vector((bias,), float32=True)
        return found


@dataclasses.dataclass(frozen=True, slots=True)
class SharedExpert:
    """Expert of all tokens."""

    width: int
    name: str
    """Prefix of its tensors in safetensors."""
    gated: bool = False
    """Whether its output is multiplied by the sigmoid of a product with the token."""

    def parameters(self, hidden: int, shard: Shard) -> Parameters:
        """Return the parameters that a rank holds."""
        run = shard.width(self.width)
        gate, up = (
            Tensor(f"{self.name}.{which}_proj.weight", f"ffn_{which}_shexp.weight", (self.width, hidden), (run,))
            for which in ("gate", "up")
        )
        down = Tensor(f"{self.name}.down_proj.weight", "ffn_down_shexp.weight", (hidden, self.width), columns=(run,))
        found: Parameters = {"shared_gate_up": Matrix((gate, up), gated=True), "shared_down": Matrix((down,))}
        if self.gated:
            share = Tensor(f"{self.name}_gate.weight", "ffn_gate_inp_shexp.weight", (1, hidden))
            found["shared_gate"] = Matrix((share,), quantised=False)
        return found


@dataclasses.dataclass(frozen=True, slots=True)
class Experts:
    """Experts of ``width`` that ``router`` picks."""

    norm: Norm
    router: Router
    width: int
    shared: SharedExpert | None = None
    transposed: bool = False
    """Whether safetensors with one tensor for all experts may have their matrices as ``[in, out]``."""
    gguf_norm: str = "ffn_norm"
    """Name of the norm in GGUF."""

    def parameters(self, shard: Shard = WHOLE) -> Parameters:
        """See :class:`~neuron.layers.layer.Layer`."""
        hidden, run, numbers = self.norm.size, shard.width(self.width), range(self.router.num_experts)
        inner = tuple(
            Tensor(f"mlp.experts.{i}.{which}_proj.weight", f"ffn_{which}_exps.{i}", (self.width, hidden), (run,))
            for i in numbers
            for which in ("gate", "up")
        )
        outer = tuple(
            Tensor(f"mlp.experts.{i}.down_proj.weight", f"ffn_down_exps.{i}", (hidden, self.width), columns=(run,))
            for i in numbers
        )
        fused = (
            Fused("mlp.experts.gate_up_proj", "ffn_gate_up_exps.weight", self.transposed),
            Fused("mlp.experts.down_proj", "ffn_down_exps.weight", self.transposed),
        )
        return {
            "norm": self.norm.vector("post_attention_layernorm", self.gguf_norm),
            **self.router.parameters(hidden),
            "gate_up": Matrix(inner, fused=fused[0], num_experts=self.router.num_experts, gated=True),
            "down": Matrix(outer, fused=fused[1], num_experts=self.router.num_experts),
            **({} if self.shared is None else self.shared.parameters(hidden, shard)),
        }

    def cache(self, shard: Shard = WHOLE) -> None:
        """See :class:`~neuron.layers.layer.Layer`."""

    def workspace(self, shard: Shard = WHOLE) -> int:
        """See :class:`~neuron.layers.layer.Layer`: of each expert of a token gate, up, their product and the output."""
        shared = 0 if self.shared is None else 3 * len(shard.width(self.shared.width)) + self.norm.size
        return self.router.choices * (3 * len(shard.width(self.width)) + self.norm.size) + shared

    def forward(self, step: "Step", weights: Weights, residual: "torch.Tensor", cache: Any) -> None:
        """See :class:`~neuron.layers.layer.Layer`."""
        operations, norm, router = step.operations, (weights["norm"], self.norm.eps), self.router
        x = operations.rms_norm(residual, *norm)
        # Before the residual changes: a fused product takes the norm in.
        shared = None
        if self.shared is not None:
            shared = operations.normed_mlp_in(residual, norm, weights["shared_gate_up"].weight, "silu")
        added = step.begin_sum(residual)
        scores, gate_up, down = (weights[name].weight for name in ("router", "gate_up", "down"))
        step.add_experts(
            x, scores, gate_up, down, added,
            correction=weights.get("correction"), choices=router.choices, normalise=router.normalise,
            sigmoid=router.sigmoid, num_groups=router.num_groups, top_groups=router.top_groups, scale=router.scale,
        )  # fmt: skip
        if shared is not None:
            down = weights["shared_down"].weight
            if "shared_gate" in weights:
                # Of one column, for which no kernel of products is made.
                share = (x.float() * weights["shared_gate"].weight).sum(1, keepdim=True).sigmoid().to(x.dtype)
                added.addcmul_(operations.linear(shared, down), share)
            else:
                operations.add_linear(shared, down, None, added)
        step.end_sum(added, residual)
