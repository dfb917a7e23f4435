"""Load and forward pass of a model, layer by layer, on any device.

Tensors and operations, no requests: the batch tells which rows form a sequence.
"""

import dataclasses
import math
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, assert_never

import torch

from neuron.formats.matrix import embedding_rows
from neuron.layers.cache import Cache, Latent, PagedKV, SequenceState, StateTensor
from neuron.layers.layer import Weights
from neuron.layers.shard import WHOLE, Shard
from neuron.layers.step import Linear, OverRanks, Step
from neuron.models import quantization
from neuron.models.model import ModelConfig
from neuron.models.parameter_reader import ParameterReader, some_rows
from neuron.models.sizing import PAGE_TOKENS
from neuron.triton_kernels.batch import Batch
from neuron.triton_kernels.cache_codes import FORMATS, new_cache
from neuron.triton_kernels.operations import Operations

if TYPE_CHECKING:
    from neuron.models.weights import WeightSource


@dataclasses.dataclass(frozen=True, slots=True)
class DecoderWeights:
    """Loaded parameters of a model, or of one rank's part, on one device in one dtype."""

    embedding: Weights
    layers: tuple[Weights, ...]
    head: Weights
    draft_head: tuple[Weights, ...] = ()
    """Parameters of the draft head: beside its layers, then of each of these."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of activations and cache."""
        dtype: torch.dtype = self.head["norm"].dtype
        return dtype


def load_decoder(
    source: "WeightSource",
    dtype: torch.dtype,
    device: torch.device,
    *,
    quant: str = quantization.NONE,
    shard: Shard = WHOLE,
) -> Generator[float, None, DecoderWeights]:
    """Read a checkpoint, or one rank's part; yield the share done before each layer, return the weights."""
    config = source.config
    reader = ParameterReader(source, dtype, device, quant)
    loaded = []
    for number, parameters in enumerate(config.parameters(shard)):
        yield (number + 1) / (len(config.caches()) + 4)
        loaded.append(reader.read(parameters))
    embedding, *layers, head = loaded
    if config.head.tied:
        table = some_rows(embedding["table"].weight, shard.vocabulary(config.vocab_size))
        head["matrix"] = Linear(table, None)
    count = len(config.layers)
    return DecoderWeights(embedding, tuple(layers[:count]), head, tuple(layers[count:]))


class Caches(NamedTuple):
    """Memory of a model's caches, or of one rank's part."""

    layers: list[tuple[torch.Tensor | None, ...] | None]
    """Tensors of each layer, pages first: a ``PagedCache``, or of a latent cache one tensor ``[P, page_size,
    width]``; of a state those that it declares, ``[slots, ...]`` each."""
    states: torch.Tensor | None
    """``[slots, bytes]`` uint8: the states of all layers side by side, of which those of each layer are views."""


def new_caches(
    config: ModelConfig,
    num_pages: Sequence[int],
    num_slots: int,
    dtype: torch.dtype,
    make: Callable[[tuple[int, ...], torch.dtype], torch.Tensor],
    shard: Shard = WHOLE,
    kv_dtype: str = "auto",
) -> Caches:
    """Return caches of each layer's ``num_pages``, and of ``num_slots`` states; ``make`` takes shape and dtype.

    Keys and values are in ``dtype``, or in a format of :data:`~neuron.layers.cache.ROUNDED`.
    """
    kinds = config.caches(shard)
    slot_bytes = sum(kind.num_bytes(dtype.itemsize) for kind in kinds if isinstance(kind, SequenceState))
    states = make((num_slots, slot_bytes), torch.uint8) if slot_bytes else None
    at = 0

    def view(tensor: StateTensor) -> torch.Tensor:
        nonlocal at
        assert states is not None
        own = torch.float32 if tensor.in_float32 else dtype
        start, at = at, at + tensor.num_bytes(dtype.itemsize)
        return states[:, start : start + math.prod(tensor.shape) * own.itemsize].view(own).view(-1, *tensor.shape)

    def cache_of(kind: Cache | None, pages: int) -> tuple[torch.Tensor | None, ...] | None:
        match kind:
            case None:
                return None
            case PagedKV(num_kv_heads, head_dim):
                shape = pages, PAGE_TOKENS, num_kv_heads, head_dim
                return new_cache(shape, FORMATS.get(kv_dtype, dtype), make)
            case Latent(width):
                return (make((pages, PAGE_TOKENS, width), dtype),)
            case SequenceState(tensors):
                return tuple(view(tensor) for tensor in tensors)
            case _:
                assert_never(kind)

    return Caches([cache_of(*pair) for pair in zip(kinds, num_pages, strict=True)], states)


@dataclasses.dataclass(frozen=True, slots=True)
class Decoder:
    """Forward pass of a model on its device, by all ranks that hold it if several do."""

    config: ModelConfig
    weights: DecoderWeights
    """Weights of the model, or of this rank's part."""
    operations: Operations
    """Operations of the device."""
    sum_ranks: OverRanks | None = None
    """Sum of a tensor over the ranks."""
    gather_ranks: OverRanks | None = None
    """Columns ``[R, V]`` of all ranks side by side, of this rank's; without it, logits are of its run of the
    vocabulary."""

    def hidden(self, token_ids: torch.Tensor, batches: Sequence[Batch], caches: Sequence[Any]) -> torch.Tensor:
        """Return the normalised hidden state ``[T, hidden]`` of ``token_ids`` ``[T]``, and write to ``caches``.

        Both ``batches`` and ``caches`` are of each layer: the step with its page table, and its cache.
        """
        config, weights, count = self.config, self.weights, len(self.config.layers)
        residual = self._embedded(token_ids)
        step = Step(self.operations, batches[0], residual.dtype, self.sum_ranks)
        for layer, own, cache, batch in zip(
            config.layers, weights.layers, caches[:count], batches[:count], strict=True
        ):
            step.batch = batch
            layer.forward(step, own, residual, cache)
        return config.head.normed(self.operations, weights.head, residual)

    def drafted(
        self, token_ids: torch.Tensor, hidden: torch.Tensor, batches: Sequence[Batch], caches: Sequence[Any]
    ) -> torch.Tensor:
        """Return the draft head's hidden state ``[T, hidden]``, and write to its layers' ``caches``.

        ``hidden`` ``[T, hidden]`` are the model's hidden states, or the head's own, at the tokens before ``token_ids``.
        """
        head, count = self.config.draft_head, len(self.config.layers)
        assert head is not None
        beside, *weights = self.weights.draft_head
        step = Step(self.operations, batches[count], hidden.dtype, self.sum_ranks)
        residual = head.joined(step, beside, self._embedded(token_ids), hidden)
        for layer, own, cache, batch in zip(head.block, weights, caches[count:], batches[count:], strict=True):
            step.batch = batch
            layer.forward(step, own, residual, cache)
        return head.normed(step, beside, residual)

    def _embedded(self, token_ids: torch.Tensor) -> torch.Tensor:
        embedded = embedding_rows(token_ids, self.weights.embedding["table"].weight, self.weights.dtype)
        if self.config.embedding.scale != 1.0:
            # Rounded to the dtype first, as these models were trained.
            embedded *= torch.tensor(self.config.embedding.scale, dtype=embedded.dtype)
        return embedded

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits ``[R, V]`` in float32 of the rows ``hidden`` ``[R, hidden]``, of the model or the head."""
        own = self.config.head.logits(self.operations, self.weights.head, hidden)
        # All ranks get all logits, as both backends have no gather to one rank. The others sample greedily and drop it.
        return own if self.gather_ranks is None else self.gather_ranks(own)
