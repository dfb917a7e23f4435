"""Gated delta net (arXiv:2412.06464): linear attention that keeps a state of fixed size in place of keys and values.

``q, k, v = conv(W_qkv y)``, ``x += W_o (norm(delta(q, k, v; W_b y, W_a y)) * silu(W_z y))`` with ``y = norm(x)``;
:mod:`neuron.triton_kernels.gated_delta` has the rule. As in Qwen3-Next and Qwen3.5.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

from neuron.cpu_kernels import native
from neuron.layers.cache import MAX_DRAFTS, SequenceState, StateTensor
from neuron.layers.layer import Weights
from neuron.layers.norm import Norm
from neuron.layers.parameters import Fused, Matrix, Parameters, Tensor, Vector
from neuron.layers.shard import WHOLE, Runs, Shard, count, scaled, tiled_heads

if TYPE_CHECKING:
    import torch

    from neuron.layers.step import Step


@dataclasses.dataclass(frozen=True, slots=True)
class GatedDelta:
    """Gated delta net of ``num_value_heads``, H, over ``num_key_heads``, K. Raises ``ValueError`` if these do not fit.

    ``width`` is the convolution's, W.
    """

    norm: Norm
    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    width: int
    joins_inputs: bool = False
    """Whether the projections of q, k, v and z are one matrix: the rows of a key head, then those of the next."""
    joins_gates: bool = False
    """Whether the projections of beta and alpha are one matrix in the same way."""
    tiled: bool = False
    """Whether value head h has key head ``h % K`` and not ``h // (H / K)``: GGUF reorders them so."""

    def __post_init__(self) -> None:
        """Check the sizes."""
        if self.num_value_heads % self.num_key_heads:
            raise ValueError(f"{self.num_value_heads} value heads cannot share {self.num_key_heads} key heads")
        if self.width < 2:
            raise ValueError(f"a convolution of {self.width} tokens is not supported")

    def parameters(self, shard: Shard = WHOLE) -> Parameters:
        """See :class:`~neuron.layers.layer.Layer`."""
        hidden, (keys, values) = self.norm.size, self._heads(shard)
        key_width, value_width = self.num_key_heads * self.key_dim, self.num_value_heads * self.value_dim
        key_rows, value_rows = scaled((keys,), self.key_dim), scaled(values, self.value_dim)
        parts = (("q", key_width, key_rows), ("k", key_width, key_rows), ("v", value_width, value_rows))
        group, heads = self.num_value_heads // self.num_key_heads, (self.num_value_heads,)

        def of_parts(stem: str, gguf: str, columns: int) -> tuple[Tensor, ...]:
            return tuple(
                Tensor(f"linear_attn.{stem}_{x}.weight", f"{gguf}_{x}.weight", (size, columns), rows)
                for x, size, rows in parts
            )

        def joined(stem: str, gguf: str, shared: int, each: int) -> Tensor:
            # Of a key head: rows that its value heads share, then two kinds of rows of each of these.
            every = shared + 2 * group * each
            if count(values) == group * len(keys):
                rows = scaled((keys,), every)
            else:
                (part,), start = values, keys.start * every + shared
                firsts = [start + kind * group * each + (part.start - keys.start * group) * each for kind in (0, 1)]
                rows = (range(start - shared, start), *(range(at, at + len(part) * each) for at in firsts))
            shape = (self.num_key_heads * every, hidden)
            return Tensor(f"linear_attn.{stem}.weight", gguf, shape, tuple(run for run in rows if run))

        found: Parameters = {"norm": self.norm.vector("input_layernorm", "attn_norm")}
        if self.joins_inputs:
            found["qkvz"] = Matrix((joined("in_proj_qkvz", "ssm_in.weight", 2 * self.key_dim, self.value_dim),))
        else:
            fused = Fused("linear_attn.in_proj_qkv.weight", "attn_qkv.weight")
            z = Tensor("linear_attn.in_proj_z.weight", "attn_gate.weight", (value_width, hidden), value_rows)
            found["qkv"] = Matrix(of_parts("in_proj", "attn", hidden), fused=fused)
            found["z"] = Matrix((z,))
        if self.joins_gates:
            gates = [joined("in_proj_ba", "ssm_ba.weight", 0, 1)]
        else:
            names = (("b", "beta"), ("a", "alpha"))
            gates = [
                Tensor(f"linear_attn.in_proj_{x}.weight", f"ssm_{y}.weight", (*heads, hidden), values) for x, y in names
            ]
        decay = Tensor("linear_attn.A_log", "ssm_a", heads, values, log_of_negative=True)
        output = Tensor("linear_attn.out_proj.weight", "ssm_out.weight", (hidden, value_width), columns=value_rows)
        return {
            **found,
            "convolution": Matrix(
                of_parts("conv1d", "ssm_conv1d", self.width),
                fused=Fused("linear_attn.conv1d.weight", "ssm_conv1d.weight"),
                quantised=False,
            ),
            # A rounding of the decay would be raised to the power of the context.
            "gates": Matrix(tuple(gates), quantised=False),
            "decay": Vector((decay,), float32=True),
            "bias": Vector((Tensor("linear_attn.dt_bias", "ssm_dt.bias", heads, values),), float32=True),
            "head_norm": Norm(self.value_dim, self.norm.eps).vector("linear_attn.norm", "ssm_norm"),
            "output": Matrix((output,)),
        }

    def cache(self, shard: Shard = WHOLE) -> SequenceState:
        """See :class:`~neuron.layers.layer.Layer`.

        Last inputs of the convolution and those of draft tokens behind them, the state of the rule, and the drafts'
        gates.
        """
        keys, values = self._heads(shard)
        channels = 2 * len(keys) * self.key_dim + count(values) * self.value_dim
        state = StateTensor((count(values), self.key_dim, self.value_dim), in_float32=True)
        inputs, drafted = (self.width - 1 + MAX_DRAFTS, channels), (MAX_DRAFTS, 2 * count(values))
        return SequenceState((StateTensor(inputs), state, StateTensor(drafted)))

    def workspace(self, shard: Shard = WHOLE) -> int:
        """See :class:`~neuron.layers.layer.Layer`: q, k and v before the convolution and behind it, z and outputs."""
        keys, values = self._heads(shard)
        return 4 * len(keys) * self.key_dim + (5 * self.value_dim + 2) * count(values)

    def forward(self, step: "Step", weights: Weights, residual: "torch.Tensor", cache: Any) -> None:
        """See :class:`~neuron.layers.layer.Layer`."""
        (inputs, states, drafted), operations = cache, step.operations
        num_heads = states.shape[1]
        x = operations.rms_norm(residual, weights["norm"], self.norm.eps)
        gates = operations.linear(x, weights["gates"].weight)
        num_keys = (inputs.shape[2] - num_heads * self.value_dim) // (2 * self.key_dim)
        group = num_heads // num_keys
        if self.joins_gates:
            gates = step.regrouped(gates, num_keys, (group, group))
        if self.joins_inputs:
            widths = self.key_dim, self.key_dim, group * self.value_dim, group * self.value_dim
            x = step.regrouped(operations.linear(x, weights["qkvz"].weight), num_keys, widths)
            qkv, z = x[:, : inputs.shape[2]], x[:, inputs.shape[2] :]
        else:
            qkv, z = (operations.linear(x, weights[name].weight) for name in ("qkv", "z"))
        rule, convolution = step.delta_rule(weights, tiled=self.tiled), weights["convolution"].weight
        if step.batch.replays is not None:
            operations.replay_drafts(inputs, convolution, drafted, rule, states, step.batch)
        qkv = operations.causal_convolution(qkv, convolution, inputs, step.batch)
        out = operations.gated_delta(qkv, gates, rule, states, drafted, step.batch)
        out = operations.gated_norm(out, z, weights["head_norm"], self.norm.eps)
        step.add_linear(out, weights["output"], None, residual)

    def pack(self, model: native.Model, weights: Weights) -> None:
        """See :class:`~neuron.layers.layer.PackedLayer`."""
        if self.joins_inputs or self.joins_gates:
            raise native.UnsupportedError("projections of several kinds are one matrix")
        model.add_gated_delta(
            norm=weights["norm"],
            eps=self.norm.eps,
            qkv=weights["qkv"],
            z=weights["z"],
            gates=weights["gates"],
            convolution=weights["convolution"],
            decay=weights["decay"],
            bias=weights["bias"],
            head_norm=weights["head_norm"],
            output=weights["output"][0],
            num_key_heads=self.num_key_heads,
            num_value_heads=self.num_value_heads,
            key_dim=self.key_dim,
            value_dim=self.value_dim,
            width=self.width,
            max_drafts=MAX_DRAFTS,
            tiled=self.tiled,
        )

    def _heads(self, shard: Shard) -> tuple[range, Runs]:
        """Return a rank's key heads and value heads."""
        heads = self.num_value_heads, self.num_key_heads
        values = tiled_heads(shard, *heads) if self.tiled else (shard.query_heads(*heads),)
        return shard.kv_heads(self.num_key_heads), values
