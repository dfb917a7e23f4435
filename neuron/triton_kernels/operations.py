"""Operations of a step, as layers and the engine call them: ``operations.rms_norm(x, weight, eps)``.

Each is declared in a file of its own; here they are bound to eager torch or to Triton kernels, and
:mod:`neuron.triton_kernels.dispatch` chooses for a device.
"""

from typing import Final

from neuron.triton_kernels import (
    activation,
    attention,
    causal_convolution,
    decode_step,
    gated_delta,
    gated_norm,
    linear,
    moe_matmul,
    moe_routing,
    norm,
    replay,
    rotary,
    sampling,
)


class Operations:
    """Operations in one of their forms; :class:`neuron.triton_kernels.operation.Operation` has both."""

    normed_linear = linear.normed_linear
    normed_mlp_in = linear.normed_mlp_in
    add_linear = linear.add_linear
    linear = linear.linear
    rms_norm = norm.rms_norm
    rotary_table = rotary.rotary_table
    attention = attention.attention
    causal_convolution = causal_convolution.causal_convolution
    gated_delta = gated_delta.gated_delta
    replay_drafts = replay.replay_drafts
    gated_norm = gated_norm.gated_norm
    gated_activation = activation.gated_activation
    route = moe_routing.route
    moe_matmul = moe_matmul.moe_matmul
    add_choices = moe_routing.add_choices
    sample = sampling.sample
    begin_step = decode_step.begin_step
    end_step = decode_step.end_step

    def __init__(self, *, by_kernels: bool) -> None:
        self.by_kernels = by_kernels
        """Whether they are Triton kernels, not eager torch."""


EAGER: Final = Operations(by_kernels=False)
KERNELS: Final = Operations(by_kernels=True)
