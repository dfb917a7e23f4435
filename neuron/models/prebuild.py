"""Kernels that a model needs on a GPU, and their compilation ahead of time: ``make kernels``.

The forward pass itself runs on ``meta`` tensors while launches are recorded, for every number of rows that could choose
other tiles, so that the list agrees with a step's launches.
"""

import argparse
import contextlib
import dataclasses
import os
import pathlib
import sys
import time
import types
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Final, cast

import torch

from neuron.engine_settings import DEFAULTS, EngineSettings
from neuron.formats.registry import FORMATS
from neuron.formats.schemes import EXAMPLES
from neuron.layers.attention import Attention
from neuron.layers.cache import SequenceState
from neuron.layers.experts import Experts
from neuron.layers.shard import WHOLE, Shard
from neuron.models import decoder, quantization
from neuron.models.config import read_config
from neuron.models.errors import UnsupportedQuantizationError
from neuron.models.gguf import TensorKind
from neuron.models.model import ModelConfig, StoredKind
from neuron.models.sizing import PAGE_TOKENS, MemoryPlan
from neuron.triton_kernels import decode_state, dispatch, sampling
from neuron.triton_kernels.batch import Batch
from neuron.triton_kernels.launch import Variant, recording, target_for, target_of
from neuron.triton_kernels.operations import KERNELS

if TYPE_CHECKING:
    from neuron.models.weights import WeightSource
    from neuron.triton_kernels.compile import Compilation

CAPABILITIES: Final = (80, 89, 90, 100, 120)
STEPS: Final = (1, 2, 16, 17, 64, 65, 256, 257)
"""Representative numbers of tokens of a step: both sides of every row count that launchers compare with."""
FORMS: Final = (quantization.NONE, *FORMATS, *EXAMPLES)
EXPERT_ROWS: Final = (16, 64)
"""Representative numbers of rows of an expert on average."""
POLL_S: Final = 0.001
"""Time that a step of the engine may wait for the compiler; running sequences wait as long."""


def variants(
    config: ModelConfig, plan: MemoryPlan, capability: int, *, shard: Shard = WHOLE, in_group: bool = False
) -> tuple[Variant, ...]:
    """Return every variant that serving the model, or ``shard`` of it, under ``plan`` on a GPU can launch.

    ``in_group``: the outputs of matrices are summed over ranks before the residual, as for any shard.
    """
    dtype = getattr(torch, plan.dtype)
    if dtype == torch.float32:
        return ()
    few, weights = _distinct_layers(config, dtype, plan.quant, shard)
    num_pages = [plan.num_pages + 1] * len(few.caches())
    caches = decoder.new_caches(
        few, num_pages, 2, dtype, lambda shape, kind: _meta(*shape, dtype=kind), shard, plan.kv_dtype
    ).layers
    in_group = in_group or shard.size > 1
    forward = decoder.Decoder(few, weights, KERNELS, (lambda x: x) if in_group else None)
    with recording(target_for(capability)) as recorded:
        for batch in _batches(config, plan):
            token_ids = _meta(len(batch.positions), dtype=torch.int32)
            hidden = forward.hidden(token_ids, [batch] * len(caches), caches)
            if few.draft_head is not None:
                forward.drafted(token_ids, hidden, [batch] * len(caches), caches)
        for rows in sorted({min(n, plan.sampled_rows) for n in (*STEPS, plan.sampled_rows)}):
            forward.logits(_meta(rows, config.hidden_size, dtype=dtype))
        _sample(config, plan)
    return tuple(recorded)


def _sample(config: ModelConfig, plan: MemoryPlan) -> None:
    """Launch the kernels after the logits, with and without changes of logits, and the ends of a captured step."""
    rows, vocab_size = plan.max_sequences, config.vocab_size
    for changes in (False, True):
        asked = sampling.like(rows, vocab_size, plan.max_sequences, changes, _meta)
        KERNELS.sample(_meta(rows, vocab_size, dtype=torch.float32), asked)
    pages = -(-plan.context_tokens // PAGE_TOKENS)
    for num_rows in {1, plan.max_sequences}:
        state = decode_state.like(num_rows, pages, plan.max_sequences, _meta)
        KERNELS.begin_step(state)
        KERNELS.end_step(state, _meta(num_rows, dtype=torch.int32), PAGE_TOKENS)


class Preparation:
    """Preparation of the kernels that a model can launch, while its weights are copied; empty for eager torch.

    It begins at once: kernels in no cache are compiled by up to ``num_processes`` processes, each of which calls
    ``initializer`` first. The caller closes it.
    """

    def __init__(
        self,
        config: ModelConfig,
        plan: MemoryPlan,
        device: torch.device,
        *,
        num_processes: int,
        initializer: Callable[[], None] | None = None,
        shard: Shard = WHOLE,
        settings: EngineSettings = DEFAULTS,
    ) -> None:
        self._device = device
        self._compilation: Compilation | None = None
        if plan.kv_dtype == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
            raise UnsupportedQuantizationError(
                f"{device} cannot convert float8; sm_89 and later can: take kv_dtype = 'int8'", param="kv_dtype"
            )
        dtype = getattr(torch, plan.dtype)
        operations = dispatch.operations_for(device, dtype, triton=settings.triton_kernels)
        if device.type != "cuda" or not operations.by_kernels:
            return
        # Imported here: a host without CUDA may not have the compiler.
        from neuron.triton_kernels import compile

        capability = target_of(device).capability
        wanted = variants(config, plan, capability, shard=shard)
        cache = compile.KernelCache(pathlib.Path(settings.kernel_cache), compile.PREBUILT)
        self._compilation = compile.Compilation(wanted, capability, cache, num_processes, initializer)

    def finish(self, driver_version: tuple[int, int]) -> Generator[None, None, None]:
        """Load all kernels onto the device, one at a time, and forbid compiling from then on.

        Raises as :func:`neuron.triton_kernels.warm.warm`, and
        :class:`neuron.triton_kernels.compile.KernelCompileError`.
        """
        if self._compilation is None:
            return
        from neuron.triton_kernels.warm import allowing_compiles, forbid_compiling, warm

        while not self._compilation.poll(POLL_S):
            yield
        for variant, compiled in self._compilation.results().items():
            with allowing_compiles(), torch.cuda.device(self._device):
                warm(variant, compiled, driver_version)
            yield
        forbid_compiling()

    def close(self) -> None:
        """Stop compiling."""
        if self._compilation is not None:
            self._compilation.close()


def _steps(config: ModelConfig) -> tuple[int, ...]:
    experts = {
        (layer.router.num_experts, layer.router.choices) for layer in config.layers if isinstance(layer, Experts)
    }
    edges = [rows * count // picked for count, picked in experts for rows in EXPERT_ROWS]
    return (*STEPS, *(edge + after for edge in edges for after in (0, 1)))


def _batches(config: ModelConfig, plan: MemoryPlan) -> Iterator[Batch]:
    """Yield steps of decodes alone, of a prompt alone, and of both; where layers keep a state, with drafts too."""
    for num_tokens in sorted({min(n, plan.step_tokens) for n in (*_steps(config), plan.step_tokens)}):
        for num_decodes in dict.fromkeys((min(num_tokens, plan.max_sequences), 1, 0)):
            num_sequences = num_decodes + int(num_tokens > num_decodes)
            if num_sequences:
                yield _batch(plan, num_tokens, num_sequences, num_decodes)
    if any(isinstance(cache, SequenceState) for cache in config.caches()):
        # No kernel of a state depends on the number of tokens.
        replays = _meta(2, dtype=torch.int32)
        yield dataclasses.replace(_batch(plan, 2, 2, 2), replays=replays)
        for accepted in (None, replays):
            yield dataclasses.replace(_batch(plan, 4, 2, 0), num_drafting=1, replays=accepted)


def _batch(plan: MemoryPlan, num_tokens: int, num_sequences: int, num_decodes: int) -> Batch:
    return Batch(
        positions=_meta(num_tokens, dtype=torch.int32),
        slot_mapping=_meta(num_tokens, dtype=torch.int64),
        cu_seqlens=_meta(num_sequences + 1, dtype=torch.int32),
        page_table=_meta(num_sequences, -(-plan.context_tokens // PAGE_TOKENS), dtype=torch.int32),
        context_lens=_meta(num_sequences, dtype=torch.int32),
        num_decodes=num_decodes,
        state_slots=_meta(num_sequences, dtype=torch.int32),
    )


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def weights_on_meta(config: ModelConfig, dtype: torch.dtype, quant: str, shard: Shard) -> decoder.DecoderWeights:
    """Return the weights that a load on a GPU makes, on ``meta``."""
    source = cast("WeightSource", types.SimpleNamespace(config=config))  # of which nothing else is read
    loading = decoder.load_decoder(source, dtype, torch.device("meta"), quant=quant, shard=shard)
    while True:
        try:
            next(loading)
        except StopIteration as finished:
            weights: decoder.DecoderWeights = finished.value
            return weights


def _distinct_layers(
    config: ModelConfig, dtype: torch.dtype, quant: str, shard: Shard
) -> tuple[ModelConfig, decoder.DecoderWeights]:
    """Return the model with one layer of each kind: of window, and of its matrices' forms, on ``meta``."""
    weights = weights_on_meta(config, dtype, quant, shard)
    kinds = {
        (isinstance(layer, Attention) and bool(layer.window_tokens), repr(own)): (layer, own)
        for layer, own in zip(config.layers, weights.layers, strict=True)
    }
    layers, loaded = zip(*kinds.values(), strict=True)
    return dataclasses.replace(config, blocks=(layers,)), dataclasses.replace(weights, layers=loaded)


def any_plan(config: ModelConfig, dtype: str, quant: str = quantization.NONE) -> MemoryPlan:
    """Return a plan with the limits of a large GPU: no variant depends on more than these."""
    return MemoryPlan(
        dtype=dtype,
        context_tokens=config.context_tokens,
        max_sequences=64,
        sampled_rows=64,
        num_pages=4096,
        step_tokens=2048,
        mixed_step_tokens=512,
        weights_bytes=0,
        kv_cache_bytes=0,
        workspace_bytes=0,
        quant=quant,
    )


def _stored_as(config: ModelConfig, form: str) -> tuple[ModelConfig, str]:
    """Return ``config`` as of a file with its matrices in ``form``, and the resulting ``quant``."""
    shapes = {name: shape for name, shape in config.tensor_shapes().items() if len(shape) == 2}
    if form in EXAMPLES:
        kinds: dict[str, StoredKind] = {name: EXAMPLES[form](shape[1]) for name, shape in shapes.items()}
    elif form in TensorKind.__members__:
        kinds = dict.fromkeys(shapes, TensorKind[form])
    else:
        return config, form
    return dataclasses.replace(config, tensor_kinds=kinds), quantization.STORED


def main(arguments: list[str] | None = None) -> int:
    """Compile the kernels of the models whose ``config.json`` folders are named."""
    parser = argparse.ArgumentParser(
        description="Compile the kernels that models need, for GPUs that need not be here."
    )
    parser.add_argument("models", nargs="+", type=pathlib.Path, help="folders with a config.json, or GGUF files")
    parser.add_argument("--capability", type=int, action="append", choices=CAPABILITIES)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--quant", action="append", choices=FORMS, help="forms of the weights; all unless given")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("build/kernels"))
    options = parser.parse_args(arguments)
    from neuron.triton_kernels.compile import Compilation, KernelCache

    cache = KernelCache(options.out)
    for model in options.models:
        found = read_config(model)
        for capability in options.capability or CAPABILITIES:
            start = time.monotonic()
            wanted: dict[Variant, None] = {}
            for form in options.quant or FORMS:
                config, quant = _stored_as(found, form)
                plan = any_plan(config, options.dtype, quant)
                for in_group in (False, True):
                    wanted |= dict.fromkeys(variants(config, plan, capability, in_group=in_group))
            with contextlib.closing(Compilation(wanted, capability, cache, os.cpu_count() or 1)) as compilation:
                compilation.results()
            print(f"{model}: {len(wanted)} kernels for sm_{capability}, {time.monotonic() - start:.0f} s")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
