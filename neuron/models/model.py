"""A model as read from its files: an embedding, blocks of layers and a head, and the constants beside them.

All sizes follow from the layers' declarations. Imports no torch: the daemon's preflight uses the same functions as the
worker that loads the model.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from cortex.wire.node import SamplingDefaults
from neuron.device.jobs import Pooling
from neuron.formats.scheme import Scheme
from neuron.layers.attention import Attention
from neuron.layers.cache import Cache
from neuron.layers.draft_head import DraftHead
from neuron.layers.embedding import Embedding, Head
from neuron.layers.layer import Layer
from neuron.layers.parameters import Parameters, Tensor, tensors_of, within
from neuron.layers.shard import WHOLE, Shard
from neuron.models.gguf import TensorKind

StoredKind = TensorKind | Scheme
"""Storage of a tensor: a GGUF kind, or a scheme of several tensors in safetensors."""
DTYPE_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclasses.dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Sampling defaults that the model's authors recommend; ``None`` where there are none."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None

    def under(self, wanted: SamplingDefaults) -> "GenerationDefaults":
        """Return these defaults, overridden by the ones in a model's entry."""
        given = {name: getattr(wanted, name) for name in wanted.__struct_fields__}
        return dataclasses.replace(self, **{name: value for name, value in given.items() if value is not None})


@dataclasses.dataclass(frozen=True, slots=True)
class ModelConfig:
    """Layers and constants of a model."""

    family: str
    embedding: Embedding
    blocks: tuple[tuple[Layer, ...], ...]
    """Layers of each block, in the order of computation."""
    head: Head
    context_tokens: int
    """Longest context that the model was trained for, prompt and output together."""
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    generation: GenerationDefaults = GenerationDefaults()
    pooling: Pooling = Pooling.LAST
    """Pooling of its embeddings."""
    generates: bool = True
    """Whether it generates text, not embeddings alone."""
    unused: tuple[str, ...] = ()
    """Prefixes of tensors, by their names in either format, that a checkpoint may have beside the model's."""
    draft_head: DraftHead | None = None
    """Head that drafts tokens, where the checkpoint has one."""
    tensor_kinds: Mapping[str, StoredKind] = dataclasses.field(default_factory=dict)
    """Storage of each tensor of a GGUF file, and of each quantised one of a folder, by safetensors name."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens of the vocabulary."""
        return self.embedding.vocab_size

    @property
    def hidden_size(self) -> int:
        """Size of the residual stream."""
        return self.embedding.hidden_size

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers, in the order of computation; without those of the draft head."""
        return tuple(itertools.chain.from_iterable(self.blocks))

    @property
    def draft_layers(self) -> tuple[Layer, ...]:
        """Layers of the draft head."""
        return () if self.draft_head is None else self.draft_head.block

    def without_draft_head(self) -> "ModelConfig":
        """Return the model without its draft head."""
        return dataclasses.replace(self, draft_head=None)

    def within(self, context_tokens: int) -> "ModelConfig":
        """Return the model as loaded for contexts of so many tokens: the rotary embedding of some depends on it."""
        found = {layer: _within(layer, context_tokens) for layer in {*self.layers, *self.draft_layers}}
        draft_head = self.draft_head
        if draft_head is not None:
            draft_head = dataclasses.replace(draft_head, block=tuple(found[layer] for layer in draft_head.block))
        blocks = tuple(tuple(found[layer] for layer in block) for block in self.blocks)
        return dataclasses.replace(self, blocks=blocks, draft_head=draft_head)

    def parameters(self, shard: Shard = WHOLE) -> Iterator[Parameters]:
        """Yield a rank's parameters, with full names: of the embedding, of each layer in order, and of the head.

        Those of the draft head, where there is one, are before the head's: of its layers, behind what is beside these.
        """
        yield self.embedding.parameters(shard)
        # Blocks have layers in common, whose declaration is made once.
        declared = {layer: layer.parameters(shard) for layer in set(self.layers)}
        for number, block in enumerate(self.blocks):
            prefixes = f"model.layers.{number}.", f"blk.{number}."
            for layer in block:
                yield {name: within(each, *prefixes) for name, each in declared[layer].items()}
        yield from self.draft_parameters(shard)
        yield self.head.parameters(shard)

    def draft_parameters(self, shard: Shard = WHOLE) -> Iterator[Parameters]:
        """Yield a rank's parameters of the draft head, as :meth:`parameters` does."""
        if self.draft_head is not None:
            gguf = f"blk.{len(self.blocks)}."
            yield {name: within(each, "mtp.", gguf) for name, each in self.draft_head.parameters().items()}
            for layer in self.draft_head.block:
                parameters = layer.parameters(shard).items()
                yield {name: within(each, "mtp.layers.0.", gguf) for name, each in parameters}

    def tensors(self) -> dict[str, Tensor]:
        """Return exactly the tensors of the checkpoint, by safetensors name."""
        return named(
            tensor for parameters in self.parameters() for each in parameters.values() for tensor in tensors_of(each)
        )

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors of the checkpoint, by safetensors name."""
        return {name: tensor.shape for name, tensor in self.tensors().items()}

    def num_parameters(self) -> int:
        """Return the number of weights; a tied head counts once."""
        return sum(tensor.num_elements for tensor in self.tensors().values())

    def caches(self, shard: Shard = WHOLE) -> tuple[Cache | None, ...]:
        """Return what each layer keeps of earlier tokens on a rank, those of the draft head last."""
        return tuple(layer.cache(shard) for layer in (*self.layers, *self.draft_layers))

    def kv_bytes_per_token(self, dtype: str, shard: Shard = WHOLE) -> int:
        """Return the bytes of a token in the caches of all layers on a rank."""
        return DTYPE_BYTES[dtype] * sum(cache.elements_per_token for cache in self.caches(shard) if cache is not None)

    def workspace(self, shard: Shard = WHOLE) -> int:
        """Return the activations of a token at the widest point of a block: residual, input, output and the layers'."""
        places = itertools.zip_longest(*self.blocks, self.draft_layers)
        widest = [max(layer.workspace(shard) for layer in place if layer is not None) for place in places]
        return 4 * self.hidden_size + sum(widest) + (self.draft_head.workspace() if self.draft_head else 0)


def _within(layer: Layer, context_tokens: int) -> Layer:
    if not isinstance(layer, Attention):
        return layer
    return dataclasses.replace(layer, rope=layer.rope.within(context_tokens))


def named(tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return ``tensors`` by name."""
    return {tensor.name: tensor for tensor in tensors}
