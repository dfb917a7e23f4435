"""Errors of a model: its files, its architecture, its size.

All of them concern the requested model, so a client gets 422 and the worker goes on.
"""

from cortex.wire.errors import UnprocessableError


class CorruptWeightsError(UnprocessableError):
    """A weights file is truncated, malformed, or lacks tensors of its configuration."""

    code = "corrupt_weights"

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.reason = reason


class UnsupportedArchitectureError(UnprocessableError):
    """The model's architecture, or a feature of it, is not supported."""

    code = "unsupported_architecture"


class UnsupportedRopeError(UnprocessableError):
    """The scaling of the rotary embedding is not supported."""

    code = "unsupported_rope"


class UnsupportedQuantizationError(UnprocessableError):
    """A tensor is stored in a format that cannot be dequantised here."""

    code = "unsupported_quantization"


class DoesNotFitError(UnprocessableError):
    """The model needs more memory than its device has free, or asks for more context than the model has."""

    code = "model_does_not_fit"

    def __init__(self, message: str, needed_bytes: int = 0) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes
        """Number of free bytes with which it would fit."""


class LoadFailedError(UnprocessableError):
    """A reader of the model's files failed with an unexpected error."""

    code = "load_failed"
