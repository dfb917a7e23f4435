"""Interface of a layer.

A layer is a frozen value of sizes and constants. It adds its result to the residual stream; a decoder is a list of
blocks of layers between an embedding and a head. A layer with ``pack`` runs on the CPU kernels too. No torch is
imported here: a daemon plans memory with layers.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from neuron.cpu_kernels import native
from neuron.layers.cache import Cache
from neuron.layers.parameters import Parameters
from neuron.layers.shard import WHOLE, Shard

if TYPE_CHECKING:
    import torch

    from neuron.layers.step import Step

Weights = Mapping[str, Any]
"""Loaded parameters of a layer by name: a tensor, or of a matrix a :class:`~neuron.layers.step.Linear`."""


class Layer(Protocol):
    """Layer of a decoder."""

    def parameters(self, shard: Shard = WHOLE) -> Parameters:
        """Return the parameters that a rank holds, with names inside of a block."""

    def cache(self, shard: Shard = WHOLE) -> Cache | None:
        """Return what a rank keeps of earlier tokens; ``None``: nothing."""

    def workspace(self, shard: Shard = WHOLE) -> int:
        """Return the activations of a token on a rank at its widest point, beside the residual stream."""

    def forward(self, step: "Step", weights: Weights, residual: "torch.Tensor", cache: Any) -> None:
        """Add the layer's output to ``residual`` ``[T, hidden]`` in place, and write to ``cache``."""


@runtime_checkable
class PackedLayer(Layer, Protocol):
    """Layer that the CPU kernels run."""

    def pack(self, model: native.Model, weights: Weights) -> None:
        """Add the layer with its packed ``weights`` to a step in C.

        A vector is float32 of whole registers, a matrix the tuple of its tensors' native matrices. Raises
        :class:`~neuron.cpu_kernels.native.UnsupportedError` where no kernel runs it.
        """
