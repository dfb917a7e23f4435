"""Memory plan of a model on a device, and the decision whether it fits.

Pure and without torch, so that the daemon's preflight, the worker's load and the advertised context limit agree. Sizes
only: the caller finds the free bytes, and may free more.
"""

import bisect
import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from cortex.wire.errors import InvalidRequestError
from cortex.wire.node import ModelSpec
from neuron.layers.cache import (
    ROUNDED,
    Cache,
    PagedKV,
    SequenceState,
    StateSlots,
    WindowTable,
    chunk_pages,
    window_pages,
    windows_of,
)
from neuron.layers.draft_head import hidden_places
from neuron.layers.shard import WHOLE, Shard
from neuron.models import packed, quantization
from neuron.models.errors import DoesNotFitError
from neuron.models.expansion import expansions
from neuron.models.model import DTYPE_BYTES, ModelConfig

PAGE_TOKENS: Final = 16
"""Tokens of a page of the KV cache: the unit of admission, and a tile's height in the kernels."""
MIN_CONTEXT_TOKENS: Final = 512
"""Least context: a model whose cache holds less of its own context is refused."""

MIN_SAMPLED_ROWS: Final = 16
"""Rows of a step that may be sampled though fewer sequences run: draft tokens are verified side by side."""
SAMPLER_BYTES: Final = 4 + 4 + 8 + 4 + 1
"""Per row and token of the vocabulary: logits, probabilities, their float64 running sum, counts, the prompt's mask."""


RUNNING_SHARE: Final = 0.25
"""Share of a cache that is too small for all states and pages which goes to the states of running sequences."""


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceDefaults:
    """Defaults of a kind of device, where the spec has none."""

    max_sequences: int
    cache_tokens: int
    """Tokens of the KV cache, over all sequences."""
    cache_share: float
    """Bound on the KV cache, as a share of the memory that weights and work space leave free."""
    step_tokens: int
    """Tokens of one step while nothing but prefill runs."""
    mixed_step_tokens: int
    """Most tokens of a step while sequences decode, which :mod:`neuron.engine.step_timer` may reduce."""


CPU_DEFAULTS: Final = DeviceDefaults(16, 16 * 8192, 0.25, step_tokens=512, mixed_step_tokens=128)
"""Defaults of a CPU, whose memory has other uses."""
CUDA_DEFAULTS: Final = DeviceDefaults(64, 64 * 8192, 0.8, step_tokens=2048, mixed_step_tokens=512)
"""Defaults of a GPU; bounded in tokens too, so that a small model on a large GPU leaves memory for a second."""


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Memory plan of a model on its device. ``kv_cache_bytes`` is exactly the pages of its tables, and its states."""

    dtype: str
    context_tokens: int
    max_sequences: int
    sampled_rows: int
    """Most rows of a step that are sampled."""
    num_pages: int
    """Pages of table 0, which hold all tokens of a sequence."""
    step_tokens: int
    mixed_step_tokens: int
    weights_bytes: int
    kv_cache_bytes: int
    workspace_bytes: int
    expanded_bytes: int = 0
    """Bytes of the weights beyond those in the file, where no kernel reads the form they have there."""
    quant: str = quantization.NONE
    """Result of :func:`neuron.models.quantization.resolve`."""
    native: bool = False
    """Whether it runs on the CPU kernels; ``dtype`` is then the one of weights that the file stores as floats."""
    kv_dtype: str = "auto"
    """Dtype of keys and values in the cache; ``auto``: as ``dtype``."""
    window_tables: tuple[WindowTable, ...] = ()
    """Pages of the layers with each window, never more than ``num_pages``."""
    states: StateSlots | None = None
    """Slots for the states of sequences, where layers keep one."""
    has_draft_head: bool = False
    """Whether the head that drafts tokens is loaded."""
    draft: "MemoryPlan | None" = None
    """Plan of the draft model, beside it on the device."""

    @property
    def tables(self) -> tuple[WindowTable, ...]:
        """Return the page tables beside table 0: of windows that have fewer pages. Other layers share table 0."""
        return tuple(table for table in self.window_tables if table.num_pages < self.num_pages)

    @property
    def pages(self) -> tuple[int, ...]:
        """Return the pages of each page table: of table 0, and of :attr:`tables`."""
        return (self.num_pages, *(table.num_pages for table in self.tables))

    @property
    def cache_sizes(self) -> tuple[int, ...]:
        """Return the pages of table 0, those of each window, and the state slots."""
        num_slots = 0 if self.states is None else self.states.num_slots
        return (self.num_pages, *(table.num_pages for table in self.window_tables), num_slots)

    @property
    def num_hidden(self) -> int:
        """Return the number of hidden states that are kept for a draft head."""
        return hidden_places(self.max_sequences, self.step_tokens + self.sampled_rows) if self.has_draft_head else 0

    @property
    def parts(self) -> "tuple[MemoryPlan, ...]":
        """Return the plan itself and that of the draft model, where there is one."""
        return (self,) if self.draft is None else (self, self.draft)

    @property
    def total_bytes(self) -> int:
        """Return all that the model and its draft model take."""
        return sum(part.weights_bytes + part.kv_cache_bytes + part.workspace_bytes for part in self.parts)


def with_sizes(plan: MemoryPlan, cache_sizes: tuple[int, ...]) -> MemoryPlan:
    """Return ``plan`` with smaller caches: all ranks have as much of each as the one with the least."""
    num_pages, *windows, num_slots = cache_sizes
    window_tables = tuple(
        dataclasses.replace(table, num_pages=count) for table, count in zip(plan.window_tables, windows, strict=True)
    )
    states = None if plan.states is None else dataclasses.replace(plan.states, num_slots=num_slots)
    page_bytes = (plan.kv_cache_bytes - _bytes_of(plan.window_tables, plan.states)) // plan.num_pages
    return dataclasses.replace(
        plan,
        num_pages=num_pages,
        context_tokens=min(plan.context_tokens, num_pages * PAGE_TOKENS),
        max_sequences=plan.max_sequences if states is None else min(plan.max_sequences, num_slots),
        kv_cache_bytes=num_pages * page_bytes + _bytes_of(window_tables, states),
        window_tables=window_tables,
        states=states,
    )


def _bytes_of(tables: Iterable[WindowTable], states: StateSlots | None) -> int:
    state_bytes = 0 if states is None else states.total_bytes
    return state_bytes + sum(table.num_pages * table.page_bytes for table in tables)


@dataclasses.dataclass(frozen=True, slots=True)
class _Costs:
    """Costs of a model: fixed ones, and for each page of its caches."""

    dtype: str
    quant: str
    native: bool
    kv_dtype: str
    weights_bytes: int
    fixed_bytes: int
    page_bytes: Mapping[int, int]
    """Bytes of a page in all layers of each window; 0: those without."""
    gather_bytes: int
    """Bytes of work space for each page: the eager attention gathers one layer's pages before it reads them."""
    state_bytes: int = 0
    """Bytes of a sequence's state in all layers."""


def _costs(
    config: ModelConfig,
    spec: ModelSpec,
    device: str,
    max_sequences: int,
    step_tokens: int,
    shard: Shard,
    cpu_kernels: bool,
) -> _Costs:
    native = _is_native(config, spec, device, shard, cpu_kernels)
    dtype = resolve_dtype(spec.dtype, device)
    quant = quantization.resolve(config, spec.quant, dtype, device, cpu_kernels=cpu_kernels)
    if native and spec.dtype == "auto":
        dtype = "bfloat16"  # the kernels widen bfloat16 where the processor cannot multiply it
    sampled_rows = max(max_sequences, MIN_SAMPLED_ROWS)
    if native:
        rows = max(step_tokens, sampled_rows + PAGE_TOKENS)
        threads = os.cpu_count() or 1
        model = packed.make_model(
            config,
            packed.shapes(config, dtype),
            rows=rows,
            sequences=max_sequences,
            sampled=sampled_rows,
            threads=threads,
        )
        fixed_bytes = model.arena_bytes + sampled_rows * config.vocab_size * SAMPLER_BYTES
        fixed_bytes += 4 * threads * packed.padded(config.vocab_size)  # to draw in
        kv_dtype = dtype if spec.kv_dtype == "auto" else spec.kv_dtype
        page_bytes = _page_bytes(config, lambda cache: packed.page_bytes(cache, kv_dtype))
        weights_bytes = packed.weights_bytes(config, dtype)
        return _Costs(dtype, quant, True, kv_dtype, weights_bytes, fixed_bytes, page_bytes, 0, model.state_bytes)
    fixed_bytes = workspace_bytes(config, dtype, step_tokens, sampled_rows, shard)
    if config.draft_head is not None:
        kept = hidden_places(max_sequences, step_tokens + sampled_rows)
        fixed_bytes += kept * config.hidden_size * DTYPE_BYTES[dtype]
    if device.startswith("cpu") and quant != quantization.NONE:
        fixed_bytes += 8 * quantization.largest_matrix_elements(config)
    weights_bytes = quantization.weights_bytes(config, dtype, quant, shard)
    element_bytes, kv_dtype = DTYPE_BYTES[dtype], dtype if spec.kv_dtype == "auto" else spec.kv_dtype

    def page_bytes_of(cache: Cache) -> int:
        if isinstance(cache, PagedKV) and kv_dtype in ROUNDED:
            return PAGE_TOKENS * cache.rounded_bytes_per_token()
        return PAGE_TOKENS * element_bytes * cache.elements_per_token

    caches = [cache for cache in config.caches(shard) if cache is not None]
    # What is rounded is gathered as codes, then made float32.
    gathered_bytes = element_bytes + (1 + DTYPE_BYTES["float32"] if kv_dtype in ROUNDED else 0)
    return _Costs(
        dtype,
        quant,
        native=False,
        kv_dtype=kv_dtype,
        weights_bytes=weights_bytes,
        fixed_bytes=fixed_bytes,
        page_bytes=_page_bytes(config, page_bytes_of, shard),
        gather_bytes=PAGE_TOKENS * gathered_bytes * max(cache.elements_per_token for cache in caches),
        state_bytes=sum(cache.num_bytes(element_bytes) for cache in caches if isinstance(cache, SequenceState)),
    )


def _is_native(config: ModelConfig, spec: ModelSpec, device: str, shard: Shard, cpu_kernels: bool) -> bool:
    """Return whether a model runs on the CPU kernels."""
    if spec.quant == quantization.NONE and config.tensor_kinds:
        return False  # the kernels keep a file's codes
    return cpu_kernels and device.startswith("cpu") and shard.size == 1 and packed.obstacle(config) is None


def _form_of(costs: _Costs) -> str:
    """Return the form of the weights, for people."""
    if costs.quant == quantization.STORED:
        return "the file's form"
    return costs.dtype if costs.quant == quantization.NONE else costs.quant


def _page_bytes(config: ModelConfig, bytes_of: Callable[[Cache], int], shard: Shard = WHOLE) -> dict[int, int]:
    """Return the bytes of a page in all layers of each window, from the bytes in one layer."""
    caches = config.caches(shard)
    found = dict.fromkeys((0, *windows_of(caches)), 0)
    for cache in caches:
        if cache is not None:
            found[cache.window_tokens] += bytes_of(cache)
    return found


@dataclasses.dataclass(frozen=True, slots=True)
class _CacheSizes:
    """Bytes of the caches of a model, and of its draft model, by number of pages."""

    page_bytes: int
    """Bytes of a page of table 0."""
    window_bytes: Mapping[int, int]
    """Bytes of a page in all layers of each window."""
    step_tokens: int
    state_bytes: int = 0
    """Bytes of a sequence's state in all layers."""
    has_checkpoints: bool = True
    """Whether states are kept for other sequences to resume from."""

    def tables(self, num_pages: int, num_running: int) -> tuple[WindowTable, ...]:
        """Return the pages of each window for ``num_running`` sequences beside ``num_pages`` of table 0."""
        chunks = chunk_pages(self.step_tokens, PAGE_TOKENS)
        return tuple(
            WindowTable(window, min(num_pages, num_running * window_pages(window, PAGE_TOKENS) + chunks), page_bytes)
            for window, page_bytes in self.window_bytes.items()
        )

    def states(self, num_pages: int, num_running: int) -> StateSlots | None:
        """Return the state slots for ``num_running`` sequences beside ``num_pages`` of table 0.

        Checkpoints are so far apart that they take no more bytes than the pages between them, and that no chunk of a
        prompt but the last is cut for one. There are as many as all pages can use.
        """
        if not self.state_bytes:
            return None
        if not self.has_checkpoints:
            return StateSlots(num_running, self.state_bytes)
        interval = step_pages = self.step_tokens // PAGE_TOKENS
        if self.page_bytes:
            interval *= -(-self.state_bytes // (step_pages * self.page_bytes))
        return StateSlots(num_running + num_pages // interval, self.state_bytes, interval)

    def most_running(self, budget_bytes: int, max_sequences: int) -> int:
        """Return the sequences, up to ``max_sequences``, whose states take no more than their share of a budget."""
        if not self.state_bytes:
            return max_sequences
        return min(max_sequences, max(1, int(budget_bytes * RUNNING_SHARE) // self.state_bytes))

    def total(self, num_pages: int, num_running: int, gather_bytes: int = 0) -> int:
        """Return the bytes of all tables and states, and ``gather_bytes`` for each page of table 0."""
        beside_bytes = _bytes_of(self.tables(num_pages, num_running), self.states(num_pages, num_running))
        return num_pages * (self.page_bytes + gather_bytes) + beside_bytes

    def affordable(self, budget_bytes: int, num_running: int, most: int, gather_bytes: int = 0) -> int:
        """Return the pages of table 0, up to ``most``, that ``budget_bytes`` pay for, with what is beside them."""
        key = functools.partial(self.total, num_running=num_running, gather_bytes=gather_bytes)
        return bisect.bisect_right(range(1, most + 1), budget_bytes, key=key)


def plan_memory(
    config: ModelConfig,
    spec: ModelSpec,
    device: str,
    free_bytes: int,
    shard: Shard = WHOLE,
    draft: ModelConfig | None = None,
    *,
    cpu_kernels: bool = True,
) -> MemoryPlan:
    """Return the plan for ``spec`` on ``device`` (``cpu:0``, ``cuda:1``) with ``free_bytes`` free.

    Of a model that several devices hold, the plan of one rank's part; with ``draft``, the draft model has a plan
    in it, of as many pages as table 0. A draft head is left out where the model fits without it alone, or runs on the
    CPU kernels, which have none, and where a draft model takes its place. Raises :class:`DoesNotFitError` if there is
    none, :class:`InvalidRequestError` if the spec contradicts itself, :class:`UnsupportedQuantizationError`.
    """
    if config.draft_head is not None:
        bare = config.without_draft_head()
        if spec.draft_head and draft is None and not _is_native(bare, spec, device, shard, cpu_kernels):
            with contextlib.suppress(DoesNotFitError):
                found = _plan(config, spec, device, free_bytes, shard, None, cpu_kernels)
                return dataclasses.replace(found, has_draft_head=True)
        config = bare
    return _plan(config, spec, device, free_bytes, shard, draft, cpu_kernels)


def _plan(
    config: ModelConfig,
    spec: ModelSpec,
    device: str,
    free_bytes: int,
    shard: Shard,
    draft: ModelConfig | None,
    cpu_kernels: bool,
) -> MemoryPlan:
    defaults = CPU_DEFAULTS if device.startswith("cpu") else CUDA_DEFAULTS
    for name in ("context_tokens", "max_sequences", "kv_cache_bytes"):
        if getattr(spec, name) < 0:
            raise InvalidRequestError(f"{name} is {getattr(spec, name)}; it cannot be negative", param=name)
    if spec.kv_dtype not in {"auto", *ROUNDED}:
        known = ", ".join(("auto", *ROUNDED))
        raise InvalidRequestError(f"kv_dtype is {spec.kv_dtype!r}; it can be {known}", param="kv_dtype")
    if spec.kv_dtype == "fp8" and device.startswith("cpu") and cpu_kernels:
        raise InvalidRequestError("kv_dtype is 'fp8', which is for GPUs; a CPU has 'int8'", param="kv_dtype")
    longest = config.context_tokens if draft is None else min(config.context_tokens, draft.context_tokens)
    if spec.context_tokens > longest:
        made_for = "the model was made" if longest == config.context_tokens else "the draft model was made"
        raise InvalidRequestError(
            f"context_tokens is {spec.context_tokens}; {made_for} for at most {longest}", param="context_tokens"
        )
    if draft is not None and draft.vocab_size > config.vocab_size:
        raise InvalidRequestError(
            f"the draft model has {draft.vocab_size} tokens, the model itself {config.vocab_size}", param="draft"
        )
    if draft is not None and any(isinstance(cache, SequenceState) for cache in draft.caches()):
        raise InvalidRequestError(
            "the draft model keeps a state, which cannot be cut back to the accepted tokens", param="draft"
        )
    max_sequences = spec.max_sequences or defaults.max_sequences
    each = [
        _costs(part, spec, device, max_sequences, defaults.step_tokens, shard, cpu_kernels)
        for part in (config, *([] if draft is None else [draft]))
    ]
    own = each[0]
    weights_bytes, fixed_bytes = sum(c.weights_bytes for c in each), sum(c.fixed_bytes for c in each)
    gather_bytes = sum(c.gather_bytes for c in each)
    # A draft model keeps all tokens, as its cache may lag behind.
    draft_bytes = sum(sum(c.page_bytes.values()) for c in each[1:])
    window_bytes = {window: num_bytes for window, num_bytes in own.page_bytes.items() if window}
    sizes = _CacheSizes(
        own.page_bytes[0] + draft_bytes, window_bytes, defaults.step_tokens, own.state_bytes, spec.prefix_cache
    )
    needed_tokens = spec.context_tokens or min(MIN_CONTEXT_TOKENS, longest)
    needed_pages = -(-needed_tokens // PAGE_TOKENS)
    room_bytes = free_bytes - weights_bytes - fixed_bytes
    if spec.kv_cache_bytes:
        budget_bytes, gathered_bytes = spec.kv_cache_bytes, 0
        most_pages = (
            budget_bytes // sizes.page_bytes if sizes.page_bytes else max_sequences * -(-longest // PAGE_TOKENS)
        )
        if sizes.total(needed_pages, 1) > budget_bytes:
            raise InvalidRequestError(
                f"kv_cache_bytes is {budget_bytes}; {needed_tokens} tokens need {sizes.total(needed_pages, 1)}",
                param="kv_cache_bytes",
            )
    else:
        budget_bytes, gathered_bytes = int(room_bytes * defaults.cache_share), gather_bytes
        most_pages = -(-max(needed_tokens, min(defaults.cache_tokens, max_sequences * longest)) // PAGE_TOKENS)
    most_running = sizes.most_running(budget_bytes, max_sequences)
    num_pages = max(needed_pages, sizes.affordable(budget_bytes, most_running, most_pages, gathered_bytes))
    # Where the tokens asked for leave too little for the windows and states of all sequences, fewer run at a time.
    num_running = max(
        1,
        bisect.bisect_right(
            range(1, max_sequences + 1), budget_bytes, key=lambda count: sizes.total(num_pages, count, gathered_bytes)
        ),
    )
    needed_bytes = sizes.total(num_pages, num_running, gather_bytes)
    states = sizes.states(num_pages, num_running)
    if needed_bytes > room_bytes:
        needs = weights_bytes + fixed_bytes + needed_bytes
        cached = f"{num_pages * PAGE_TOKENS} tokens" + (f" and {states.num_slots} states" if states else "")
        raise DoesNotFitError(
            f"model does not fit on {device}: needs {_gib(needs)}, free {_gib(free_bytes)} (weights in "
            f"{_form_of(own)} {_gib(weights_bytes)}, "
            f"cache for {cached} {_gib(sizes.total(num_pages, num_running))})",
            needs,
        )
    if states is not None:
        max_sequences = min(max_sequences, states.num_slots)
    found: MemoryPlan | None = None
    configs = (config,) if draft is None else (config, draft)
    for part, costs in reversed([*zip(configs, each, strict=True)]):
        expanded = expansions(part, costs.dtype, costs.quant, shard, native=costs.native)
        window_tables = sizes.tables(num_pages, num_running) if costs is own else ()
        page_bytes, own_states = (own.page_bytes[0], states) if costs is own else (draft_bytes, None)
        found = MemoryPlan(
            dtype=costs.dtype,
            context_tokens=spec.context_tokens or min(longest, num_pages * PAGE_TOKENS),
            max_sequences=max_sequences,
            sampled_rows=max(max_sequences, MIN_SAMPLED_ROWS),
            num_pages=num_pages,
            step_tokens=defaults.step_tokens,
            mixed_step_tokens=defaults.mixed_step_tokens,
            weights_bytes=costs.weights_bytes,
            expanded_bytes=sum(expansion.more_bytes for expansion in expanded),
            kv_cache_bytes=num_pages * page_bytes + _bytes_of(window_tables, own_states),
            workspace_bytes=costs.fixed_bytes + num_pages * costs.gather_bytes,
            quant=costs.quant,
            native=costs.native,
            kv_dtype=costs.kv_dtype,
            window_tables=window_tables,
            states=own_states,
            draft=found,
        )
    assert found is not None
    return found


def least_bytes(
    config: ModelConfig,
    spec: ModelSpec,
    device: str,
    shard: Shard = WHOLE,
    draft: ModelConfig | None = None,
    *,
    cpu_kernels: bool = True,
) -> int:
    """Return the fewest free bytes with which :func:`plan_memory` has a plan.

    Raises :class:`InvalidRequestError` likewise.
    """
    try:
        return plan_memory(config, spec, device, 0, shard, draft, cpu_kernels=cpu_kernels).total_bytes
    except DoesNotFitError as error:
        return error.needed_bytes


def workspace_bytes(config: ModelConfig, dtype: str, step_tokens: int, sampled_rows: int, shard: Shard = WHOLE) -> int:
    """Return the bytes of a step, beside weights and cache: its activations, and per sampled row what the sampler has.

    That is float32 logits and probabilities, a float64 running sum, token counts and the prompt's mask.
    """
    activations = step_tokens * config.workspace(shard) * DTYPE_BYTES[dtype]
    return activations + sampled_rows * config.vocab_size * SAMPLER_BYTES


def resolve_dtype(requested: str, device: str) -> str:
    """Return the dtype that a model is computed in; ``auto`` takes the device's fastest.

    On a CPU without bfloat16 instructions torch converts every operand, and float32 is faster; in float16 no CPU path
    of torch is fast (60 GFLOP/s where bfloat16 makes 950), so it is refused there.
    """
    on_cpu = device.startswith("cpu")
    if requested == "auto":
        return "bfloat16" if not on_cpu or cpu_has_bfloat16() else "float32"
    if requested not in DTYPE_BYTES or (on_cpu and requested == "float16"):
        known = [name for name in DTYPE_BYTES if not (on_cpu and name == "float16")]
        raise InvalidRequestError(
            f"dtype {requested!r} is not supported on {device}; supported are auto, {', '.join(known)}", param="dtype"
        )
    return requested


@functools.cache
def cpu_has_bfloat16(cpuinfo: pathlib.Path = pathlib.Path("/proc/cpuinfo")) -> bool:
    """Whether this host multiplies bfloat16 natively."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "").split()
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.1f} GiB"
