"""Routing of tokens to experts, as tensors, for mixture-of-experts matmuls and their reference."""

import dataclasses

import torch


@dataclasses.dataclass(frozen=True, slots=True)
class Routing:
    """Rows of each expert, for T tokens with C choices each; all on the device."""

    order: torch.Tensor
    """``[T C]`` int32: pairs, as ``token * C + choice``, sorted by expert."""
    starts: torch.Tensor
    """``[E + 1]`` int32: expert e has ``order[starts[e]:starts[e + 1]]``."""
    weights: torch.Tensor
    """``[T C]`` float32: the weight of each pair, by pair."""
    choices: int


def route(scores: torch.Tensor, choices: int, *, normalise: bool = True) -> Routing:
    """Choose the ``choices`` likeliest experts of each token from router ``scores`` ``[T, E]``."""
    probabilities = scores.float().softmax(-1)
    weights, experts = probabilities.topk(choices, dim=-1)
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    flat = experts.reshape(-1)
    order = flat.argsort(stable=True)
    numbers = torch.arange(scores.shape[1] + 1, device=scores.device)
    starts = torch.searchsorted(flat.index_select(0, order), numbers)
    return Routing(order.to(torch.int32), starts.to(torch.int32), weights.reshape(-1).contiguous(), choices)
