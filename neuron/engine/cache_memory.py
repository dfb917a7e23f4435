"""Memory of a model's caches on its device, by layers, page tables and state slots.

Which pages and slots a sequence has is decided by :mod:`neuron.engine.cache`. Each table of :class:`LayerCaches` has
two pages more than its pool: page 0 pads page tables, and the last one is of rows without a sequence.
"""

import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from neuron.engine.sequence import Int32Array
from neuron.engine.staging import to_device
from neuron.layers.cache import SequenceState, table_of
from neuron.layers.shard import WHOLE, Shard
from neuron.models import decoder
from neuron.models.model import ModelConfig
from neuron.models.packed_weights import huge_pages
from neuron.models.sizing import MemoryPlan
from neuron.triton_kernels.batch import Batch


class LayerCaches:
    """Caches of all layers of a model, or of one rank's part, as tensors."""

    def __init__(
        self, config: ModelConfig, plan: MemoryPlan, dtype: torch.dtype, device: torch.device, shard: Shard = WHOLE
    ) -> None:
        self._kinds = config.caches(shard)
        windows = [cache.window_tokens if cache is not None else 0 for cache in self._kinds]
        self._tables = [table_of(window, plan.tables) for window in windows]
        """Page table of each layer."""
        self.device, self.dtype = device, dtype
        self.windows = [
            max(window for window, of_layer in zip(windows, self._tables, strict=True) if of_layer == table)
            for table in range(len(plan.pages))
        ]
        """Longest window of the layers with each table, in tokens; 0: none has one."""
        self.padding_pages = np.array(plan.pages, np.int32) + 1
        """Page of each table for rows without a sequence."""
        num_pages = [plan.pages[table] + 2 for table in self._tables]
        num_slots = 0 if plan.states is None else 1 + plan.states.num_slots
        self.layers, self._states = decoder.new_caches(
            config, num_pages, num_slots, dtype, lambda shape, kind: zeros(shape, kind, device), shard, plan.kv_dtype
        )

    def of_layers(self, batches: Sequence[Batch]) -> list[Batch]:
        """Return the one of ``batches``, which are of all page tables, for each layer."""
        return [batches[table] for table in self._tables]

    def copy_states(self, copies: Int32Array) -> None:
        """Copy states ``[2, N]``, from and to; from 0 stands for zeros."""
        for source, to in copies.T.tolist():
            assert self._states is not None
            if source:
                self._states[to].copy_(self._states[source])
            else:
                self._states[to].zero_()

    def clear(self, tables: Sequence[Int32Array]) -> None:
        """Zero pages of each table, and the state slots behind them; see :class:`~neuron.engine.executor.Executor`.

        Tokens beyond a sequence's end in its last page are masked, and zero times NaN is NaN.
        """
        chosen = [to_device(pages, self.device).to(torch.int64) for pages in tables]
        # An assignment would copy the 0 to the device and wait for all queued work.
        for cache, kind, table in zip(self.layers, self._kinds, self._tables, strict=True):
            for tensor in cache or ():
                if tensor is not None and not isinstance(kind, SequenceState):
                    # Float8 cannot be filled; its zero is that of a byte.
                    filled = tensor.view(torch.int8) if tensor.itemsize == 1 else tensor
                    filled.index_fill_(0, chosen[table], 0)
        if self._states is not None:
            self._states.index_fill_(0, chosen[-1], 0)


class NativeCaches:
    """Caches of a model as bytes ``[pages, bytes]`` for each table, laid out as in ``attention.c``.

    A page holds all layers of its table, so that a short sequence touches few huge pages however many layers there are.
    """

    def __init__(self, plan: MemoryPlan, page_bytes: Sequence[int]) -> None:
        self.tables = [
            _rows(num_pages + 1, num_bytes) for num_pages, num_bytes in zip(plan.pages, page_bytes, strict=True)
        ]
        self.states = None if plan.states is None else _rows(1 + plan.states.num_slots, plan.states.slot_bytes)
        """State slots ``[slots, bytes]``, laid out as in ``delta.c``."""

    def copy_states(self, copies: Int32Array) -> None:
        """Copy states as :meth:`LayerCaches.copy_states` does."""
        for source, to in copies.T.tolist():
            assert self.states is not None
            self.states[to] = self.states[source] if source else 0

    def clear(self, tables: Sequence[Int32Array]) -> None:
        """Zero pages of each table and state slots, as :meth:`LayerCaches.clear` does."""
        for cache, pages in zip(self.tables, tables, strict=False):
            cache[pages] = 0
        if self.states is not None:
            self.states[tables[-1]] = 0


def _rows(count: int, num_bytes: int) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    return huge_pages(count * max(1, num_bytes)).reshape(count, -1)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return zeros; on a CPU in memory that is committed on first use and unmapped with the tensor.

    ``torch.zeros`` writes them, 2 GiB in 0.4 s, to a heap that may keep them.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8).view(dtype).view(shape)
