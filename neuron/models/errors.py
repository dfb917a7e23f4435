"""What can be wrong with a model: its files, its architecture, its size.

All of these are about the model as asked for, so a client gets 422 and the worker goes on.
"""

from cortex.wire.errors import UnprocessableError


class CorruptWeightsError(UnprocessableError):
    """A weights file is truncated, malformed, or does not hold the tensors that its configuration promises."""

    code = "corrupt_weights"

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.reason = reason


class UnsupportedArchitectureError(UnprocessableError):
    """The model's architecture, or a feature of it, is not one that this engine runs."""

    code = "unsupported_architecture"


class UnsupportedRopeError(UnprocessableError):
    """The model scales its rotary embedding in a way that this engine does not know."""

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
        """Free bytes with which it would fit."""


class LoadFailedError(UnprocessableError):
    """The model's files made a reader of them fail in a way that has no error of its own."""

    code = "load_failed"
