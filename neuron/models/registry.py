"""Architectures that this engine runs. A new one is a file beside this one and a line here."""

from typing import Final

from neuron.models.architecture import Architecture
from neuron.models.errors import UnsupportedArchitectureError
from neuron.models.gemma3 import GEMMA3
from neuron.models.llama import LLAMA
from neuron.models.qwen2 import QWEN2
from neuron.models.qwen3 import QWEN3
from neuron.models.qwen3_moe import QWEN3_MOE

ARCHITECTURES: Final[dict[str, Architecture]] = {
    name: found
    for found in (LLAMA, QWEN2, QWEN3, QWEN3_MOE, GEMMA3)
    for name in (found.name, found.gguf_architecture or found.name)
}


def find_architecture(name: str, class_names: tuple[str, ...] | None, where: object) -> Architecture:
    """Return the architecture of that name; ``class_names`` are from ``config.json``, ``None`` for GGUF.

    Raises :class:`UnsupportedArchitectureError`.
    """
    found = ARCHITECTURES.get(name)
    if found is None or (class_names is not None and not set(class_names) & _class_names(found)):
        names = f"{name} ({', '.join(class_names)})" if class_names else name
        raise UnsupportedArchitectureError(
            f"{where}: architecture {names!r} is not supported; supported are {', '.join(sorted(ARCHITECTURES))}"
        )
    return found


def _class_names(architecture: Architecture) -> set[str]:
    """Return an architecture's classes, including the ones without a head, which make embeddings."""
    without_head = {name.removesuffix("ForCausalLM") + "Model" for name in architecture.class_names}
    return {*architecture.class_names, *without_head}
