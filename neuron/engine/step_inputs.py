"""Inputs and outputs of a captured decode step, at fixed addresses, and the copy of a plan to them.

One array holds all inputs, so that a step costs one copy; each part is aligned to 16 bytes, as the kernels are compiled
for. The step advances its rows itself (:mod:`neuron.triton_kernels.decode_step`), so that one plan
serves a multi-step decode.
"""

from typing import Any, Final

import numpy as np
import torch

from neuron.engine.plan import StepPlan
from neuron.engine.sampler import Draws
from neuron.engine.sequence import Int32Array
from neuron.engine.staging import Array
from neuron.models.sizing import PAGE_TOKENS
from neuron.triton_kernels.decode_state import MAX_STOPS, DecodeState
from neuron.triton_kernels.sampling import SamplingRows

PENDING: Final = -2
"""Value of a token that the device has not published yet."""
NUM_PLACES: Final = 128
"""Steps that are published at different places: a whole multi-step decode, and the steps before and behind it."""
ALIGNED: Final = 4
"""Alignment of each part in elements."""


class Published:
    """Results that the device writes for the host, in memory of both: each step's tokens, and whether a row is left.

    ``most`` rows at the most; a plan's negative tokens refer to rows of ``last``.
    """

    def __init__(self, most: int, device: torch.device) -> None:
        pins = device.type == "cuda"
        width = -(-most // ALIGNED) * ALIGNED
        # One more, never read: for the runs in which graphs are captured.
        self.tokens = torch.full((NUM_PLACES + 1, width), PENDING, dtype=torch.int32, pin_memory=pins)
        self.all_ended = torch.zeros(1, dtype=torch.int32, pin_memory=pins)
        # The same memory: access through torch takes ten times as long.
        self.seen: Int32Array = self.tokens.numpy()
        self._all_ended: Int32Array = self.all_ended.numpy()
        self.last = torch.zeros(width, dtype=torch.int32, device=device)
        self._next = 0

    def take(self, num_steps: int) -> int:
        """Return the first of ``num_steps`` consecutive free places, made pending.

        A step in flight has one place, and at most one is launched ahead of the last read.
        """
        first = self._next if self._next + num_steps <= NUM_PLACES else 0
        self._next = first + num_steps
        self.seen[first : first + num_steps] = PENDING
        self._all_ended[0] = 0
        return first


class StepInputs:
    """The inputs of a graph of ``num_rows`` rows with up to ``num_columns`` pages each, in each table.

    Rows without a sequence have ended, with a context of one token in the table's page of ``padding_pages``, and state
    slot 0: they read and write nothing of a sequence.
    """

    def __init__(
        self, num_rows: int, num_columns: int, device: torch.device, published: Published, padding_pages: Int32Array
    ) -> None:
        self.num_rows = num_rows
        num_tables = len(padding_pages)
        # Those of a table begin aligned too.
        row_width, table_width = (-(-size // ALIGNED) * ALIGNED for size in (num_rows, num_rows * num_columns))
        parts = {
            # Elements of 8 bytes first, for alignment.
            "slot_mappings": (num_tables * row_width, np.int64),
            "seeds": (num_rows, np.int64),
            "token_ids": (num_rows, np.int32),
            "positions": (num_rows, np.int32),
            "context_lens": (num_rows, np.int32),
            "counters": (num_rows, np.int32),
            "ended": (num_rows, np.int32),
            "state_slots": (num_rows, np.int32),
            "top_k": (num_rows, np.int32),
            "temperature": (num_rows, np.float32),
            "top_p": (num_rows, np.float32),
            "min_p": (num_rows, np.float32),
            "place": (1, np.int32),
            "stops": (num_rows * MAX_STOPS, np.int32),
            "page_tables": (num_tables * table_width, np.int32),
        }
        spans: dict[str, tuple[int, int, Any]] = {}
        end = 0
        for name, (count, kind) in parts.items():
            size = count * np.dtype(kind).itemsize // 4
            spans[name] = end, end + size, kind
            end += -(-size // ALIGNED) * ALIGNED
        shapes = {
            "stops": (num_rows, MAX_STOPS),
            "slot_mappings": (num_tables, row_width),
            "page_tables": (num_tables, table_width),
        }
        self._there = torch.zeros(end, dtype=torch.int32, device=device)
        # Double-buffered: the device may still read the one of the step before. The one before that has been read,
        # since at most one step is launched ahead.
        self._here = [torch.zeros(end, dtype=torch.int32, pin_memory=device.type == "cuda") for _ in range(2)]
        self._views: list[dict[str, Array]] = [
            {
                name: staged.numpy()[first:last].view(kind).reshape(shapes.get(name, -1))
                for name, (first, last, kind) in spans.items()
            }
            for staged in self._here
        ]
        for views in self._views:
            views["slot_mappings"] = views["slot_mappings"][:, :num_rows]
            whole = views["page_tables"][:, : num_rows * num_columns]
            views["page_tables"] = whole.reshape(num_tables, num_rows, num_columns)
        self._current = 0
        self._num_filled = [num_rows] * 2
        """Rows of each buffer that may have a sequence."""
        self._widths: list[dict[str, int]] = [{}, {}]
        """Columns of each table that the last plan in the buffer has written."""
        dtypes = {np.int32: torch.int32, np.int64: torch.int64, np.float32: torch.float32}
        there = {
            name: self._there[first:last].view(dtypes[kind]).view(shapes.get(name, -1))
            for name, (first, last, kind) in spans.items()
        }
        names = ("token_ids", "positions", "context_lens", "counters", "ended", "stops")
        tables = there["page_tables"][:, : num_rows * num_columns]
        padding_slots = padding_pages * np.int64(PAGE_TOKENS)
        self.state = DecodeState(
            **{name: there[name] for name in names},
            slot_mappings=there["slot_mappings"][:, :num_rows],
            padding_slots=torch.from_numpy(padding_slots).to(device),
            page_tables=tables.view(num_tables, num_rows, num_columns),
            last=published.last,
            place=there["place"],
            published=published.tokens,
            all_ended=published.all_ended,
        )
        self.rows = SamplingRows(
            temperature=there["temperature"],
            top_k=there["top_k"],
            top_p=there["top_p"],
            min_p=there["min_p"],
            seeds=there["seeds"],
            counters=there["counters"],
        )
        self.state_slots = there["state_slots"]
        """``[B]``: slot of each row's state."""
        self._padding: dict[str, Any] = {
            **dict.fromkeys(("token_ids", "positions", "state_slots"), 0),
            **dict.fromkeys(("context_lens", "ended"), 1),
            "slot_mappings": padding_slots[:, None],
        }
        self._padding_pages = padding_pages[:, None]
        # For the run in which it is captured, no row has a sequence.
        for current in range(2):
            self._pad(current, 0)
        self._there.copy_(self._here[0])
        self.state.place.fill_(NUM_PLACES)

    def _pad(self, current: int, count: int) -> None:
        """Leave a buffer's first ``count`` rows to sequences; of the others, clear those that have had one."""
        view, rows = self._views[current], slice(count, self._num_filled[current])
        for name, value in self._padding.items():
            view[name][..., rows] = value
        view["page_tables"][:, rows] = 0
        view["page_tables"][:, rows, 0] = self._padding_pages
        view["stops"][rows] = -1
        self._num_filled[current] = count

    def fill(self, plan: StepPlan, draws: Draws, place: int) -> None:
        """Queue the copy of a plan of at most ``num_rows`` rows."""
        self._current ^= 1
        count, view = plan.num_decodes, self._views[self._current]
        values: dict[str, Array] = {
            "token_ids": plan.token_ids,
            "positions": plan.positions,
            "slot_mappings": plan.slot_mappings,
            "context_lens": plan.context_lens,
            "counters": draws.num_output,
            "temperature": draws.temperature,
            "top_k": draws.top_k,
            "top_p": draws.top_p,
            "min_p": draws.min_p,
            "seeds": draws.seeds.view(np.int64),
        }
        for name, array in values.items():
            view[name][..., :count] = array
        view["ended"][:count] = 0
        if len(plan.state_slots):
            view["state_slots"][:count] = plan.state_slots
        view["place"][0] = place
        widths = self._widths[self._current]
        for name, table, rest in (("page_tables", plan.page_tables, 0), ("stops", plan.stops, -1)):
            width = table.shape[-1]
            view[name][..., :count, width : widths.get(name, width)] = rest
            view[name][..., :count, :width] = table
            widths[name] = width
        self._pad(self._current, count)
        self._there.copy_(self._here[self._current], non_blocking=True)
