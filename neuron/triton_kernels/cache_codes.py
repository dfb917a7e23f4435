"""Keys and values in the paged cache: as they are, or rounded to 8 bits with a scale for each token and head.

``code = round(x / scale)``, ``scale = max |x| / largest code`` over a head's D elements, for int8 and float8 e4m3. A
token is rounded once, when it is written. Scores and weights are multiplied by the scales, so no product is rounded:
bfloat16 holds every code exactly.
"""

from collections.abc import Callable
from typing import Final

import torch

from neuron.triton_kernels._triton import tl, triton
from neuron.triton_kernels.batch import PagedCache

FORMATS: Final = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""Dtypes of the codes by the formats' names."""
LARGEST: Final = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Largest code of each dtype."""
LEAST_SCALE: Final = 1e-12


def new_cache(
    shape: tuple[int, int, int, int], dtype: torch.dtype, make: Callable[[tuple[int, ...], torch.dtype], torch.Tensor]
) -> PagedCache:
    """Return a cache of ``shape`` ``[P, page_size, K, D]`` in ``dtype``, of tensors by ``make``."""
    pools = make(shape, dtype), make(shape, dtype)
    if dtype not in LARGEST:
        return PagedCache(*pools)
    num_pages, page_size, num_kv_heads, _ = shape
    scales = num_pages, num_kv_heads, page_size
    return PagedCache(*pools, make(scales, torch.float32), make(scales, torch.float32))


def write(cache: PagedCache, slot_mapping: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Write ``keys`` and ``values`` ``[T, K, D]`` to the slots ``[T]`` int64."""
    page_size = cache.keys.shape[1]
    for pool, scales, x in ((cache.keys, cache.key_scales, keys), (cache.values, cache.value_scales, values)):
        slots = pool.view(-1, *pool.shape[2:])
        if scales is None:
            slots.index_copy_(0, slot_mapping, x)
            continue
        codes, own = _rounded(x, pool.dtype)
        slots.view(torch.int8).index_copy_(0, slot_mapping, codes.view(torch.int8))
        scales[slot_mapping // page_size, :, slot_mapping % page_size] = own


def read(cache: PagedCache, pages: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys and the values of ``pages`` ``[N]`` in ``dtype``, ``[N, page_size, K, D]`` each."""

    def pool(codes: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
        if scales is None:
            return codes.index_select(0, pages).to(dtype)
        found = codes.view(torch.int8).index_select(0, pages).view(codes.dtype).float()
        return found.mul_(scales.index_select(0, pages).transpose(1, 2).unsqueeze(-1)).to(dtype)

    return pool(cache.keys, cache.key_scales), pool(cache.values, cache.value_scales)


def _rounded(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes of ``x`` ``[T, K, D]`` and their scales ``[T, K]``."""
    wide, largest = x.float(), LARGEST[dtype]
    scales = (wide.abs().amax(-1) / largest).clamp_(min=LEAST_SCALE)
    scaled = wide / scales.unsqueeze(-1)
    # Float8 by way of half, as in the kernels.
    codes = scaled.add_(0.5).floor_() if dtype == torch.int8 else scaled.div_(256).half().float().mul_(256)
    return codes.to(dtype), scales


@triton.jit
def scale_of(largest_magnitude, total, TYPE: tl.constexpr):
    """Return the scale of heads by their largest magnitude, NaN where the sum of their elements is not finite."""
    largest: tl.constexpr = 127.0 if tl.int8 == TYPE else 448.0
    # A maximum passes over NaN, which no code can hold: it must reach whoever reads the token.
    return tl.maximum(largest_magnitude / largest, 1e-12) + total * 0.0


@triton.jit
def codes_of(scaled, TYPE: tl.constexpr):
    """Return the codes of elements that are divided by their scale."""
    if tl.int8 == TYPE:
        codes = tl.floor(scaled + 0.5).to(tl.int8)
    else:
        # The bits of float8 are those of a half of the 256th part with three bits of mantissa, rounded to even.
        half = (scaled / 256.0).to(tl.float16).to(tl.uint16, bitcast=True)
        magnitude = half & 0x7FFF
        rounded = (magnitude + 0x3F + ((magnitude >> 7) & 1)) >> 7
        codes = (rounded | ((half >> 8) & 0x80)).to(tl.uint8).to(TYPE, bitcast=True)
    return codes
