"""A model in a node's table: its specification, state and figures, and its status as the API shows it."""

import asyncio
import time
from dataclasses import dataclass, field

import msgspec

from cortex.wire.node import Eviction, ModelSpec, ModelState, ModelStatus
from neuron.harness import Harness, Model, Requirement


@dataclass(frozen=True, slots=True)
class Retention:
    """Conditions for keeping a model loaded. An ``idle_ttl_s`` of 0 sets no limit."""

    pinned: bool = False
    priority: int = 0
    idle_ttl_s: float = 0.0


@dataclass
class Entry:
    """A model of this node."""

    spec: ModelSpec
    harness: Harness
    retention: Retention = Retention()
    is_configured: bool = False
    """Whether the configuration of the node names the model, so that it is never forgotten."""
    entered_at: float = field(default_factory=time.monotonic)
    """Monotonic time at which the model entered its state."""
    evict: Eviction | None = None
    """Evictions allowed for its load; ``None``: none."""
    need: Requirement = field(default_factory=Requirement)
    generation: int = 0
    """Table generation of its last load."""
    ready_at: float = 0.0
    idle_at: float = 0.0
    load_s: float = 0.0
    uses: int = 0
    """Number of requests since its last load."""
    state: ModelState = ModelState.AVAILABLE
    model: Model | None = None
    progress: float = 0.0
    downloaded_bytes: int = 0
    download_bytes: int = 0
    loaded_at: float = 0.0
    last_used_at: float = 0.0
    running: int = 0
    error: str | None = None
    loading: "asyncio.Task[None] | None" = None
    leaving: "asyncio.Task[None] | None" = None
    fetching: "asyncio.Task[None] | None" = None
    """Download of its files alone."""
    lost_on: set[str] = field(default_factory=set)
    """Devices whose workers must restart before the model can be loaded again."""
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def is_at_rest(self) -> bool:
        """Return whether the model holds no memory, and no load, unload or download of it is in progress."""
        is_idle = self.model is None and self.loading is None and self.leaving is None and self.fetching is None
        return is_idle and self.state in {ModelState.AVAILABLE, ModelState.FAILED}

    def status(self) -> ModelStatus:
        """Return the status of the model for ``GET /models``."""
        common = ModelStatus(
            id=self.spec.id,
            state=self.state,
            source=self.spec.source,
            progress=self.progress if self.state in {ModelState.LOADING, ModelState.RECOVERING} else 0.0,
            downloaded_bytes=self.downloaded_bytes,
            download_bytes=self.download_bytes,
            running=self.running,
            loaded_at=self.loaded_at,
            last_used_at=self.last_used_at,
            error=self.error,
            generation=self.generation,
            required_bytes=self.need.total_bytes,
            pinned=self.retention.pinned,
            priority=self.retention.priority,
            idle_ttl_s=self.retention.idle_ttl_s,
        )
        if self.model is None:
            return common
        loaded = self.model.loaded
        return msgspec.structs.replace(
            common,
            devices=self.model.devices,
            capabilities=self.model.capabilities,
            architecture=loaded.architecture,
            dtype=loaded.dtype,
            context_tokens=loaded.context_tokens,
            max_sequences=loaded.max_sequences,
            weights_bytes=loaded.weights_bytes,
            expanded_bytes=loaded.expanded_bytes,
            kv_cache_bytes=loaded.kv_cache_bytes,
        )
