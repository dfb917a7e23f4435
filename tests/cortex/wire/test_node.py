"""Reports of nodes: states are of a closed list on both sides."""

import enum
from typing import Any, get_type_hints

import msgspec
import pytest

from cortex.wire.node import Device, Health, ModelState, ModelStatus, WorkerHealth


@pytest.mark.parametrize(
    ("kind", "field"),
    [(Health, "state"), (WorkerHealth, "state"), (ModelStatus, "state"), (Device, "kind"), (Device, "worker")],
)
def test_states_are_enums_and_an_unknown_one_is_no_state(kind: Any, field: str) -> None:
    hint = get_type_hints(kind)[field]
    (states,) = [one for one in getattr(hint, "__args__", (hint,)) if one is not type(None)]
    assert issubclass(states, enum.StrEnum)
    with pytest.raises(msgspec.ValidationError, match=rf"Invalid enum value 'melted' - at `\$\.{field}`"):
        msgspec.convert({"id": "x", "name": "x", "kind": "cpu", "device": "d", "uptime_s": 1.0, "workers": [],
                         "restarts": 0, "memory_total_bytes": 1, "memory_free_bytes": 1, "state": "ready",
                         field: "melted"}, kind)  # fmt: skip


def test_a_state_is_written_as_its_name() -> None:
    assert msgspec.to_builtins(ModelStatus("m", ModelState.RECOVERING))["state"] == "recovering"
