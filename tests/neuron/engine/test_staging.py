"""Copies to a device come from pinned memory, since any other copy waits for the queue."""

import numpy as np
import pytest
import torch

from neuron.engine import staging


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """Record of each copy to a fake GPU whether its source is pinned and whether it is strided."""
    found: list[tuple[bool, bool]] = []
    pinned: set[int] = set()

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.add(tensor.data_ptr())
        return tensor

    def to(tensor: torch.Tensor, device: torch.device, *, non_blocking: bool) -> torch.Tensor:
        assert non_blocking
        found.append((tensor.data_ptr() in pinned, not tensor.is_contiguous()))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", to)
    return found


def test_a_column_of_a_table_has_no_gaps_when_it_is_copied(copies: list[tuple[bool, bool]]) -> None:
    table = np.arange(12, dtype=np.int32).reshape(4, 3)
    there = staging.to_device(table.T[1], torch.device("cuda"))
    assert there.tolist() == [1, 4, 7, 10]
    assert copies == [(True, False)]


def test_on_a_cpu_nothing_is_copied() -> None:
    table = np.zeros((4, 3), np.int32)
    there = staging.to_device(table.T[1], torch.device("cpu"))
    table[:] = 7
    assert there.tolist() == [7] * 4
