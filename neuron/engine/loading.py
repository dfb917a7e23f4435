"""Load a model, or one rank's part of it, a layer at a time, with the executor that will run it."""

import contextlib
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
from neuron.engine.tensor_parallel import Follower, Leader, ParallelForward
from neuron.engine_settings import DEFAULTS, EngineSettings
from neuron.layers.shard import WHOLE, Shard
from neuron.models import packed
from neuron.models.config import read_config
from neuron.models.decoder import Decoder, DecoderWeights, Forward, load_decoder
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
    group: GroupSettings | None = None,
    graphs: Callable[[], Graphs] | None = None,
    channel_fd: int = -1,
    settings: EngineSettings = DEFAULTS,
) -> Generator[float, None, ModelEngine | Follower]:
    """Load a model, or with ``group`` one rank's part, in pieces of one layer; yield the share done, return it.

    ``graphs`` makes the model's :class:`Graphs`, where the device has them; ``channel_fd`` is readable when a message
    of the daemon waits. Nothing is allocated unless the plan fits. Raises the errors of :mod:`neuron.models`,
    :class:`GroupLostError`.
    """
    # A head that is never asked takes no memory.
    spec = msgspec.structs.replace(spec, draft_head=spec.draft_head and settings.speculation)
    if group is not None:
        return (yield from _load_part(spec, path, device, free_bytes, group, settings))
    if spec.tensor_parallel != 1:
        raise UnprocessableError(
            f"tensor_parallel is {spec.tensor_parallel}; the load names no group for this worker",
            param="tensor_parallel",
        )
    draft_path = pathlib.Path(spec.draft) if spec.draft else None
    draft_config = read_config(draft_path) if draft_path else None
    source = open_weights(path)
    try:
        plan = plan_memory(
            source.config, spec, str(device), free_bytes(), draft=draft_config, cpu_kernels=settings.cpu_kernels
        )
        yield 0.0
        source.config = _planned(source.config, plan)
        executor = yield from _load_executor(spec, source, plan, device, graphs, channel_fd, settings)
    finally:
        source.close()
    draft: Executor | None = None
    if draft_path is not None and plan.draft is not None:
        draft_source = open_weights(draft_path)
        draft_source.config = draft_source.config.within(plan.context_tokens)
        try:
            draft = yield from _load_executor(spec, draft_source, plan.draft, device, graphs, channel_fd, settings)
        finally:
            draft_source.close()
    return ModelEngine(
        spec.id,
        source.config,
        plan,
        executor,
        path,
        draft=draft,
        prefix_cache=spec.prefix_cache,
        speculates=settings.speculation,
    )


def _planned(config: ModelConfig, plan: MemoryPlan) -> ModelConfig:
    """Return a model as it is planned: for its context, and with or without its draft head."""
    config = config.within(plan.context_tokens)
    return config if plan.has_draft_head else config.without_draft_head()


def _load_executor(
    spec: ModelSpec,
    source: WeightSource,
    plan: MemoryPlan,
    device: torch.device,
    graphs: Callable[[], Graphs] | None,
    channel_fd: int,
    settings: EngineSettings,
) -> Generator[float, None, Executor]:
    _report_expansions(spec, source.config, plan)
    if plan.native:
        packed_weights = yield from load_packed(source, plan.dtype, shared_pool())
        return NativeExecutor(source.config, packed_weights, plan, channel_fd, settings.cpu_level)
    if device.type == "cpu":
        reason = packed.obstacle(source.config) if settings.cpu_kernels else "cpu_kernels is false"
        logger.warning("%s runs in eager torch: %s", spec.id, reason)
    with contextlib.closing(_preparation(source.config, plan, device, settings)) as kernels:
        weights = yield from load_decoder(source, getattr(torch, plan.dtype), device, quant=plan.quant)
        eager = eager_executor(source.config, weights, plan, device, settings)
        executor = eager if graphs is None else GraphExecutor(eager, plan, graphs(), settings)
        yield from _finish(kernels, device)
    return executor


def _report_expansions(spec: ModelSpec, config: ModelConfig, plan: MemoryPlan, shard: Shard = WHOLE) -> None:
    """Log the weights that take more memory than in the file, as no kernel reads their form."""
    for expansion in expansions(config, plan.dtype, plan.quant, shard, native=plan.native):
        logger.warning("%s: %s", spec.id, expansion)


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
    part = Decoder(config, weights, kernels)
    forward: Forward = part if group is None else ParallelForward(part, group)
    shard = WHOLE if group is None else Shard(group.rank, group.size)
    draw = kernels.sample if settings.device_sampling else EAGER.sample
    return EagerExecutor(
        forward,
        LayerCaches(config, plan, weights.dtype, device, shard),
        Sampler(plan.max_sequences, config.vocab_size, device, draw),
        plan.num_hidden,
    )


def _preparation(
    config: ModelConfig, plan: MemoryPlan, device: torch.device, settings: EngineSettings, shard: Shard = WHOLE
) -> Preparation:
    return Preparation(
        config,
        plan,
        device,
        num_processes=min(usable_cores(), MAX_COMPILERS),
        initializer=die_with_parent,
        shard=shard,
        settings=settings,
    )


def _finish(kernels: Preparation, device: torch.device) -> Generator[float, None, None]:
    """Wait for the compiled kernels, last of a load."""
    version = DriverHandle(cuda_driver()).version() if device.type == "cuda" else (0, 0)
    for _ in kernels.finish(version):
        yield 1.0


def _load_part(
    spec: ModelSpec,
    path: pathlib.Path,
    device: torch.device,
    free_bytes: Callable[[], int],
    group_settings: GroupSettings,
    settings: EngineSettings,
) -> Generator[float, None, ModelEngine | Follower]:
    shard = Shard(group_settings.rank, group_settings.size)
    source = open_weights(path)
    group: Group | None = None
    try:
        plan = plan_memory(source.config, spec, str(device), free_bytes(), shard, cpu_kernels=settings.cpu_kernels)
        yield 0.0
        if group_settings.rank:
            yield from _rank_0(group_settings)
        group = Group(group_settings, device)
        if not group.least(plan.has_draft_head) and plan.has_draft_head:
            spec = msgspec.structs.replace(spec, draft_head=False)  # another rank has no memory for it
            plan = plan_memory(source.config, spec, str(device), free_bytes(), shard, cpu_kernels=settings.cpu_kernels)
        plan = with_sizes(plan, tuple(group.least(count) for count in plan.cache_sizes))
        config = source.config = _planned(source.config, plan)
        _report_expansions(spec, config, plan, shard)
        dtype = getattr(torch, plan.dtype)
        with contextlib.closing(_preparation(config, plan, device, settings, shard)) as kernels:
            weights = yield from load_decoder(source, dtype, device, quant=plan.quant, shard=shard)
            executor = eager_executor(config, weights, plan, device, settings, group)
            yield from _finish(kernels, device)
    except BaseException:
        if group is not None:
            group.close()
        raise
    finally:
        source.close()
    if group_settings.rank:
        return Follower(executor, group, plan, describe(spec.id, config, plan))
    leader = Leader(executor, group)
    return ModelEngine(
        spec.id, config, plan, leader, path, prefix_cache=spec.prefix_cache, speculates=settings.speculation
    )


def _rank_0(settings: GroupSettings) -> Generator[float, None, None]:
    """Yield to other work until rank 0 waits for this rank. Raises :class:`GroupLostError` after the limit."""
    until_s = time.monotonic() + settings.limit_s
    while not rank_0_waits(settings):
        if time.monotonic() > until_s:
            raise GroupLostError(f"rank 0 did not come to {settings.address} within {settings.limit_s:g} s")
        yield AWAITING
