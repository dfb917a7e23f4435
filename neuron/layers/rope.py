"""Rotary embedding of a head (arXiv:2104.09864): its angles, with the scaling, and the order of its elements.

Kernels rotate the pairs (i, i + D/2) of a head of D elements, each by an angle and a factor of its own. All other forms
are brought into this one: the pairs that a model leaves alone have angle 0 and factor 1, and where a checkpoint has
other pairs, the rows of its queries and keys are read in another order, which does not change their products. Plain
numbers, for the decoder's tensor and the C executor's table.
"""

import dataclasses
import math
from typing import Final

MAX_CONTEXT_TOKENS: Final = (1 << 31) - 1
"""Bound on a context, whose positions are int32."""


@dataclasses.dataclass(frozen=True, slots=True)
class LinearScaling:
    """Scaling of all frequencies by 1 / ``factor`` (position interpolation, arXiv:2306.15595)."""

    factor: float


@dataclasses.dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Scaling of low frequencies by 1 / ``factor``, with a ramp to the unscaled high ones (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context_tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class YarnScaling:
    """Scaling of low frequencies by 1 / ``factor``, with a ramp over the pairs to the unscaled high ones.

    YaRN, arXiv:2309.00071. The ramp is between the pairs that rotate ``slow`` and ``fast`` times in the original
    context.
    """

    factor: float
    original_context_tokens: int
    amplitude: float
    """Factor of cosines and sines, whose square scales the scores."""
    fast: float = 32.0
    slow: float = 1.0
    truncates: bool = True
    """Whether the ends of the ramp are whole pairs."""


@dataclasses.dataclass(frozen=True, slots=True)
class DynamicScaling:
    """Growth of the base with the context beyond the original one ("dynamic NTK", https://reddit.com/comments/14mrgpr)."""

    factor: float
    original_context_tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class LongRopeScaling:
    """Divisors of the frequencies: ``short`` ones in the original context, ``long`` ones beyond (arXiv:2402.13753)."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_context_tokens: int
    amplitude: float
    """Factor of cosines and sines."""


@dataclasses.dataclass(frozen=True, slots=True)
class FrequencyFactors:
    """Divisors of the frequencies: GGUF's form of Llama 3's scaling (``rope_freqs.weight``)."""

    factors: tuple[float, ...]


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | DynamicScaling | LongRopeScaling | FrequencyFactors


@dataclasses.dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding of heads of ``head_dim``, D. Raises ``ValueError`` for sizes that do not fit."""

    theta: float
    head_dim: int
    scaling: RopeScaling | None = None
    rotary_dim: int = -1
    """Number of a head's first elements that are rotated, R: as pairs (i, i + R/2); 0: no position is told, -1: all."""
    context_tokens: int = 0
    """Context that the model is loaded for, on which some scalings depend; 0: the original one."""

    def __post_init__(self) -> None:
        """Check the sizes."""
        if self.rotary_dim < 0:
            object.__setattr__(self, "rotary_dim", self.head_dim)
        if self.head_dim < 2 or self.head_dim % 2 or self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ValueError(f"a rotary embedding of {self.rotary_dim} of {self.head_dim} elements is impossible")
        half = self.rotary_dim // 2
        match self.scaling:
            case FrequencyFactors(factors) if len(factors) != half:
                raise ValueError(f"rope_freqs.weight has {len(factors)} numbers, not {half}")
            case LongRopeScaling(short, long) if len(short) != half or len(long) != half:
                raise ValueError(f"longrope has {len(short)} short and {len(long)} long factors, not {half}")
            case YarnScaling() if self.theta <= 1:
                raise ValueError(f"YaRN has no ramp for rope_theta {self.theta}")
            case DynamicScaling() if self.rotary_dim < 4:
                raise ValueError(f"the base of {self.rotary_dim} rotated elements cannot grow")

    @property
    def longest_tokens(self) -> int:
        """Longest context that the scaling is made for; 0: it does not tell."""
        match self.scaling:
            case YarnScaling(factor, original) | DynamicScaling(factor, original):
                return min(int(factor * original), MAX_CONTEXT_TOKENS)
            case _:
                return 0

    def within(self, context_tokens: int) -> "Rope":
        """Return the embedding of a model that is loaded for contexts of so many tokens."""
        if not isinstance(self.scaling, (DynamicScaling, LongRopeScaling)):
            return self
        return dataclasses.replace(self, context_tokens=context_tokens)

    def table(self) -> tuple[float, ...]:
        """Return for each of a head's D/2 pairs the angle per position, and behind these for each pair the factor."""
        half = self.rotary_dim // 2
        amplitude = self.scaling.amplitude if isinstance(self.scaling, (YarnScaling, LongRopeScaling)) else 1.0
        left = self.head_dim // 2 - half
        return (*self._angles(), *[0.0] * left, *[amplitude] * half, *[1.0] * left)

    def order(self, *, adjacent: bool = False) -> tuple[int, ...]:
        """Return the row of a stored head for each of its elements here; nothing if they are the same.

        ``adjacent``: rotated pairs are stored as (2i, 2i + 1).
        """
        half, left = self.rotary_dim // 2, list(range(self.rotary_dim, self.head_dim))
        pairs = [(2 * i, 2 * i + 1) if adjacent else (i, i + half) for i in range(half)]
        pairs += list(zip(left[: len(left) // 2], left[len(left) // 2 :], strict=True))
        order = tuple(row for column in zip(*pairs, strict=True) for row in column)
        return () if order == tuple(range(self.head_dim)) else order

    def _angles(self) -> tuple[float, ...]:
        """Return the angle per position of each rotated pair, highest frequency first."""
        plain = _frequencies(self.theta, self.rotary_dim)
        match self.scaling:
            case None:
                return plain
            case LinearScaling(factor):
                return tuple(frequency / factor for frequency in plain)
            case FrequencyFactors(factors):
                return tuple(frequency / factor for frequency, factor in zip(plain, factors, strict=True))
            case Llama3Scaling() as scaling:
                return tuple(_llama3(frequency, scaling) for frequency in plain)
            case YarnScaling() as scaling:
                return _yarn(plain, self.theta, scaling)
            case LongRopeScaling(short, long, original):
                factors = long if self.context_tokens > original else short
                return tuple(frequency / factor for frequency, factor in zip(plain, factors, strict=True))
            case DynamicScaling(factor, original):
                growth = factor * max(self.context_tokens, original) / original - (factor - 1)
                theta = self.theta * growth ** (self.rotary_dim / (self.rotary_dim - 2))
                return _frequencies(theta, self.rotary_dim)


def yarn_amplitude(factor: float, weight: float = 1.0) -> float:
    """Return the factor of cosines and sines that YaRN recommends (its equation 22)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def long_amplitude(factor: float, original_context_tokens: int) -> float:
    """Return the factor of cosines and sines of longrope, whose contexts are ``factor`` times the original."""
    return math.sqrt(1 + math.log(factor) / math.log(original_context_tokens)) if factor > 1 else 1.0


def _frequencies(theta: float, rotary_dim: int) -> tuple[float, ...]:
    return tuple(theta ** (-2 * i / rotary_dim) for i in range(rotary_dim // 2))


def _llama3(frequency: float, scaling: Llama3Scaling) -> float:
    rotations = scaling.original_context_tokens * frequency / (2 * math.pi)
    ramp = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = min(max(ramp, 0.0), 1.0)
    return frequency * (kept + (1 - kept) / scaling.factor)


def _yarn(plain: tuple[float, ...], theta: float, scaling: YarnScaling) -> tuple[float, ...]:
    dim = 2 * len(plain)

    def pair(rotations: float) -> float:
        """Return the number of the pair that rotates so often in the original context."""
        return dim * math.log(scaling.original_context_tokens / (2 * math.pi * rotations)) / (2 * math.log(theta))

    low, high = pair(scaling.fast), pair(scaling.slow)
    if scaling.truncates:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001
    found = []
    for i, frequency in enumerate(plain):
        scaled = min(max((i - low) / width, 0.0), 1.0)
        found.append(frequency * (1 - scaled + scaled / scaling.factor))
    return tuple(found)
