"""Frequencies of the rotary embedding, with the checkpoint's scaling.

Plain numbers, for the decoder's tensor and the C executor's table.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from neuron.models.errors import UnsupportedRopeError
from neuron.models.files import quoted


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


def inverse_frequencies(theta: float, head_dim: int, scaling: RopeScaling | None) -> tuple[float, ...]:
    """Return the D/2 angles per position, highest frequency first."""
    plain = tuple(theta ** (-2 * i / head_dim) for i in range(head_dim // 2))
    match scaling:
        case None:
            return plain
        case LinearScaling(factor):
            return tuple(frequency / factor for frequency in plain)
        case FrequencyFactors(factors):
            return tuple(frequency / factor for frequency, factor in zip(plain, factors, strict=True))
        case Llama3Scaling():
            return tuple(_llama3(frequency, scaling) for frequency in plain)


def _llama3(frequency: float, scaling: Llama3Scaling) -> float:
    rotations = scaling.original_context_tokens * frequency / (2 * math.pi)
    ramp = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = min(max(ramp, 0.0), 1.0)
    return frequency * (kept + (1 - kept) / scaling.factor)


def scaling_from(parameters: Mapping[str, Any], where: object) -> RopeScaling | None:
    """Return the scaling that a ``rope_scaling`` or ``rope_parameters`` object of ``config.json`` describes.

    Raises :class:`UnsupportedRopeError` for an unknown kind, or if a number is missing.
    """
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedRopeError(f"{where}: a rotary embedding of part of the head is not supported")
    try:
        if kind == "default":
            return None
        if kind == "linear":
            return LinearScaling(_positive(parameters["factor"]))
        if kind == "llama3":
            scaling = Llama3Scaling(
                factor=_positive(parameters["factor"]),
                low_freq_factor=_positive(parameters["low_freq_factor"]),
                high_freq_factor=_positive(parameters["high_freq_factor"]),
                original_context_tokens=int(_positive(parameters["original_max_position_embeddings"])),
            )
            if scaling.high_freq_factor > scaling.low_freq_factor:
                return scaling
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UnsupportedRopeError(f"{where}: rope scaling {quoted(kind)} has a bad or absent {error}") from error
    raise UnsupportedRopeError(
        f"{where}: rope scaling {quoted(dict(parameters))} is not supported (linear and llama3 are)"
    )


def _positive(value: Any) -> float:
    number = float(value)
    if not 0 < number <= 1e9:
        raise ValueError(f"number {number}")
    return number
