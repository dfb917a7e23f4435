"""A harness whose models play scripts and whose devices have memory, for neurons that compute nothing.

A script turns a request into steps. A model's source may be a file of ``describe``: a load then takes that memory and
time. A load that overflows a device raises, and so does a second load of a model.
"""

import array
import asyncio
import json
import pathlib
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Mapping, Sequence

from cortex.wire.errors import ApiError, UnprocessableError
from cortex.wire.events import Finished, FinishReason, InferenceEvent, Started, TextDelta
from cortex.wire.node import (
    Capability,
    ChosenWeights,
    Device,
    DeviceKind,
    Fit,
    ModelSpec,
    PassedOver,
    WorkerHealth,
    WorkerState,
)
from cortex.wire.request import EmbeddingRequest, InferenceRequest
from neuron.device.jobs import LoadedModel
from neuron.device.probe import Host
from neuron.harness import Embeddings, Model, Progress, Requirement
from neuron.load.eviction_plan import plan_eviction
from neuron.text.schema import left_out

GIB = 1 << 30
CONTEXT_TOKENS = 1 << 20
"""Context of a model without a size. Agents send whole books by the count of a script, and make room before its end."""

Step = Sequence[InferenceEvent] | Exception | asyncio.Event | float
"""A batch to yield, an error to raise, an event to wait for, or a pause in seconds."""
Script = Callable[[InferenceRequest], Iterable[Step]]

HELLO: list[Step] = [
    [Started(5, 2)],
    [TextDelta("Hel")],
    [TextDelta("lo")],
    [Finished(FinishReason.STOP, 2)],
]


def describe(
    folder: pathlib.Path, name: str, gib: float, load_s: float = 0.05, devices: int = 1, fails: str = ""
) -> pathlib.Path:
    """Write a model's file and return its path."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"gib": gib, "load_s": load_s, "devices": devices, "fails": fails}))
    return path


class ScriptedModel:
    """A loaded model, which records its requests."""

    def __init__(self, harness: "ScriptedHarness", spec: ModelSpec, size_bytes: int) -> None:
        sizes = (4096, 16, size_bytes - size_bytes // 4, size_bytes // 4) if size_bytes else (CONTEXT_TOKENS, 4, 10, 20)
        self.loaded = LoadedModel(spec.id, "scripted", "none", *sizes)
        self.devices = spec.devices or ("cpu:0",)
        self.capabilities = (Capability.CHAT, Capability.VISION) if harness.sees else (Capability.CHAT,)
        self.requests: list[InferenceRequest] = []
        self.closed = 0
        self._harness = harness

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        """Return a vector of each input's length and place."""
        vectors = [array.array("f", [len(given), index]).tobytes() for index, given in enumerate(request.inputs)]
        return Embeddings(tuple(vectors), sum(len(given) for given in request.inputs))

    async def left_out(self, request: InferenceRequest) -> Sequence[str]:
        return left_out(request)

    async def count_tokens(self, request: InferenceRequest) -> int:
        """Return the count of the script's ``Started``, as the engine's own count would be."""
        for step in self._harness.script(request):
            if isinstance(step, Exception):
                raise step
            for event in step if isinstance(step, Sequence) else ():
                if isinstance(event, Started):
                    return event.prompt_tokens
        raise AssertionError("the script has no start")

    async def infer(self, request: InferenceRequest) -> AsyncGenerator[Sequence[InferenceEvent], None]:
        self.requests.append(request)
        try:
            for step in self._harness.script(request):
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, asyncio.Event):
                    await step.wait()
                elif isinstance(step, float):
                    await asyncio.sleep(step)
                else:
                    deltas = [event for event in step if not isinstance(event, Started | Finished)]
                    self._harness.generated[self.devices[0]] += len(deltas)
                    yield step
        finally:
            self.closed += 1


class ScriptedHarness:
    """Loads scripted models; ``fails`` and ``waits`` shape the load, ``total_bytes`` is the memory of devices."""

    name = "torch"

    def __init__(
        self, script: Script = lambda request: HELLO, sees: bool = True, total_bytes: Mapping[str, int] | None = None
    ) -> None:
        self.script = script
        self.sees = sees
        self.total_bytes = dict(total_bytes or {})
        self.used_bytes = dict.fromkeys(self.total_bytes, 0)
        self.fails: ApiError | None = None
        self.waits: asyncio.Event | None = None
        self.loads: list[ModelSpec] = []
        self.unloads: list[str] = []
        self.models: dict[str, ScriptedModel] = {}
        self.generated: Counter[str] = Counter()
        """Tokens, by device."""

    @property
    def num_loads(self) -> Counter[str]:
        """Loads, by model."""
        return Counter(spec.id for spec in self.loads)

    async def fit(self, spec: ModelSpec, evictable_bytes: Mapping[str, int]) -> Fit:
        need = await self.measure(spec, pathlib.Path(spec.source))
        free_bytes = await self.free_bytes(need.bytes_on)
        name = pathlib.Path(spec.source).name
        for evicts in (False, True):
            have = {device: free + evicts * evictable_bytes.get(device, 0) for device, free in free_bytes.items()}
            if plan := plan_eviction(need, have):
                share_bytes = need.bytes_on[plan.devices[0]]
                size_bytes = need.total_bytes
                return Fit(ChosenWeights(name, size_bytes, plan.devices, 4096, share_bytes, size_bytes, evicts))
        reasons = (f"{device}: needs {need.total_bytes}, free {free}" for device, free in free_bytes.items())
        return Fit(None, (PassedOver(name, need.total_bytes, "; ".join(reasons)),))

    async def measure(self, spec: ModelSpec, path: pathlib.Path) -> Requirement:
        if not path.is_file():
            return Requirement()
        file = json.loads(path.read_text())
        share_bytes = int(file["gib"] * GIB) // file["devices"]
        return Requirement(dict.fromkeys(spec.devices or self.total_bytes, share_bytes), file["devices"])

    async def free_bytes(self, devices: Collection[str]) -> dict[str, int]:
        return {device: self.total_bytes.get(device, 0) - self.used_bytes.get(device, 0) for device in devices}

    async def load(self, spec: ModelSpec, path: pathlib.Path, progress: Progress) -> Model:
        file = json.loads(path.read_text()) if path.is_file() else {"gib": 0, "load_s": 0, "fails": ""}
        size_bytes = int(file["gib"] * GIB)
        self.loads.append(spec)
        assert not self.total_bytes or spec.id not in self.models, f"{spec.id} is loaded twice"
        assert len(spec.devices) == file.get("devices", len(spec.devices))
        self._use(spec.devices, size_bytes)
        for device, used_bytes in self.used_bytes.items():
            assert used_bytes <= self.total_bytes[device], f"{spec.id} overflows {device}"
        try:
            for step in range(1, 10):
                progress(step / 10)
                if file["load_s"]:
                    await asyncio.sleep(file["load_s"] / 9)
                if step == 5 and self.waits is not None:
                    await self.waits.wait()
            if self.fails is not None:
                raise self.fails
            if file["fails"]:
                raise UnprocessableError(file["fails"])
        except BaseException:
            self._use(spec.devices, -size_bytes)
            raise
        self.models[spec.id] = ScriptedModel(self, spec, size_bytes)
        return self.models[spec.id]

    async def unload(self, model: Model) -> None:
        loaded = model.loaded
        del self.models[loaded.model]
        self.unloads.append(loaded.model)
        self._use(model.devices, -loaded.weights_bytes - loaded.kv_cache_bytes)

    def host(self) -> Host:
        """Return the host as a probe would find it."""
        return Host(
            tuple(
                Device(device, DeviceKind.CUDA, "a GPU", total, total - self.used_bytes[device], "9.0")
                for device, total in self.total_bytes.items()
            )
        )

    def _use(self, devices: Sequence[str], size_bytes: int) -> None:
        for device in self.used_bytes.keys() & set(devices):
            self.used_bytes[device] += size_bytes // len(devices)


class ScriptedWorker:
    """A worker without a process."""

    def __init__(self, device_id: str, harness: ScriptedHarness) -> None:
        self.device_id = device_id
        self.harness = harness
        self.state = WorkerState.STOPPED

    def health(self) -> WorkerHealth:
        return WorkerHealth(self.device_id, self.state, 0, generated=self.harness.generated[self.device_id])

    async def start(self) -> None:
        self.state = WorkerState.READY

    async def stop(self, timeout_s: float = 10.0) -> None:
        self.state = WorkerState.STOPPED
