"""The harness that ships: models under torch in this project's device workers.

It places and loads models. A loaded one is a :class:`neuron.torch_model.TorchModel`. No torch here; only the worker
processes import it.
"""

import asyncio
import dataclasses
import functools
import os
import pathlib
import socket
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec

from cortex.wire.errors import UnprocessableError
from cortex.wire.node import Fit, ModelSpec
from neuron.config import PrefixSharing
from neuron.device.jobs import GroupSettings, LoadedModel
from neuron.device.worker import Worker
from neuron.errors import InvalidSourceError, NoDeviceError
from neuron.harness import Model, Progress, Requirement
from neuron.layers.cache import forgets
from neuron.layers.shard import Shard
from neuron.load.fit import fit
from neuron.load.hub import HubSource, hub_of
from neuron.load.source import LocalSource, fetch, parse
from neuron.load.survey import candidate_at, survey
from neuron.load.wheel import WheelSource
from neuron.models.config import read_config
from neuron.models.model import ModelConfig
from neuron.models.sizing import least_bytes, plan_memory
from neuron.text.pool import TextModel, TextPool
from neuron.torch_model import TorchModel

RETRY_AFTER_S = 2.0


class TorchHarness:
    """Loads models in the service's workers, one for each device, and its text processes."""

    name = "torch"

    def __init__(
        self,
        workers: Mapping[str, Worker],
        texts: TextPool,
        collective_limit_s: float = 30.0,
        prefix_sharing: PrefixSharing = PrefixSharing.PRINCIPAL,
        *,
        cpu_kernels: bool = True,
    ) -> None:
        """``cpu_kernels`` is that of the workers' engines: their memory plans depend on it."""
        self._cpu_kernels = cpu_kernels
        self._prefix_sharing = prefix_sharing
        self._workers = workers
        self._texts = texts
        self._collective_limit_s = collective_limit_s
        self._groups: dict[str, tuple[str, ...]] = {}
        """Devices of each tensor-parallel model."""

    async def measure(self, spec: ModelSpec, path: pathlib.Path) -> Requirement:
        """Return the least memory of the worker's plan on each device that the spec allows."""
        size = spec.tensor_parallel
        if len(spec.devices) > 1 and len(spec.devices) != size:
            raise UnprocessableError(
                f"'{spec.id}' names {len(spec.devices)} devices, and tensor_parallel is {size}.",
                param="tensor_parallel",
            )
        devices = [worker.device_id for worker in self._candidates(spec)]
        if size != 1:
            devices = _alike(devices, size)
        if not 0 < size <= len(devices):
            raise UnprocessableError(
                f"'{spec.id}' wants {size} devices of one kind; it may have: {', '.join(devices) or 'none'}.",
                param="tensor_parallel",
            )
        config, draft = await _read_configs(spec, path)
        shards = [Shard(rank, size) for rank in range(size)]
        least = {
            device: max(
                least_bytes(config, spec, device, shard, draft, cpu_kernels=self._cpu_kernels) for shard in shards
            )
            for device in devices
        }
        return Requirement(least, size)

    async def fit(self, spec: ModelSpec, evictable_bytes: Mapping[str, int]) -> Fit:
        """Return the weights that fit the memory of the devices that the spec allows best."""
        source = parse(spec.source)
        free_bytes = await self.free_bytes([worker.device_id for worker in self._candidates(spec)])
        settle = functools.partial(
            self._settle, source, free_bytes, spec, evictable_bytes=evictable_bytes, cpu_kernels=self._cpu_kernels
        )
        return await asyncio.to_thread(settle)

    @staticmethod
    def _settle(
        source: LocalSource | HubSource | WheelSource, free_bytes: Mapping[str, int], spec: ModelSpec, **settings: Any
    ) -> Fit:
        match source:
            case HubSource():
                return survey(hub_of(os.environ), source, free_bytes, spec, **settings)
            case LocalSource():
                return fit([candidate_at(fetch(spec.source))], free_bytes, spec, **settings)
            case WheelSource():
                raise InvalidSourceError(
                    f"'{spec.source}' has nothing to choose, and is measured once it is downloaded.", param="source"
                )

    async def free_bytes(self, devices: Collection[str]) -> dict[str, int]:
        """Return the free bytes of ``devices`` whose workers are ready for loads."""
        # A recovering worker takes jobs before it takes sequences, so that its models are loaded again.
        ready = [device for device in devices if self._workers[device].ready is not None]
        memory = await asyncio.gather(*(self._workers[device].memory() for device in ready))
        return {device: answer.free_bytes for device, answer in zip(ready, memory, strict=True)}

    async def load(self, spec: ModelSpec, path: pathlib.Path, progress: Progress) -> "TorchModel":
        """Load the weights at ``path`` on the devices the spec names, or on those with the most free memory."""
        config, draft = await _read_configs(spec, path)
        # The text side comes first: if it fails, no device has anything to undo.
        text = await self._texts.open(
            str(path),
            config.vocab_size,
            config.eos_ids,
            spec.special_tokens_in_text,
            finds_breakpoints=spec.prefix_cache and forgets(config.caches()),
        )
        try:
            if draft is not None:
                await self._check_draft(spec, draft, text)
            chosen = await self._choose(spec)
            for rank, (worker, free_bytes) in enumerate(chosen):
                shard = Shard(rank, spec.tensor_parallel)
                plan_memory(config, spec, worker.device_id, free_bytes, shard, draft, cpu_kernels=self._cpu_kernels)
            workers = tuple(worker for worker, _ in chosen)
            config = dataclasses.replace(config, generation=config.generation.under(spec.sampling))
            loaded = await self._load_parts(workers, spec, path, progress)
            try:
                return TorchModel(loaded, config, text, workers, self._prefix_sharing)
            except BaseException:
                await self._undo(spec.id, workers)
                raise
        except BaseException:
            text.close()
            raise

    async def _check_draft(self, spec: ModelSpec, draft: ModelConfig, text: TextModel) -> None:
        """Raise unless the draft model has the vocabulary of its target."""
        other = await self._texts.open(spec.draft, draft.vocab_size, draft.eos_ids)
        other.close()
        if other.vocabulary_digest != text.vocabulary_digest:
            raise UnprocessableError(
                f"'{spec.draft}' has another vocabulary than '{spec.id}', so it cannot be its draft model.",
                param="draft",
            )

    async def unload(self, model: Model) -> None:
        """Free a model's memory on its devices."""
        assert isinstance(model, TorchModel)
        self._groups.pop(model.loaded.model, None)
        model.text.close()
        await asyncio.gather(*(worker.unload(model.loaded.model) for worker in model.workers))

    async def _undo(self, name: str, workers: Sequence[Worker]) -> None:
        """Unload a failed load from ``workers``, even if the waiting task is cancelled meanwhile."""
        self._groups.pop(name, None)
        unloads = asyncio.gather(*(worker.unload(name) for worker in workers), return_exceptions=True)
        await asyncio.shield(unloads)

    async def _load_parts(
        self, workers: tuple[Worker, ...], spec: ModelSpec, path: pathlib.Path, progress: Progress
    ) -> LoadedModel:
        """Load a part on each worker, or the whole model on one; if one fails or all are cancelled, undo the others."""
        devices = tuple(worker.device_id for worker in workers)
        for name, others in self._groups.items():
            if len(devices) > 1 and name != spec.id and others != devices and set(others) & set(devices):
                # Two steps that wait for each other's devices would deadlock.
                raise UnprocessableError(
                    f"'{spec.id}' would run on {', '.join(devices)}, and '{name}' runs on {', '.join(others)}: models "
                    "that share devices must share all of them.",
                    param="devices",
                )
        groups: list[GroupSettings | None] = [None]
        if len(workers) > 1:
            self._groups[spec.id] = devices
            address = f"127.0.0.1:{_free_port()}"
            groups = [
                GroupSettings(rank, len(workers), address, self._collective_limit_s) for rank in range(len(workers))
            ]
        loads = [
            asyncio.create_task(
                worker.load(spec, str(path), progress=None if group and group.rank else progress, group=group)
            )
            for worker, group in zip(workers, groups, strict=True)
        ]
        undone = workers
        try:
            await asyncio.wait(loads, return_when=asyncio.FIRST_EXCEPTION)
            failed = next((load for load in loads if load.done() and load.exception()), None)
            if failed is not None:
                # The others fail in turn, or load a useless part, whose end is not waited for.
                await asyncio.wait(loads, timeout=self._collective_limit_s)
                undone = tuple(
                    worker
                    for worker, load in zip(workers, loads, strict=True)
                    if not load.done() or load.exception() is None
                )
                failed.result()
            parts = [load.result() for load in loads]
        except BaseException:
            for load in loads:
                load.cancel()
            await self._undo(spec.id, undone)
            raise
        return msgspec.structs.replace(
            parts[0],
            weights_bytes=sum(part.weights_bytes for part in parts),
            kv_cache_bytes=sum(part.kv_cache_bytes for part in parts),
            expanded_bytes=sum(part.expanded_bytes for part in parts),
        )

    def _candidates(self, spec: ModelSpec) -> list[Worker]:
        for device in spec.devices:
            if device not in self._workers:
                known = ", ".join(self._workers) or "none"
                raise NoDeviceError(f"'{device}' is not a device of this neuron; it has: {known}.", param="devices")
        return [worker for device, worker in self._workers.items() if device in (spec.devices or self._workers)]

    async def _choose(self, spec: ModelSpec) -> list[tuple[Worker, int]]:
        """Return the workers to load on, rank 0 first, and the free bytes of each."""
        candidates = self._candidates(spec)
        free_bytes = await self.free_bytes([worker.device_id for worker in candidates])
        if len(free_bytes) < spec.tensor_parallel:
            states = ", ".join(f"{worker.device_id} is {worker.state}" for worker in candidates) or "there are none"
            wants = f"'{spec.id}' wants {spec.tensor_parallel} devices" if spec.tensor_parallel > 1 else ""
            raise NoDeviceError(f"{wants or f'No device can take {spec.id!r}'}: {states}.", retry_after_s=RETRY_AFTER_S)
        roomiest = sorted(free_bytes, key=lambda device: -free_bytes[device])[: spec.tensor_parallel]
        # Ranks are in the order of devices, so that groups of the same devices have the same rank 0.
        return [(worker, free_bytes[device]) for device, worker in self._workers.items() if device in roomiest]


def _alike(devices: Sequence[str], size: int) -> list[str]:
    """Return the devices of one kind, GPUs if there are ``size``: no sum goes over both."""
    kinds: dict[str, list[str]] = {"cuda": [], "cpu": []}
    for device in devices:
        kinds[device.partition(":")[0]].append(device)
    return max(kinds.values(), key=lambda found: min(len(found), size))


def _free_port() -> int:
    """Return a port for the ranks of a group; it was free a moment ago."""
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


async def _read_configs(spec: ModelSpec, path: pathlib.Path) -> tuple[ModelConfig, ModelConfig | None]:
    """Read the configuration of a model, and of its draft model."""
    if spec.draft and spec.tensor_parallel != 1:
        raise UnprocessableError(
            f"'{spec.id}' is on several devices, where draft models are not supported.", param="draft"
        )
    draft = await asyncio.to_thread(read_config, pathlib.Path(spec.draft)) if spec.draft else None
    return await asyncio.to_thread(read_config, path), draft
