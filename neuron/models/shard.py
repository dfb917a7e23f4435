"""Shard of a model over several devices: the rows and columns of each tensor that a rank has.

As in Megatron (arXiv:1909.08053), matrices that read the residual are cut by rows (heads; the MLP's width), and
matrices that write it by columns, so that a layer sums over the ranks twice. The head is cut by rows too, and rank 0
gathers the logits. Vectors and the embedding are on all ranks. Parts are whole key-value heads and runs of the MLP's
width, as equal as possible: 3 heads on 2 ranks are 2 and 1. With more ranks than key-value heads, each of these is on
several ranks, which divide the query heads that read it. Pure and without torch, as :mod:`neuron.models.sizing`.
"""

import dataclasses
from typing import Final

from cortex.wire.errors import InvalidRequestError
from neuron.models.config import ModelConfig

WIDTH_UNIT: Final = 256
"""Unit of cuts of the MLP where it is wide enough: GGUF's longest blocks stay whole."""
VOCABULARY_UNIT: Final = 16
"""Unit of cuts of the vocabulary: a rank's part of a tied head is a view aligned to 16 bytes."""


@dataclasses.dataclass(frozen=True, slots=True)
class Shard:
    """Shard of rank ``rank`` of ``size``."""

    rank: int = 0
    size: int = 1

    def share(self, count: int, unit: int = 1) -> slice:
        """Return this rank's run of ``count`` elements, in whole units but for the last."""
        units = -(-count // unit)
        bounds = [min(count, unit * (units * rank // self.size)) for rank in (self.rank, self.rank + 1)]
        return slice(*bounds)

    def kv_heads(self, config: ModelConfig) -> slice:
        """Return this rank's key-value heads."""
        if self.size <= config.num_kv_heads:
            return self.share(config.num_kv_heads)
        head = self.rank * config.num_kv_heads // self.size
        return slice(head, head + 1)

    def query_heads(self, config: ModelConfig) -> slice:
        """Return this rank's query heads, which read its key-value heads and no others."""
        per_kv_head = config.num_heads // config.num_kv_heads
        heads = self.kv_heads(config)
        if self.size <= config.num_kv_heads:
            return slice(heads.start * per_kv_head, heads.stop * per_kv_head)
        ranks = self.size // config.num_kv_heads
        part = Shard(self.rank % ranks, ranks).share(per_kv_head)
        return slice(heads.start * per_kv_head + part.start, heads.start * per_kv_head + part.stop)

    def width(self, config: ModelConfig) -> slice:
        """Return this rank's run of the MLP's width, or of each expert's."""
        width = config.expert_intermediate_size if config.num_experts else config.intermediate_size
        unit = next((unit for unit in (WIDTH_UNIT, 32) if width >= unit * self.size), 1)
        return self.share(width, unit)

    def vocabulary(self, config: ModelConfig) -> slice:
        """Return this rank's rows of the head."""
        return self.share(config.vocab_size, VOCABULARY_UNIT if config.vocab_size >= VOCABULARY_UNIT * self.size else 1)

    def rows(self, config: ModelConfig, name: str, size: int) -> slice:
        """Return this rank's rows among the ``size`` of a tensor, by its safetensors name."""
        if self.size == 1:
            return slice(0, size)
        match name.split(".")[-2]:
            case "q_proj":
                return _scaled(self.query_heads(config), config.head_dim)
            case "k_proj" | "v_proj":
                return _scaled(self.kv_heads(config), config.head_dim)
            case "gate_proj" | "up_proj":
                return self.width(config)
            case "lm_head":
                return self.vocabulary(config)
            case _:
                return slice(0, size)

    def columns(self, config: ModelConfig, name: str, size: int) -> slice:
        """Return this rank's columns among the ``size`` of a matrix."""
        if self.size == 1:
            return slice(0, size)
        match name.split(".")[-2]:
            case "o_proj":
                return _scaled(self.query_heads(config), config.head_dim)
            case "down_proj":
                return self.width(config)
            case _:
                return slice(0, size)


WHOLE: Final = Shard()


def local_config(config: ModelConfig, shard: Shard) -> ModelConfig:
    """Return the configuration of one rank's part: its heads and its width; all else is unchanged.

    Raises :class:`InvalidRequestError` if the heads cannot be divided.
    """
    if shard.size == 1:
        return config
    if shard.size > config.num_kv_heads and (shard.size % config.num_kv_heads or shard.size > config.num_heads):
        raise InvalidRequestError(
            f"tensor_parallel is {shard.size}; the model's {config.num_heads} heads and {config.num_kv_heads} "
            "key-value heads can be shared out to as many devices as there are key-value heads, or fewer, or to a "
            "multiple of them up to the heads",
            param="tensor_parallel",
        )
    heads, queries, width = shard.kv_heads(config), shard.query_heads(config), shard.width(config)
    size = width.stop - width.start
    return dataclasses.replace(
        config,
        num_kv_heads=heads.stop - heads.start,
        num_heads=queries.stop - queries.start,
        **{"expert_intermediate_size" if config.num_experts else "intermediate_size": size},
    )


def _scaled(run: slice, factor: int) -> slice:
    return slice(run.start * factor, run.stop * factor)
