"""Inputs of the attention family, on which its kernels are checked."""

import dataclasses
from collections.abc import Iterator
from typing import Final, NamedTuple

import torch

from neuron.triton_kernels.batch import AttentionParameters, Batch, PagedCache
from neuron.triton_kernels.cache_codes import FORMATS, new_cache, write
from neuron.triton_kernels.launch import target_of
from neuron.triton_kernels.operation import Make
from neuron.triton_kernels.random_batch import PAGE, random_batch
from neuron.triton_kernels.rotary import Rotary, rotary_table, table_of


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionStep:
    """Arguments of the operations of one layer's attention."""

    qkv: torch.Tensor
    q: torch.Tensor
    rotary: Rotary
    cache: PagedCache
    batch: Batch
    parameters: AttentionParameters


class Heads(NamedTuple):
    """Shape of attention: H, K and D, a window, a cap of the scores, and the form of the cache."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int = 0
    soft_cap: float = 0.0
    cache_form: str = "plain"

    def __str__(self) -> str:
        return "H{} K{} D{} window {} cap {:g} {}".format(*self)

    def step(self, make: Make, lengths: list[tuple[int, int]]) -> AttentionStep:
        """Return a step of sequences of (query, context) tokens."""
        batch, num_pages = random_batch(lengths, make.device)
        table = table_of(self.head_dim // 2, make.device)
        return self.over(make, batch, num_pages, rotary_table.eager(batch.positions, table, make.dtype))

    def over(self, make: Make, batch: Batch, num_pages: int, rotary: Rotary) -> AttentionStep:
        """Return the arguments of a step of ``batch``."""
        num_tokens, num_normed = len(batch.positions), self.num_heads + self.num_kv_heads
        cache = self.cache(make, num_pages)
        qk_norm = make(num_normed, self.head_dim) if self.window or make.device.type == "meta" else None
        return AttentionStep(
            qkv=make(num_tokens, (num_normed + self.num_kv_heads) * self.head_dim),
            q=make(num_tokens, self.num_heads, self.head_dim, scale=2),
            rotary=rotary,
            cache=cache,
            batch=batch,
            parameters=AttentionParameters(self.head_dim**-0.5, self.window, self.soft_cap, qk_norm, 1e-6),
        )

    def cache(self, make: Make, num_pages: int) -> PagedCache:
        """Return a cache of random keys and values."""
        shape = num_pages, PAGE, self.num_kv_heads, self.head_dim
        dtype = FORMATS.get(self.cache_form, make.dtype)
        cache = new_cache(shape, dtype, lambda size, dtype: torch.zeros(size, dtype=dtype, device=make.device))
        if make.device.type != "meta":
            slots = torch.arange(num_pages * PAGE, device=make.device)
            write(cache, slots, *(make(num_pages * PAGE, *shape[2:]) for _ in range(2)))
        return cache


HEADS: Final = (
    *(Heads(9, 3, 64, window, cap) for window, cap in ((0, 0.0), (37, 0.0), (0, 5.0))),
    *(Heads(*shape, 9, 20.0) for shape in ((9, 3, 64), (4, 4, 80), (5, 1, 96), (4, 2, 128), (2, 1, 256))),
)
"""Small irregular shapes."""
ROUNDED_HEADS: Final = (
    *(Heads(*shape, cache_form=form) for shape in ((9, 3, 64), (4, 2, 128)) for form in FORMATS),
    *(
        Heads(*shape, 9, 20.0, form)
        for shape, form in (((4, 4, 80), "int8"), ((5, 1, 96), "fp8"), ((2, 1, 256), "int8"))
    ),
)
"""Small irregular shapes over caches that are rounded."""


def real_steps(make: Make) -> Iterator[AttentionStep]:
    """Yield steps of 64 tokens at real models' shapes."""
    for shape in ((9, 3, 64), (32, 32, 80), (32, 32, 96), (32, 8, 128), (8, 4, 256)):
        head_dim = shape[2]
        if make.dtype == torch.float16 and head_dim != 128:
            continue
        batch = Batch(
            positions=make.integers(64),
            slot_mapping=make.integers(64, dtype=torch.int64),
            cu_seqlens=make.integers(65),
            page_table=make.integers(64, 128),
            context_lens=make.integers(64),
        )
        rotary = make(64, 1, head_dim), make(64, 1, head_dim // 2)
        forms = ["plain"]
        if make.dtype == torch.bfloat16:
            forms += [form for form in FORMATS if form != "fp8" or target_of(make.device).capability >= 89]
        for window, cap in ((0, 0.0), (4096, 50.0)) if head_dim in (128, 256) else ((0, 0.0),):
            for form in forms:
                yield Heads(*shape, window, cap, form).over(make, batch, 99, rotary)
