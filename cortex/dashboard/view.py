"""The page's view of the fleet: a tree of JSON, and the difference of two such trees.

Pure. Numbers that change a little at every poll are rounded to visible steps, so that an idle fleet sends nothing. A
difference is a JSON merge patch (RFC 7386): a ``null`` deletes, an object is patched, all else is replaced. There is no
``null`` in a tree.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from cortex.fleet.catalogue import Catalogue
from cortex.fleet.offers import pricing_of
from cortex.fleet.state import Node
from cortex.wire.node import Device, ModelState, ModelStatus, NodeState, WorkerHealth

Tree = dict[str, Any]

MEMORY_STEPS = 512
"""Steps of free memory, as a bar on a screen can show them."""
USED_STEP_S = 10.0


def node_tree(node: Node) -> Tree:
    """Return the tree of a node: its state, its devices with their workers, its models beyond the available ones."""
    workers = {worker.device: worker for worker in node.health.workers} if node.health else {}
    devices = node.discovery.devices if node.discovery else ()
    return _without_empty(
        endpoint=node.endpoint,
        state=_state(node),
        version=node.discovery.version if node.discovery else "",
        hostname=node.discovery.hostname if node.discovery else "",
        fault=node.fault or "",
        failed_polls=node.failed_polls,
        activating=list(node.health.activating) if node.health else [],
        devices={device.id: _device(device, workers.get(device.id)) for device in devices},
        models={
            status.id: _model(status)
            for status in node.models.values()
            if node.up and status.state is not ModelState.AVAILABLE
        },
    )


def catalogue_tree(catalogue: Catalogue, nodes: Mapping[str, Node]) -> Tree:
    """Return the tree of all models that clients may use, by id, with their entries in the catalogue."""
    tree: Tree = {}
    aliases: dict[str, list[str]] = {}
    for alias, model in sorted(catalogue.aliases.items()):
        aliases.setdefault(model, []).append(alias)
    for model, profile in catalogue.profiles.items():
        tree[model] = _without_empty(
            aliases=aliases.get(model, []),
            source=profile.source,
            added=model in catalogue.added,
            pricing=msgspec.to_builtins(pricing_of(profile.price)) if profile.price else None,
            pinned=list(profile.pinned),
            priority=profile.priority,
            devices=profile.tensor_parallel if profile.tensor_parallel > 1 else 0,
        )
    for node in nodes.values():
        if node.up:
            for model in node.models.keys() - tree.keys():
                tree[model] = _without_empty(aliases=aliases.get(model, []), source=node.models[model].source)
    return tree


def difference(before: Tree, after: Tree) -> Tree:
    """Return the merge patch that makes ``before`` into ``after``."""
    patch: Tree = dict.fromkeys(before.keys() - after.keys())
    for key, value in after.items():
        known = before.get(key)
        if known is value or known == value:
            continue
        if isinstance(known, dict) and isinstance(value, dict):
            patch[key] = difference(known, value)
        else:
            patch[key] = value
    return patch


def _without_empty(**fields: Any) -> Tree:
    """Return the fields that are not empty; the page takes a missing one as empty."""
    return {name: value for name, value in fields.items() if value or isinstance(value, dict)}


def _state(node: Node) -> str:
    if not node.up:
        return "down" if node.polled else "unknown"
    return node.health.state.value if node.health else NodeState.READY.value


def _device(device: Device, worker: WorkerHealth | None) -> Tree:
    step = max(1, device.memory_total_bytes // MEMORY_STEPS)
    return _without_empty(
        kind=device.kind.value,
        name=device.name,
        total=device.memory_total_bytes,
        free=device.memory_free_bytes // step * step,
        capability=device.compute_capability,
        cores=device.num_cores,
        worker=worker.state.value if worker else device.worker.value if device.worker else "",
        restarts=worker.restarts if worker else 0,
        recycles=worker.recycles if worker else 0,
        waiting=worker.waiting if worker else 0,
        fault=(worker.fault if worker else None) or "",
    )


def _model(status: ModelStatus) -> Tree:
    return _without_empty(
        state=status.state.value,
        progress=round(status.progress, 2),
        devices=list(status.devices),
        capabilities=[capability.value for capability in status.capabilities],
        architecture=status.architecture,
        dtype=status.dtype,
        context=status.context_tokens,
        sequences=status.max_sequences,
        weights=status.weights_bytes,
        cache=status.kv_cache_bytes,
        running=status.running,
        loaded_at=round(status.loaded_at),
        used_at=int(status.last_used_at // USED_STEP_S * USED_STEP_S),
        pinned=status.pinned,
        priority=status.priority,
        idle_ttl_s=status.idle_ttl_s,
        error=status.error or "",
    )
