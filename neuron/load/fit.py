"""The choice of the weights, the devices and the context for a model, out of what is offered and what memory is free.

Pure, with the memory plan of the load itself. Chosen is what gives the longest context up to the one wanted, and of
these what holds most of the model: the bytes of its file, but never more than its weights have in bfloat16, so that a
file of float32 is no better than one of half its size. So more memory never means less context, nor a smaller file.
A GPU is taken before the CPU, and few devices before many. Memory of models that may be evicted counts where it makes
the choice better (:meth:`cortex.wire.node.ChosenWeights.rank`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import msgspec

from cortex.wire.errors import ApiError
from cortex.wire.node import ChosenWeights, Fit, ModelSpec, PassedOver
from neuron.layers.shard import Shard
from neuron.load.choices import Choice
from neuron.models.errors import DoesNotFitError
from neuron.models.gguf import TensorKind
from neuron.models.model import ModelConfig
from neuron.models.sizing import plan_memory

GROUP_SIZES: Final = (2, 4, 8)
"""Numbers of GPUs that a model may be divided over."""
_GIB: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Candidate:
    """A choice of a repository, with the configuration in its files."""

    choice: Choice
    config: ModelConfig | None
    """Configuration; ``None`` if the files cannot be loaded."""
    refusal: str = ""
    """Reason why they cannot."""
    is_estimate: bool = False
    """Whether the configuration is that of another choice, with the storage that this one's name says."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """A candidate on devices."""

    candidate: Candidate
    weights: ChosenWeights
    rank: tuple[int, ...]


def fit(
    candidates: Sequence[Candidate],
    free_bytes: Mapping[str, int],
    spec: ModelSpec,
    *,
    evictable_bytes: Mapping[str, int] | None = None,
    cpu_kernels: bool = True,
) -> Fit:
    """Return the best of ``candidates`` on devices with ``free_bytes``, and why the others were passed over.

    ``spec`` has the context that is wanted, which is then a must, and the limits of the load. A ``tensor_parallel`` of
    1 is alone or on as many GPUs as it takes; another one is kept. ``evictable_bytes`` is what evictions would free
    beside ``free_bytes``.
    """
    freed = evictable_bytes or {}
    all_bytes = {device: free + freed.get(device, 0) for device, free in free_bytes.items()}
    amounts = {False: free_bytes} if all_bytes == dict(free_bytes) else {False: free_bytes, True: all_bytes}
    plans: list[_Plan] = []
    reasons: dict[str, str] = {}
    for candidate in candidates:
        if candidate.config is None:
            reasons[candidate.choice.name] = candidate.refusal
            continue
        found: list[_Plan] = []
        for evicts, amount in amounts.items():
            refusals = []
            for devices in _places(amount, spec):
                try:
                    found.append(_plan(candidate, candidate.config, devices, amount, spec, evicts, cpu_kernels))
                except DoesNotFitError as error:
                    needs, free = error.needed_bytes / _GIB, min(amount[device] for device in devices) / _GIB
                    refusals.append(f"{'+'.join(devices)}: needs {needs:.2f} GiB, free {free:.2f} GiB")
                except ApiError as error:
                    refusals.append(error.message)
        plans += found
        if not found:
            reasons[candidate.choice.name] = "; ".join(refusals) or "no device takes loads"
    best = max(plans, key=lambda plan: plan.rank, default=None)
    if best is not None:
        for plan in plans:
            reasons[plan.candidate.choice.name] = _comparison(plan, best, plans)
        reasons.pop(best.candidate.choice.name, None)
    passed_over = tuple(
        PassedOver(candidate.choice.name, candidate.choice.size_bytes, reasons[candidate.choice.name])
        for candidate in candidates
        if candidate.choice.name in reasons
    )
    return Fit(None if best is None else best.weights, passed_over)


def estimated(candidate: Candidate, choice: Choice) -> Candidate | None:
    """Return another GGUF ``choice`` of a repository, estimated from one whose configuration is known.

    ``None`` if its tag does not say in which kind it stores matrices.
    """
    tag = choice.tag.removeprefix("UD-")
    kinds = [kind for kind in TensorKind if tag == kind.name or tag.startswith(f"{kind.name}_")]
    if not kinds or candidate.config is None:
        return None
    kind = max(kinds, key=lambda found: len(found.name))
    tensors = candidate.config.tensors()
    stored = {
        name: kind if len(tensors[name].shape) > 1 and tensors[name].shape[-1] % kind.block == 0 else before
        for name, before in candidate.config.tensor_kinds.items()
    }
    return Candidate(choice, replace(candidate.config, tensor_kinds=stored), is_estimate=True)


def _places(free_bytes: Mapping[str, int], spec: ModelSpec) -> Iterator[tuple[str, ...]]:
    """Yield the devices to plan for: of each kind and number those with most free memory, in the order given."""
    for kind in ("cuda", "cpu"):
        devices = [device for device in free_bytes if device.startswith(kind)]
        roomiest = sorted(devices, key=lambda device: -free_bytes[device])
        sizes = (1, *(GROUP_SIZES if kind == "cuda" else ())) if spec.tensor_parallel <= 1 else (spec.tensor_parallel,)
        for size in sizes:
            if size <= len(devices):
                yield tuple(device for device in devices if device in roomiest[:size])


def _plan(
    candidate: Candidate,
    config: ModelConfig,
    devices: tuple[str, ...],
    free_bytes: Mapping[str, int],
    spec: ModelSpec,
    evicts: bool,
    cpu_kernels: bool,
) -> _Plan:
    """Return the plan of the load on ``devices``. Raises as :func:`neuron.models.sizing.plan_memory`."""
    size, free = len(devices), min(free_bytes[device] for device in devices)
    asked = msgspec.structs.replace(spec, tensor_parallel=size)
    plans = [
        plan_memory(config, asked, devices[0], free, Shard(rank, size), cpu_kernels=cpu_kernels) for rank in range(size)
    ]
    choice = candidate.choice
    weights = ChosenWeights(
        choice.name,
        choice.size_bytes,
        devices,
        min(plan.context_tokens for plan in plans),
        max(plan.total_bytes for plan in plans),
        min(choice.size_bytes, 2 * config.num_parameters()),
        evicts,
    )
    return _Plan(candidate, weights, weights.rank(spec.context_tokens))


def _comparison(plan: _Plan, best: _Plan, plans: Sequence[_Plan]) -> str:
    """Return why ``best`` was preferred to the candidate of ``plan``."""
    own = max((each for each in plans if each.candidate is plan.candidate), key=lambda each: each.rank)
    name = best.candidate.choice.name
    if own.rank[0] != best.rank[0]:
        return f"fits {'+'.join(own.weights.devices)} only; {name} fits {'+'.join(best.weights.devices)}"
    if own.rank[1] != best.rank[1]:
        return f"leaves room for {own.weights.context_tokens} tokens; {name} for {best.weights.context_tokens}"
    return f"holds no more than {name}"
