"""Checkpoints that wrap a language model with encoders of images: where the language model is in their files.

``config.json`` has it in ``text_config``, and the names of its tensors have a prefix. Tensors of the encoders are left
in the file.
"""

import pathlib
from collections.abc import Mapping
from typing import Any, Final

from neuron.models.errors import CorruptWeightsError
from neuron.models.files import quoted

WRAPPERS: Final = {
    "gemma3": ("Gemma3ForConditionalGeneration", "gemma3_text"),
    "llava": ("LlavaForConditionalGeneration", "llama"),
    "mistral3": ("Mistral3ForConditionalGeneration", "mistral"),
    "qwen3_5": ("Qwen3_5ForConditionalGeneration", "qwen3_5_text"),
    "qwen3_5_moe": ("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe_text"),
    "qwen3_8": ("Qwen3_5ForConditionalGeneration", "qwen3_8_text"),
    "qwen3_8_moe": ("Qwen3_5MoeForConditionalGeneration", "qwen3_8_moe_text"),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", "qwen3_vl_text"),
    "qwen3_vl_moe": ("Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe_text"),
}
"""Class of a wrapper, and the type of its language model where the file does not tell, by ``model_type``."""
_TEXT: Final = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
"""Prefixes of the language model's tensors, and those of the same tensors in a file of their own."""
_OTHERS: Final = ("vision_tower.", "multi_modal_projector.", "visual.", "audio_tower.")
"""Prefixes of an encoder's tensors, maybe behind ``model.``."""


def text_values(path: pathlib.Path, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the configuration of the language model in a ``config.json``, whose classes are the wrapper's.

    What is told of all parts stands beside ``text_config``, and whether the head is the embedding.
    """
    known, classes = WRAPPERS.get(str(values.get("model_type"))), values.get("architectures")
    if known is None or (classes and known[0] not in classes):
        return values
    inner = values.get("text_config")
    if not isinstance(inner, dict):
        raise CorruptWeightsError(path, f"text_config is {quoted(inner)}, not an object")
    tied = values.get("tie_word_embeddings", inner.get("tie_word_embeddings"))
    return {**values, "model_type": known[1], **inner, "architectures": None, "tie_word_embeddings": tied}


def text_name(name: str) -> str | None:
    """Return the name of a tensor as in a file of the language model alone, ``None`` for one of an encoder."""
    if name.removeprefix("model.").startswith(_OTHERS):
        return None
    prefix = next((prefix for prefix in _TEXT if name.startswith(prefix)), "")
    return _TEXT.get(prefix, "") + name.removeprefix(prefix)
