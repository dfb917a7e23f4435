"""Mixture of experts after the norm: routing, two grouped matmuls and their sum, without a copy to the host."""

import torch

from neuron.triton_kernels.activation import gated_activation
from neuron.triton_kernels.linear import linear
from neuron.triton_kernels.moe_matmul import Experts, moe_matmul
from neuron.triton_kernels.moe_routing import Picks, add_choices, route
from neuron.triton_kernels.operation import Operation


@Operation
def add_experts(
    x: torch.Tensor,
    router: torch.Tensor,
    correction: torch.Tensor | None,
    gate_up: Experts,
    down: Experts,
    picks: Picks,
    residual: torch.Tensor,
) -> None:
    """Add the weighted sum of the experts that ``router`` ``[E, hidden]`` picks for each row to ``residual`` (SiLU)."""
    routing = route.eager(linear.eager(x, router), picks, correction)
    inner = gated_activation.eager(moe_matmul.eager(x, gate_up, routing), "silu")
    add_choices.eager(moe_matmul.eager(inner, down, routing, weighted=True), picks.choices, residual)


@add_experts.launcher
def _launch(
    x: torch.Tensor,
    router: torch.Tensor,
    correction: torch.Tensor | None,
    gate_up: Experts,
    down: Experts,
    picks: Picks,
    residual: torch.Tensor,
) -> None:
    routing = route.triton(linear.triton(x, router), picks, correction)
    inner = gated_activation.triton(moe_matmul.triton(x, gate_up, routing), "silu")
    add_choices.triton(moe_matmul.triton(inner, down, routing, weighted=True), picks.choices, residual)
