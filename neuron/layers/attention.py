"""Grouped-query attention with a rotary embedding (arXiv:2305.13245, arXiv:2104.09864), norms and projections.

``x += norm_out(W_o attend(rotate(norm_qk(W_qkv norm(x)))))``; the norms of heads and of the output are optional, and a
gate of the output before W_o (arXiv:2505.06708).
"""

import dataclasses
from typing import TYPE_CHECKING, Any

from neuron.cpu_kernels import native
from neuron.layers.cache import PagedKV
from neuron.layers.layer import Weights
from neuron.layers.norm import Norm
from neuron.layers.parameters import Constant, Fused, Matrix, Parameters, Tensor, Vector
from neuron.layers.rope import Rope
from neuron.layers.shard import WHOLE, Shard, scaled

if TYPE_CHECKING:
    import torch

    from neuron.layers.step import Step


@dataclasses.dataclass(frozen=True, slots=True)
class QueryGrowth:
    """Growth of the queries with the position: by 1 + ``factor`` ln(1 + floor(position / ``context_tokens``)).

    It keeps the attention of long contexts sharp (Llama 4, Ministral 3).
    """

    factor: float = 0.0
    context_tokens: int = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Attention:
    """Attention of ``num_heads``, H, over ``num_kv_heads``, K. Raises ``ValueError`` if these do not fit."""

    norm: Norm
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope
    scale: float
    """Factor of the scores."""
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    """Whether each query and key head is normalised before it is rotated."""
    out_norm: bool = False
    """Whether the output is normalised before it is added to the residual."""
    gated: bool = False
    """Whether the output is multiplied by the sigmoid of gates, whose rows stand behind those of each query head."""
    query_growth: QueryGrowth = QueryGrowth()
    window_tokens: int = 0
    """Number of last tokens, its own included, that a token attends to; 0: all."""
    gguf_interleaves: bool = False
    """Whether GGUF stores the rows of each query and key head as pairs (2i, 2i + 1)."""

    def __post_init__(self) -> None:
        """Check the sizes."""
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} heads cannot share {self.num_kv_heads} key-value heads")
        if self.qk_norm and self.query_growth.factor:
            raise ValueError("queries that are normalised cannot grow with the position")

    def parameters(self, shard: Shard = WHOLE) -> Parameters:
        """See :class:`~neuron.layers.layer.Layer`."""
        hidden, dim = self.norm.size, self.head_dim
        orders = self.rope.order(), self.rope.order(adjacent=self.gguf_interleaves)
        query_dim = 2 * dim if self.gated else dim
        query_orders = tuple((*order, *range(dim, query_dim)) if order else () for order in orders)
        heads, kv_heads = shard.query_heads(self.num_heads, self.num_kv_heads), shard.kv_heads(self.num_kv_heads)
        each = [
            ("q", self.num_heads * query_dim, scaled((heads,), query_dim), query_orders),
            ("k", self.num_kv_heads * dim, scaled((kv_heads,), dim), orders),
            ("v", self.num_kv_heads * dim, scaled((kv_heads,), dim), ((), ())),
        ]

        def tensors(kind: str, *columns: int) -> tuple[Tensor, ...]:
            return tuple(
                dataclasses.replace(
                    Tensor(f"self_attn.{x}_proj.{kind}", f"attn_{x}.{kind}", (size, *columns), rows),
                    order=order,
                    gguf_order=gguf_order,
                )
                for x, size, rows, (order, gguf_order) in each
            )

        output = Tensor(
            "self_attn.o_proj.weight",
            "attn_output.weight",
            (hidden, self.num_heads * dim),
            columns=scaled((heads,), dim),
        )
        # Ranks' partial products are summed: the bias is in one of them.
        has_output_bias = self.output_bias and not shard.rank
        output_bias = (Tensor("self_attn.o_proj.bias", "attn_output.bias", (hidden,)),) if has_output_bias else ()
        found: Parameters = {
            "norm": self.norm.vector("input_layernorm", "attn_norm"),
            "qkv": Matrix(
                tensors("weight", hidden),
                tensors("bias") if self.qkv_bias else (),
                Fused("self_attn.qkv_proj.weight", "attn_qkv.weight"),
            ),
            "output": Matrix((output,), output_bias),
            "rope": Constant(self.rope.table()),
        }
        if self.qk_norm:
            norm = dataclasses.replace(self.norm, size=dim)
            names = (("self_attn.q_norm", "attn_q_norm"), ("self_attn.k_norm", "attn_k_norm"))
            # [H + K, D]: the query norm's weights for each query head, then the key norm's for each key head.
            both = (norm.tensor(*pair) for pair in names)
            tensors_of_heads = tuple(dataclasses.replace(each, order=orders[0], gguf_order=orders[1]) for each in both)
            found["qk_norm"] = Vector(tensors_of_heads, (len(heads), len(kv_heads)))
        if self.out_norm:
            found["out_norm"] = self.norm.vector("post_attention_layernorm", "post_attention_norm")
        return found

    def cache(self, shard: Shard = WHOLE) -> PagedKV:
        """See :class:`~neuron.layers.layer.Layer`."""
        return PagedKV(len(shard.kv_heads(self.num_kv_heads)), self.head_dim, self.window_tokens)

    def workspace(self, shard: Shard = WHOLE) -> int:
        """See :class:`~neuron.layers.layer.Layer`."""
        heads = len(shard.query_heads(self.num_heads, self.num_kv_heads))
        kv_heads = len(shard.kv_heads(self.num_kv_heads))
        gated = 3 * heads + 2 * kv_heads if self.gated else 0
        return (2 * (heads + kv_heads) + gated) * self.head_dim

    def forward(self, step: "Step", weights: Weights, residual: "torch.Tensor", cache: Any) -> None:
        """See :class:`~neuron.layers.layer.Layer`."""
        eps, qkv, rotary = self.norm.eps, weights["qkv"], step.rotary(weights["rope"])
        x = step.operations.normed_linear(residual, (weights["norm"], eps), qkv.weight, qkv.bias)
        qk_norm, gates = weights.get("qk_norm"), None
        if self.gated:
            x, gates = step.ungated(x, cache.keys.shape[2], self.head_dim)
        if self.query_growth.factor:
            # A rotation is linear, so the queries may be scaled before it; such models have no norm of heads.
            queries = x[:, : x.shape[1] - 2 * cache.keys.shape[2] * self.head_dim]
            queries *= step.query_scales(self.query_growth.factor, self.query_growth.context_tokens)
        x = step.attend(x, rotary, cache, scale=self.scale, window=self.window_tokens, qk_norm=qk_norm, eps=eps)
        if gates is not None:
            x *= gates.sigmoid()
        step.add_linear(x, weights["output"], (weights["out_norm"], eps) if self.out_norm else None, residual)

    def pack(self, model: native.Model, weights: Weights) -> None:
        """See :class:`~neuron.layers.layer.PackedLayer`."""
        model.add_attention(
            norm=weights["norm"],
            eps=self.norm.eps,
            qkv=weights["qkv"],
            output=weights["output"][0],
            rope=weights["rope"],
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            scale=self.scale,
            window_tokens=self.window_tokens,
            gated=self.gated,
            query_growth=self.query_growth.factor,
            query_tokens=self.query_growth.context_tokens,
            qk_norm=weights.get("qk_norm"),
            out_norm=weights.get("out_norm"),
        )
