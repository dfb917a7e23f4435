"""A harness that honours memory, delays and failures, for fleets in which nothing is computed.

A model's source is a JSON file: ``{"gib": 10, "load_s": 0.1, "devices": 1, "fails": ""}``. The last message of a
request sets what its model does: ``prompt=100 tokens=20 pause=0.05``, or it is a question of ``ANSWERS``. A load that
would take more memory than there is raises, and so does a second load of a model: neither may ever happen.
"""

import asyncio
import json
import pathlib
from collections import Counter
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence

from cortex.wire.errors import UnprocessableError
from cortex.wire.events import (
    Finished,
    FinishReason,
    InferenceEvent,
    ReasoningDelta,
    Started,
    TextDelta,
    ToolCallDelta,
)
from cortex.wire.node import Capability, Device, DeviceKind, ModelSpec, WorkerHealth, WorkerState
from cortex.wire.request import InferenceRequest
from neuron.device.jobs import LoadedModel
from neuron.device.probe import Host
from neuron.harness import Model, Progress, Requirement
from neuron.text.schema import left_out

GIB = 1 << 30
TOKEN_S = 0.02
"""Pause before each token of an answer."""
ANSWERS: Mapping[str, tuple[str, str, str]] = {
    "Is 2027 a prime number?": (
        "The square root of 2027 is about 45, so I test the primes up to 43. None of them divides it.",
        "Yes. 2027 is prime: none of the primes up to its square root, 2, 3, 5, ... 43, divides it.",
        "",
    ),
    "What is the weather in Paris?": ("", "I will look it up.", '{"city": "Paris"}'),
}
"""Reasoning, text and arguments of a tool call, by question."""


def describe(
    folder: pathlib.Path, name: str, gib: float, load_s: float = 0.05, devices: int = 1, fails: str = ""
) -> pathlib.Path:
    """Write a model's file and return its path."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"gib": gib, "load_s": load_s, "devices": devices, "fails": fails}))
    return path


class FleetModel:
    """A loaded model."""

    def __init__(
        self, spec: ModelSpec, size_bytes: int, devices: tuple[str, ...], generated: "Counter[str] | None" = None
    ) -> None:
        self.generated = generated
        self.loaded = LoadedModel(spec.id, "fleet", "none", 4096, 16, size_bytes - size_bytes // 4, size_bytes // 4)
        self.devices = devices
        self.capabilities = (Capability.CHAT, Capability.COMPLETION)

    async def count_tokens(self, request: InferenceRequest) -> int:
        return 5

    async def left_out(self, request: InferenceRequest) -> Sequence[str]:
        return left_out(request)

    async def infer(self, request: InferenceRequest) -> AsyncGenerator[Sequence[InferenceEvent], None]:
        content = request.messages[-1].content if request.messages else request.prompt or ""
        words = dict(word.split("=", 1) for word in str(content).split() if "=" in word)
        tokens, pause_s = int(words.get("tokens", 3)), float(words.get("pause", 0))
        if (answer := ANSWERS.get(str(content))) is not None:
            async for batch in self._answer(request, *answer):
                yield batch
            return
        yield [Started(int(words.get("prompt", 5)), 0)]
        for number in range(tokens):
            if pause_s:
                await asyncio.sleep(pause_s)
            if self.generated is not None:
                self.generated[self.devices[0]] += 1
            yield [TextDelta(f"{self.loaded.model}:{number} ")]
        yield [Finished(FinishReason.STOP, tokens)]

    async def _answer(
        self, request: InferenceRequest, reasoning: str, text: str, arguments: str
    ) -> AsyncGenerator[Sequence[InferenceEvent], None]:
        yield [Started(sum(len(str(message.content)) for message in request.messages) // 4 + 16, 16)]
        deltas: list[InferenceEvent] = [ReasoningDelta(f"{word} ") for word in reasoning.split()]
        deltas += [TextDelta(f"{word} ") for word in text.split()]
        if arguments:
            deltas.append(ToolCallDelta(0, "call_1", request.tools[0].name))
            deltas += [ToolCallDelta(0, arguments=piece) for piece in arguments.partition(" ") if piece]
        for delta in deltas:
            await asyncio.sleep(TOKEN_S)
            if self.generated is not None:
                self.generated[self.devices[0]] += 1
            yield [delta]
        reason = FinishReason.TOOL_CALLS if arguments else FinishReason.STOP
        yield [Finished(reason, len(deltas), len(reasoning.split()))]


class FleetHarness:
    """Devices with so many bytes each."""

    name = "torch"

    def __init__(self, total_bytes: Mapping[str, int]) -> None:
        self.total_bytes = dict(total_bytes)
        self.used_bytes = dict.fromkeys(total_bytes, 0)
        self.here: dict[str, FleetModel] = {}
        self.loads: Counter[str] = Counter()
        self.generated: Counter[str] = Counter()
        """Tokens, by device."""
        self.unloads: list[str] = []

    async def measure(self, spec: ModelSpec, path: pathlib.Path) -> Requirement:
        made = json.loads(path.read_text())
        share_bytes = int(made["gib"] * GIB) // made["devices"]
        return Requirement(dict.fromkeys(spec.devices or self.total_bytes, share_bytes), made["devices"])

    async def free_bytes(self, devices: Collection[str]) -> dict[str, int]:
        return {device: self.total_bytes[device] - self.used_bytes[device] for device in devices}

    async def load(self, spec: ModelSpec, path: pathlib.Path, progress: Progress) -> Model:
        made = json.loads(path.read_text())
        self.loads[spec.id] += 1
        assert spec.id not in self.here, f"{spec.id} is loaded twice"
        share_bytes = int(made["gib"] * GIB) // made["devices"]
        assert len(spec.devices) == made["devices"]
        for device in spec.devices:
            self.used_bytes[device] += share_bytes
            assert self.used_bytes[device] <= self.total_bytes[device], f"{spec.id} overflows {device}"
        try:
            for step in range(10):
                progress(step / 10)
                await asyncio.sleep(made["load_s"] / 10)
            if made["fails"]:
                raise UnprocessableError(made["fails"])
        except BaseException:
            self._free(spec.devices, share_bytes)
            raise
        model = self.here[spec.id] = FleetModel(spec, int(made["gib"] * GIB), spec.devices, self.generated)
        return model

    async def unload(self, model: Model) -> None:
        name = model.loaded.model
        del self.here[name]
        self.unloads.append(name)
        self._free(model.devices, (model.loaded.weights_bytes + model.loaded.kv_cache_bytes) // len(model.devices))

    def host(self) -> Host:
        """Return what a probe would find."""
        free = {device: self.total_bytes[device] - used for device, used in self.used_bytes.items()}
        return Host(
            tuple(
                Device(device, DeviceKind.CUDA, "a GPU", total, free[device], "9.0")
                for device, total in self.total_bytes.items()
            )
        )

    def _free(self, devices: tuple[str, ...], share_bytes: int) -> None:
        for device in devices:
            self.used_bytes[device] -= share_bytes


class FleetWorker:
    """A worker without a process."""

    def __init__(self, device_id: str, harness: FleetHarness | None = None) -> None:
        self.device_id = device_id
        self.harness = harness
        self.state = WorkerState.STOPPED
        self.recycles = 0

    def health(self) -> WorkerHealth:
        generated = self.harness.generated[self.device_id] if self.harness else 0
        return WorkerHealth(self.device_id, self.state, 0, recycles=self.recycles, generated=generated)

    async def start(self) -> None:
        self.state = WorkerState.READY

    async def stop(self, timeout_s: float = 10.0) -> None:
        self.state = WorkerState.STOPPED
