"""Rotary embedding of a model's layers, and its scaling for long contexts, as the fields of its configuration tell.

Names of kinds and keys are those of ``config.json``, as in transformers' ``modeling_rope_utils``; GGUF's are in
:data:`neuron.models.fields.GGUF_KEYS`.
"""

import math
from typing import Any, Final

from neuron.layers.rope import (
    DynamicScaling,
    FrequencyFactors,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    RopeScaling,
    YarnScaling,
    long_amplitude,
    yarn_amplitude,
)
from neuron.models.errors import UnsupportedArchitectureError, UnsupportedRopeError
from neuron.models.fields import FREQUENCY_FACTORS, MAX_ROPE_THETA, NOT_WINDOWED, Fields
from neuron.models.files import quoted

FACTOR: Final[dict[str, Any]] = {"least": 1e-3, "most": 1e4}
"""Range of the factors of contexts and frequencies."""
AMPLITUDE: Final[dict[str, Any]] = {"least": 1e-2, "most": 1e2}
KINDS: Final = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")


def rope_of(
    fields: Fields, head_dim: int, theta: float = 1e4, *, partial: float = 1.0, kind: str = NOT_WINDOWED
) -> Rope:
    """Return the rotary embedding of a kind of layer.

    ``theta`` is its base and ``partial`` the part of a head that is rotated, unless the file has others. Raises as
    :func:`scaling_of`, and ``ValueError`` for sizes that do not fit.
    """
    if (value_dim := fields.size("value_dim", head_dim)) != head_dim:
        raise UnsupportedArchitectureError(
            f"{fields.path}: {fields.key('head_dim')} is {head_dim} and {fields.key('value_dim')} is {value_dim}; "
            "keys and values of different sizes are not supported"
        )
    own = fields.rope_fields(kind)
    base = own.number("rope_theta", theta, least=1.0, most=MAX_ROPE_THETA)
    part = int(head_dim * own.number("partial_rotary_factor", partial, most=1.0))
    return Rope(base, head_dim, scaling_of(own), own.size("rotary_dim", part))


def scaling_of(fields: Fields) -> RopeScaling | None:
    """Return the scaling that ``fields``, of one kind of layers, describe.

    Raises :class:`UnsupportedRopeError` for an unknown kind, :class:`CorruptWeightsError` for a number that is missing
    or out of range.
    """
    if fields.value(FREQUENCY_FACTORS):
        return FrequencyFactors(fields.numbers(FREQUENCY_FACTORS, most=math.inf))
    kind = fields.value("rope_type") or fields.value("type") or "default"
    original = fields.size("original_max_position_embeddings", fields.size("max_position_embeddings"))
    match kind:
        case "default" | "none":
            return None
        case "linear":
            return LinearScaling(fields.number("factor", **FACTOR))
        case "dynamic":
            # Its original context is the one of the configuration: transformers reads no other.
            return DynamicScaling(fields.number("factor", **FACTOR), fields.size("max_position_embeddings"))
        case "llama3":
            low, high = (fields.number(f"{name}_freq_factor", **FACTOR) for name in ("low", "high"))
            if high > low:
                return Llama3Scaling(fields.number("factor", **FACTOR), low, high, original)
        case "yarn":
            return _yarn(fields, original)
        case "longrope" | "su":
            short, long = (fields.numbers(f"{name}_factor", **FACTOR) for name in ("short", "long"))
            amplitude = long_amplitude(_factor(fields, original), original) if original > 1 else 1.0
            return LongRopeScaling(short, long, original, fields.number("attention_factor", amplitude, **AMPLITUDE))
    raise UnsupportedRopeError(
        f"{fields.path}: rope scaling {quoted(kind)} is not supported, or its numbers contradict each other; "
        f"supported are {', '.join(KINDS)}"
    )


def _yarn(fields: Fields, original: int) -> YarnScaling:
    factor = _factor(fields, original)
    weights = [fields.value(key) for key in ("mscale", "mscale_all_dim")]
    if all(weights):
        own, all_dim = (fields.number(key, **AMPLITUDE) for key in ("mscale", "mscale_all_dim"))
        amplitude = yarn_amplitude(factor, own) / yarn_amplitude(factor, all_dim)
    else:
        amplitude = yarn_amplitude(factor)
    return YarnScaling(
        factor,
        original,
        fields.number("attention_factor", amplitude, **AMPLITUDE),
        fast=fields.number("beta_fast", 32.0, **FACTOR),
        slow=fields.number("beta_slow", 1.0, **FACTOR),
        truncates=fields.flag("truncate", True),
    )


def _factor(fields: Fields, original: int) -> float:
    """Return the factor of contexts; where there is no key, by how much they are longer than the original ones."""
    return fields.number("factor", fields.size("max_position_embeddings") / original, **FACTOR)
