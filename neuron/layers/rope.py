"""Frequencies of the rotary embedding, with the checkpoint's scaling.

Plain numbers, for the decoder's tensor and the C executor's table.
"""

import dataclasses
import math


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
class FrequencyFactors:
    """Divisors of the frequencies: GGUF's form of Llama 3's scaling (``rope_freqs.weight``)."""

    factors: tuple[float, ...]


RopeScaling = LinearScaling | Llama3Scaling | FrequencyFactors


@dataclasses.dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding (arXiv:2104.09864) of heads of ``head_dim``, D. Raises ``ValueError`` if there is none."""

    theta: float
    head_dim: int
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        """Check the sizes."""
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"a rotary embedding needs an even head dimension, not {self.head_dim}")
        if isinstance(self.scaling, FrequencyFactors) and len(self.scaling.factors) != self.head_dim // 2:
            raise ValueError(f"rope_freqs.weight has {len(self.scaling.factors)} numbers, not {self.head_dim // 2}")

    def inverse_frequencies(self) -> tuple[float, ...]:
        """Return the D/2 angles per position, highest frequency first."""
        plain = tuple(self.theta ** (-2 * i / self.head_dim) for i in range(self.head_dim // 2))
        match self.scaling:
            case None:
                return plain
            case LinearScaling(factor):
                return tuple(frequency / factor for frequency in plain)
            case FrequencyFactors(factors):
                return tuple(frequency / factor for frequency, factor in zip(plain, factors, strict=True))
            case Llama3Scaling() as scaling:
                return tuple(_llama3(frequency, scaling) for frequency in plain)


def _llama3(frequency: float, scaling: Llama3Scaling) -> float:
    rotations = scaling.original_context_tokens * frequency / (2 * math.pi)
    ramp = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = min(max(ramp, 0.0), 1.0)
    return frequency * (kept + (1 - kept) / scaling.factor)
