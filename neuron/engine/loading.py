"""Load a model, or one rank's part of it, a layer at a time, with the executor that will run it."""

import contextlib
import functools
import logging
import pathlib
import time
from collections.abc import Callable, Generator
from typing import Final

import msgspec
import torch

from cortex.wire.errors import UnprocessableError
from cortex.wire.node import ModelSpec
from neuron.device.driver import DriverHandle, cuda_driver
from neuron.device.jobs import GroupSettings
from neuron.device.loop import die_with_parent
from neuron.device.probe import usable_cores
from neuron.engine.cache_memory import LayerCaches
from neuron.engine.device_graphs import Graphs
from neuron.engine.eager_executor import EagerExecutor
from neuron.engine.errors import GroupLostError
from neuron.engine.executor import Executor
from neuron.engine.graph_executor import GraphExecutor
from neuron.engine.group import Group, rank_0_waits
from neuron.engine.model_engine import ModelEngine, describe
from neuron.engine.native_executor import NativeExecutor, shared_pool
from neuron.engine.sampler import Sampler
from neuron.engine.tensor_parallel import Follower, Leader
from neuron.engine_settings import DEFAULTS, EngineSettings
from neuron.layers.shard import WHOLE, Shard
from neuron.layers.step import OverRanks
from neuron.models import packed
from neuron.models.config import read_config
from neuron.models.decoder import Decoder, DecoderWeights, load_decoder
from neuron.models.expansion import expansions
from neuron.models.model import ModelConfig
from neuron.models.packed_weights import load_packed
from neuron.models.prebuild import Preparation
from neuron.models.sizing import MemoryPlan, plan_memory, with_sizes
from neuron.models.weights import WeightSource, open_weights
from neuron.triton_kernels import dispatch
from neuron.triton_kernels.operations import EAGER

logger = logging.getLogger(__name__)

AWAITING: Final = 0.001
"""Share of a load that is done when a rank waits for another."""
MAX_COMPILERS: Final = 8
"""Processes that compile a model's kernels while its weights are copied: each takes some 500 MB of the host."""


def load_model(
    spec: ModelSpec,
    path: pathlib.Path,
    device: torch.device,
    free_bytes: Callable[[], int],
    ranks: GroupSettings | None = None,
    graphs: Callable[[], Graphs] | None = None,
    channel_fd: int = -1,
    settings: EngineSettings = DEFAULTS,
) -> Generator[float, None, ModelEngine | Follower]:
    """Load a model, or with ``ranks`` one rank's part, in pieces of one layer; yield the share done, return it.

    A rank other than 0 is a :class:`Follower`. ``graphs`` makes the model's :class:`Graphs`, where the device has them;
    ``channel_fd`` is readable when a message of the daemon waits. Nothing is allocated unless the plan fits. Raises the
    errors of :mod:`neuron.models`, :class:`GroupLostError`.
    """
    if ranks is None and spec.tensor_parallel != 1:
        raise UnprocessableError(
            f"tensor_parallel is {spec.tensor_parallel}; the load names no group for this worker",
            param="tensor_parallel",
        )
    # A head that is never asked takes no memory.
    spec = msgspec.structs.replace(spec, draft_head=spec.draft_head and settings.speculation)
    draft_path = pathlib.Path(spec.draft) if spec.draft and ranks is None else None
    draft_config = read_config(draft_path) if draft_path else None
    shard = WHOLE if ranks is None else Shard(ranks.rank, ranks.size)
    group: Group | None = None
    with contextlib.closing(open_weights(path)) as source, contextlib.ExitStack() as on_failure:

        def planned() -> MemoryPlan:
            sizes = str(device), free_bytes(), shard, draft_config
            return plan_memory(source.config, spec, *sizes, cpu_kernels=settings.cpu_kernels)

        plan = planned()
        yield 0.0
        if ranks is not None:
            if ranks.rank:
                yield from _rank_0(ranks)
            group = Group(ranks, device)
            on_failure.callback(group.close)
            if not group.least(plan.has_draft_head) and plan.has_draft_head:
                spec = msgspec.structs.replace(spec, draft_head=False)  # another rank has no memory for it
                plan = planned()
            plan = with_sizes(plan, tuple(group.least(count) for count in plan.cache_sizes))
        source.config = source.config.within(plan.context_tokens)
        if not plan.has_draft_head:
            source.config = source.config.without_draft_head()
        config = source.config
        executor = yield from _load_executor(spec, source, plan, device, graphs, channel_fd, settings, group)
        on_failure.pop_all()
    if group is not None and group.rank:
        return Follower(executor, group, plan, describe(spec.id, config, plan))
    draft: Executor | None = None
    if draft_path is not None and plan.draft is not None:
        with contextlib.closing(open_weights(draft_path)) as source:
            source.config = source.config.within(plan.context_tokens)
            draft = yield from _load_executor(spec, source, plan.draft, device, graphs, channel_fd, settings)
    return ModelEngine(
        spec.id,
        config,
        plan,
        executor if group is None else Leader(executor, group),
        path,
        draft=draft,
        prefix_cache=spec.prefix_cache,
        speculates=settings.speculation,
    )


def _load_executor(
    spec: ModelSpec,
    source: WeightSource,
    plan: MemoryPlan,
    device: torch.device,
    graphs: Callable[[], Graphs] | None,
    channel_fd: int,
    settings: EngineSettings,
    group: Group | None = None,
) -> Generator[float, None, Executor]:
    shard = WHOLE if group is None else Shard(group.rank, group.size)
    for expansion in expansions(source.config, plan.dtype, plan.quant, shard, native=plan.native):
        logger.warning("%s: %s", spec.id, expansion)
    if plan.native:
        packed_weights = yield from load_packed(source, plan.dtype, shared_pool())
        return NativeExecutor(source.config, packed_weights, plan, channel_fd, settings.cpu_level)
    if device.type == "cpu":
        reason = packed.obstacle(source.config) if group is None else "it is on several devices"
        logger.warning(
            "%s runs in eager torch: %s", spec.id, reason if settings.cpu_kernels else "cpu_kernels is false"
        )
    preparation = Preparation(
        source.config,
        plan,
        device,
        num_processes=min(usable_cores(), MAX_COMPILERS),
        initializer=die_with_parent,
        shard=shard,
        settings=settings,
    )
    with contextlib.closing(preparation) as kernels:
        weights = yield from load_decoder(source, getattr(torch, plan.dtype), device, quant=plan.quant, shard=shard)
        eager = eager_executor(source.config, weights, plan, device, settings, group)
        executor = eager if graphs is None or group is not None else GraphExecutor(eager, plan, graphs(), settings)
        version = DriverHandle(cuda_driver()).version() if device.type == "cuda" else (0, 0)
        for _ in kernels.finish(version):
            yield 1.0
    return executor


def eager_executor(
    config: ModelConfig,
    weights: DecoderWeights,
    plan: MemoryPlan,
    device: torch.device,
    settings: EngineSettings = DEFAULTS,
    group: Group | None = None,
) -> EagerExecutor:
    """Return the eager executor of a model, or of the part of it that this rank of ``group`` has."""
    kernels = dispatch.operations_for(device, weights.dtype, triton=settings.triton_kernels)
    shard, ranks = WHOLE, tuple[OverRanks, ...]()
    if group is not None:
        shards = [Shard(rank, group.size) for rank in range(group.size)]
        widths = tuple(len(each.vocabulary(config.vocab_size)) for each in shards)
        shard, ranks = shards[group.rank], (group.sum, functools.partial(group.gather, widths=widths))
    draw = kernels.sample if settings.device_sampling else EAGER.sample
    return EagerExecutor(
        Decoder(config, weights, kernels, *ranks),
        LayerCaches(config, plan, weights.dtype, device, shard),
        Sampler(plan.max_sequences, config.vocab_size, device, draw),
        plan.num_hidden,
    )


def _rank_0(settings: GroupSettings) -> Generator[float, None, None]:
    """Yield to other work until rank 0 waits for this rank. Raises :class:`GroupLostError` after the limit."""
    until_s = time.monotonic() + settings.limit_s
    while not rank_0_waits(settings):
        if time.monotonic() > until_s:
            raise GroupLostError(f"rank 0 did not come to {settings.address} within {settings.limit_s:g} s")
        yield AWAITING
