"""The models that are known by a short name, shipped as data: sources, sizes, memory, capabilities, sampling.

``known_models.toml`` has the facts of each; tests hold them to the code of its family. No network, and no nodes.
"""

import functools
import importlib.resources
import tomllib
from collections.abc import Mapping
from typing import Annotated, Final

import msgspec

from cortex.config import ModelProfile
from cortex.wire.node import Capability, SamplingDefaults, SourceText

BITS: Final = {"Q4_1": 5.0, "Q4_K_M": 4.9, "Q8_0": 8.5, "BF16": 16.0}
"""Bits per weight of quantisations, over all weights of a file."""
USUAL_TOKENS: Final = 8192
"""Context by which memory is told where none is named."""


class KnownModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A model as its publishers describe it. ``name`` is its short name; ``architecture`` the ``model_type``."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9.-]*$")]
    title: str
    architecture: str
    source: SourceText
    """Repository whose choices are offered, or one file."""
    license: str
    parameters: int
    """Parameters of the language model."""
    context_tokens: int
    """Longest context."""
    cache_bytes_per_token: int
    """Bytes of keys and values of a token in bfloat16, in layers without a window."""
    state_bytes: int = 0
    """Bytes of a sequence beside them: the window of layers that have one, and recurrent state."""
    quants: tuple[str, ...]
    """Quantisations of the source by which sizes are told, the usual one first; the source may have more."""
    capabilities: tuple[Capability, ...] = (Capability.CHAT,)
    sampling: SamplingDefaults = SamplingDefaults()
    """Sampling that the publishers recommend."""

    @property
    def usual_quant(self) -> str:
        """Return the quantisation by which its size is told where none is named."""
        return self.quants[0]

    def weights_bytes(self, quant: str = "") -> int:
        """Return about what the weights take in a quantisation, without one in the usual."""
        return int(self.parameters * BITS[quant or self.usual_quant] / 8)

    def memory_bytes(self, quant: str = "", context_tokens: int = USUAL_TOKENS) -> int:
        """Return about what a load takes for one sequence: weights and cache, without work space."""
        tokens = min(context_tokens, self.context_tokens)
        return self.weights_bytes(quant) + tokens * self.cache_bytes_per_token + self.state_bytes

    def profile(self, tag: str = "") -> ModelProfile:
        """Return the catalogue's entry of the model, with its source as it is or of one choice."""
        source = f"{self.source}:{tag}" if tag else self.source
        return ModelProfile(id=self.name, source=source, sampling=self.sampling, memory_bytes=self.memory_bytes())


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    models: tuple[KnownModel, ...]


@functools.cache
def known_models() -> Mapping[str, KnownModel]:
    """Return the known models by name, in the order of the file."""
    text = importlib.resources.files("cortex").joinpath("known_models.toml").read_text()
    return {model.name: model for model in msgspec.convert(tomllib.loads(text), _File).models}


def search(words: str, models: Mapping[str, KnownModel]) -> list[KnownModel]:
    """Return the models that have each of the words in a name, the licence or the capabilities; all without words."""
    wanted = words.lower().split()

    def text_of(model: KnownModel) -> str:
        fields = (model.name, model.title, model.architecture, model.license, model.source, *model.capabilities)
        return " ".join(fields).lower()

    return [model for model in models.values() if all(word in text_of(model) for word in wanted)]
