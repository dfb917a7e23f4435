"""Ends of a decoder: the embedding of tokens, and the head that makes logits of the last hidden state."""

import dataclasses
from typing import TYPE_CHECKING

from neuron.layers.layer import Weights
from neuron.layers.norm import Norm
from neuron.layers.parameters import Matrix, Parameters, Tensor
from neuron.layers.shard import WHOLE, Shard

if TYPE_CHECKING:
    import torch

    from neuron.layers.step import Linear
    from neuron.triton_kernels.operations import Operations


@dataclasses.dataclass(frozen=True, slots=True)
class Embedding:
    """Table of ``vocab_size`` vectors of ``hidden_size``, whole on every rank."""

    vocab_size: int
    hidden_size: int
    scale: float = 1.0
    """Factor of the vectors, rounded to the model's dtype first, as such models were trained."""

    def parameters(self, shard: Shard = WHOLE) -> Parameters:
        """Return its parameters, with full names."""
        shape = self.vocab_size, self.hidden_size
        return {"table": Matrix((Tensor("model.embed_tokens.weight", "token_embd.weight", shape),), rounded=False)}


@dataclasses.dataclass(frozen=True, slots=True)
class Head:
    """Norm of the last hidden state, and the matrix of ``vocab_size`` rows that logits come from, shared by ranks."""

    norm: Norm
    vocab_size: int
    tied: bool = False
    """Whether its matrix is the embedding's table."""
    logit_cap: float = 0.0
    """Soft cap of the logits, by tanh; 0: none."""

    def parameters(self, shard: Shard = WHOLE) -> Parameters:
        """Return its parameters, with full names; a tied matrix is the embedding's."""
        found: Parameters = {"norm": self.norm.vector("model.norm", "output_norm")}
        if not self.tied:
            shape, rows = (self.vocab_size, self.norm.size), (shard.vocabulary(self.vocab_size),)
            found["matrix"] = Matrix((Tensor("lm_head.weight", "output.weight", shape, rows),), rounded=False)
        return found

    def normed(self, operations: "Operations", weights: Weights, residual: "torch.Tensor") -> "torch.Tensor":
        """Return the normalised hidden state ``[T, hidden]``."""
        return operations.rms_norm(residual, weights["norm"], self.norm.eps)

    def logits(self, operations: "Operations", weights: Weights, hidden: "torch.Tensor") -> "torch.Tensor":
        """Return the logits ``[R, V]`` in float32 of ``hidden`` ``[R, hidden]``; a rank's run of the vocabulary."""
        matrix: Linear = weights["matrix"]
        found = operations.linear(hidden, matrix.weight).float()
        return found.div_(self.logit_cap).tanh_().mul_(self.logit_cap) if self.logit_cap else found
