"""A harness that plays scripts: what a model does is written in the test."""

import array
import asyncio
import pathlib
from collections.abc import AsyncGenerator, Callable, Collection, Sequence

from cortex.wire.errors import ApiError
from cortex.wire.events import Finished, FinishReason, InferenceEvent, Started, TextDelta
from cortex.wire.node import Capability, ModelSpec
from cortex.wire.request import EmbeddingRequest, InferenceRequest
from neuron.device.jobs import LoadedModel
from neuron.harness import Embeddings, Model, Progress, Requirement
from neuron.text.schema import left_out

Step = Sequence[InferenceEvent] | Exception | asyncio.Event
"""A batch to yield, an error to raise, or something to wait for."""

HELLO: list[Step] = [
    [Started(5, 2)],
    [TextDelta("Hel")],
    [TextDelta("lo")],
    [Finished(FinishReason.STOP, 2)],
]


class ScriptedModel:
    """Plays ``script`` for every request and keeps what it was asked."""

    def __init__(self, name: str, script: Callable[[InferenceRequest], list[Step]], sees: bool = True) -> None:
        self.loaded = LoadedModel(name, "scripted", "none", 100, 4, 10, 20)
        self.devices = ("cpu:0",)
        self.capabilities = (Capability.CHAT, Capability.VISION) if sees else (Capability.CHAT,)
        self.requests: list[InferenceRequest] = []
        self.closed = 0
        self._script = script

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        """A vector of each input's length and place."""
        vectors = [array.array("f", [len(given), index]).tobytes() for index, given in enumerate(request.inputs)]
        return Embeddings(tuple(vectors), sum(len(given) for given in request.inputs))

    async def left_out(self, request: InferenceRequest) -> Sequence[str]:
        return left_out(request)

    async def count_tokens(self, request: InferenceRequest) -> int:
        """What the script says of its start, as the engine's own count would be."""
        for step in self._script(request):
            if isinstance(step, Exception):
                raise step
            if not isinstance(step, asyncio.Event):
                for event in step:
                    if isinstance(event, Started):
                        return event.prompt_tokens
        raise AssertionError("the script has no start")

    async def infer(self, request: InferenceRequest) -> AsyncGenerator[Sequence[InferenceEvent], None]:
        self.requests.append(request)
        try:
            for step in self._script(request):
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, asyncio.Event):
                    await step.wait()
                    continue
                yield step
        finally:
            self.closed += 1


class ScriptedHarness:
    """Loads scripted models; ``fails`` and ``waits`` shape the load."""

    name = "torch"

    def __init__(
        self, script: Callable[[InferenceRequest], list[Step]] = lambda request: HELLO, sees: bool = True
    ) -> None:
        self.script = script
        self.sees = sees
        self.fails: ApiError | None = None
        self.waits: asyncio.Event | None = None
        self.loads: list[ModelSpec] = []
        self.unloads: list[str] = []
        self.models: dict[str, ScriptedModel] = {}

    async def measure(self, spec: ModelSpec, path: pathlib.Path) -> Requirement:
        return Requirement()

    async def free_bytes(self, devices: Collection[str]) -> dict[str, int]:
        return dict.fromkeys(devices, 0)

    async def load(self, spec: ModelSpec, path: pathlib.Path, progress: Progress) -> Model:
        self.loads.append(spec)
        progress(0.5)
        if self.waits is not None:
            await self.waits.wait()
        if self.fails is not None:
            raise self.fails
        self.models[spec.id] = ScriptedModel(spec.id, self.script, self.sees)
        return self.models[spec.id]

    async def unload(self, model: Model) -> None:
        self.unloads.append(model.loaded.model)
