"""The ``Harness`` interface, which loads models and turns a request into ``InferenceEvent``s.

HTTP and dialects are not its concern. ``torch`` (:mod:`neuron.torch_harness`) ships with the project; it runs models in
the project's own device workers.
"""

import pathlib
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from cortex.wire.events import InferenceEvent
from cortex.wire.node import Capability, Fit, ModelSpec
from cortex.wire.request import EmbeddingRequest, InferenceRequest
from neuron.device.jobs import LoadedModel

Progress = Callable[[float], None]
"""Callback with the progress of a load, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Requirement:
    """Requirement of a model's load: ``num_devices`` of the devices in ``bytes_on``, with these bytes free on each.

    Without devices it needs nothing, and none is chosen for it.
    """

    bytes_on: Mapping[str, int] = field(default_factory=dict)
    num_devices: int = 1

    @property
    def total_bytes(self) -> int:
        """Return the least bytes on all its devices together."""
        return self.num_devices * min(self.bytes_on.values(), default=0)


class Embeddings(msgspec.Struct, frozen=True):
    """Vectors of length 1, float32 in this machine's byte order, one for each input."""

    vectors: tuple[bytes, ...]
    prompt_tokens: int


class Model(Protocol):
    """A loaded model."""

    @property
    def loaded(self) -> LoadedModel:
        """Loaded model, as the worker reports it."""

    @property
    def devices(self) -> tuple[str, ...]:
        """Devices of the model."""

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """Capabilities of the model."""

    async def count_tokens(self, request: InferenceRequest) -> int:
        """Return the tokens of the prompt of ``request``, as ``Started`` reports them.

        Raises:
            ApiError: the request cannot be made a prompt.
        """

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        """Return the embeddings of a request's inputs; cancelled with its caller.

        Raises:
            ApiError: the request cannot be carried out.
        """

    async def left_out(self, request: InferenceRequest) -> Sequence[str]:
        """Return the parts of the schemas of ``request`` that will not be enforced, by place and keyword.

        Raises:
            ApiError: the schemas are over the limits of a request.
        """

    def infer(self, request: InferenceRequest) -> AsyncGenerator[Sequence[InferenceEvent], None]:
        """Run a request and yield its events in batches; closing the generator cancels it within one step.

        Raises:
            ApiError: the request cannot be carried out; raised before the first batch.
        """


class Harness(Protocol):
    """Loads models on this host's devices."""

    name: str

    async def measure(self, spec: ModelSpec, path: pathlib.Path) -> Requirement:
        """Return the requirement of the weights at ``path``, whatever is free now.

        Raises:
            ApiError: they cannot be read, or the neuron has no device that the spec allows.
        """

    async def fit(self, spec: ModelSpec, evictable_bytes: Mapping[str, int]) -> Fit:
        """Return the weights of the source of ``spec`` that fit best: a repository's, or those at a path.

        ``evictable_bytes`` is the memory of each device that evictions would free beside what is free now.

        Raises:
            ApiError: the source cannot be read, or is a wheel, which has nothing to choose.
        """

    async def free_bytes(self, devices: Collection[str]) -> Mapping[str, int]:
        """Return the memory that is free now on each of ``devices`` that takes loads."""

    async def load(self, spec: ModelSpec, path: pathlib.Path, progress: Progress) -> Model:
        """Load the weights at ``path``, on the devices that ``spec`` names if it names any.

        Raises:
            ApiError: 422 with the reason if it cannot fit or cannot be read; nothing stays allocated.
        """

    async def unload(self, model: Model) -> None:
        """Free every byte of a model. Its running requests fail."""
