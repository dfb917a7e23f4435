"""RMS normalisation (arXiv:1910.07467): its constants, and the declaration of its weights."""

import dataclasses

from neuron.layers.parameters import Tensor, Vector


@dataclasses.dataclass(frozen=True, slots=True)
class Norm:
    """Norm over ``size`` elements."""

    size: int
    eps: float
    less_one: bool = False
    """Whether safetensors store its weights less one."""

    def tensor(self, name: str, gguf: str) -> Tensor:
        """Return the tensor of its weights, by its names without ``.weight``."""
        return Tensor(name + ".weight", gguf + ".weight", (self.size,), less_one=self.less_one)

    def vector(self, name: str, gguf: str) -> Vector:
        """Return the parameter of its weights alone."""
        return Vector((self.tensor(name, gguf),))
