"""Families that this engine runs. A new one is a file beside this one and a line here."""

from typing import Final

from neuron.models import (
    gemma3,
    glm4_moe,
    llama,
    mistral,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_5,
    qwen3_moe,
    qwen3_next,
    smollm3,
)
from neuron.models.errors import UnsupportedArchitectureError
from neuron.models.family import Family

FAMILIES: Final[dict[str, Family]] = {
    name: family
    for family in (
        *(llama.FAMILY, mistral.FAMILY, phi3.FAMILY, smollm3.FAMILY, gemma3.FAMILY),
        *(qwen3_5.FAMILY, qwen3_5.MOE_FAMILY, qwen3_next.FAMILY),
        *(qwen2.FAMILY, qwen2_moe.FAMILY, qwen3.FAMILY, qwen3_moe.FAMILY, glm4_moe.FAMILY),
    )
    for name in (family.name, family.gguf_name or family.name, *family.other_names)
}


def find_family(name: str, class_names: tuple[str, ...] | None, where: object) -> Family:
    """Return the family of that name; ``class_names`` are from ``config.json``, ``None`` for GGUF.

    Raises :class:`UnsupportedArchitectureError`.
    """
    found = FAMILIES.get(name)
    if found is None or (class_names is not None and not set(class_names) & _class_names(found)):
        names = f"{name} ({', '.join(class_names)})" if class_names else name
        raise UnsupportedArchitectureError(
            f"{where}: architecture {names!r} is not supported; supported are {', '.join(sorted(FAMILIES))}"
        )
    return found


def _class_names(family: Family) -> set[str]:
    """Return a family's classes, including the ones without a head, which make embeddings."""
    without_head = {name.removesuffix("ForCausalLM") + "Model" for name in family.class_names}
    return {*family.class_names, *without_head}
