"""Head that drafts tokens from the model's own hidden states (multi-token prediction, DeepSeek-V3, arXiv:2412.19437).

``h'_t = norm(block(W [norm(e_(t+1)), norm(h_t)]))`` with the embedding e of a token, and the model's last hidden state
h, behind its final norm, at the token before it. The model's head makes logits of ``h'_t``, for token t + 2; in place
of ``h_(t+1)``, ``h'_t`` drafts a further token. The block attends to its own keys and values at t, t - 1, ..., 0.
"""

import dataclasses
from typing import TYPE_CHECKING, Final

from neuron.layers.layer import Layer, Weights
from neuron.layers.norm import Norm
from neuron.layers.parameters import Matrix, Parameters, Tensor

if TYPE_CHECKING:
    import torch

    from neuron.layers.step import Step

KEPT_TOKENS: Final = 64
"""Number of a sequence's last tokens whose hidden states are kept: the head may lag so far behind the model."""


def hidden_places(max_sequences: int, step_rows: int) -> int:
    """Return the number of hidden states that are kept: of each sequence, and of all rows of a step."""
    return max_sequences * KEPT_TOKENS + step_rows


@dataclasses.dataclass(frozen=True, slots=True)
class DraftHead:
    """Head of one block of layers. Each rank has the whole of what is beside the block."""

    norm: Norm
    block: tuple[Layer, ...]

    def parameters(self) -> Parameters:
        """Return the parameters beside those of the block, with names inside of the head."""
        hidden = self.norm.size
        return {
            "embedding_norm": self.norm.vector("pre_fc_norm_embedding", "nextn.enorm"),
            "hidden_norm": self.norm.vector("pre_fc_norm_hidden", "nextn.hnorm"),
            "projection": Matrix((Tensor("fc.weight", "nextn.eh_proj.weight", (hidden, 2 * hidden)),)),
            "norm": self.norm.vector("norm", "nextn.shared_head_norm"),
        }

    def workspace(self) -> int:
        """Return the activations of a token beside those of the block: both inputs, normalised and joined."""
        return 4 * self.norm.size

    def joined(
        self, step: "Step", weights: Weights, embedded: "torch.Tensor", hidden: "torch.Tensor"
    ) -> "torch.Tensor":
        """Return the input of the block ``[T, hidden]``."""
        operations, eps = step.operations, self.norm.eps
        parts = (
            operations.rms_norm(embedded, weights["embedding_norm"], eps),
            operations.rms_norm(hidden, weights["hidden_norm"], eps),
        )
        return operations.linear(step.side_by_side(*parts), weights["projection"].weight)

    def normed(self, step: "Step", weights: Weights, residual: "torch.Tensor") -> "torch.Tensor":
        """Return the hidden state ``h'`` ``[T, hidden]`` of the output of the block."""
        return step.operations.rms_norm(residual, weights["norm"], self.norm.eps)
