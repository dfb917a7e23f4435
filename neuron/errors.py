"""The errors of the daemon, beside the errors that all processes share (:mod:`cortex.wire.errors`).

Each has a stable code and an HTTP status; the message has the cause, the value and the remedy. The errors of models and
of the engine are beside them, since a worker process does not use these.
"""

from cortex.wire.errors import ApiError, InvalidRequestError, UnavailableError, UnprocessableError


class ListenError(ApiError):
    """The daemon's address is in use, or does not belong to this host."""

    code = "cannot_listen"


# ------------------------------------------------------------------ devices


class DeviceListError(InvalidRequestError):
    """A list of devices does not parse or names a device twice."""

    code = "invalid_device"


class UnknownDeviceError(DeviceListError):
    """This host has no such device."""

    code = "unknown_device"


class NoDeviceError(UnavailableError):
    """No device of this node can take the work."""

    code = "no_device"


class DeviceWorkerLostError(UnavailableError):
    """The process that owned the device ended while it was needed; it is being replaced."""

    code = "device_worker_lost"


class DeviceWorkerNotReadyError(UnavailableError):
    """The process that owns the device accepts no work now: it starts, recovers or was stopped."""

    code = "device_worker_not_ready"


# ------------------------------------------------------------------ sources of weights


class InvalidSourceError(InvalidRequestError):
    """The source has none of the supported forms."""

    code = "invalid_source"


class SourceNotFoundError(UnprocessableError):
    """The source names nothing that exists."""

    code = "source_not_found"


class SourceForbiddenError(UnprocessableError):
    """The server of the source refuses it to this node: it needs a token, or does not exist."""

    code = "source_forbidden"


class DiskFullError(UnavailableError):
    """The disk of the cache has no room for the download."""

    code = "disk_full"


class SourceUnavailableError(UnavailableError):
    """The source is not in the cache and could not be downloaded."""

    code = "source_unavailable"


class HashMismatchError(UnprocessableError):
    """The hash of the download is not the expected one."""

    code = "hash_mismatch"


# ------------------------------------------------------------------ models


class ModelConflictError(UnprocessableError):
    """A model of this name is already in the table, with another source or limits."""

    code = "model_conflict"


class ModelNotReadyError(UnavailableError):
    """The model is loading or draining; a load request waits for it."""

    code = "model_not_ready"


class GenerationConflictError(ApiError):
    """An unload names a load of the model that is no longer the last."""

    status = 409
    code = "generation_conflict"


class NoRoomError(UnavailableError):
    """The model does not fit beside the loaded models, and none may be evicted for it."""

    code = "no_room"


class TooManyModelsError(UnavailableError):
    """The table of models is full, and none of them can be forgotten."""

    code = "too_many_models"


class ModelFailedError(UnavailableError):
    """The model's last load failed; a load request retries it."""

    code = "model_failed"


class AnswerCutError(UnavailableError):
    """The model was unloaded, or the daemon stopped, before its answer was complete."""

    code = "answer_cut"

    def __init__(self) -> None:
        super().__init__("The model was unloaded before its answer was complete.", retry_after_s=1.0)


class UnsupportedTokenizerError(UnprocessableError):
    """The files hold no supported tokenizer."""

    code = "unsupported_tokenizer"


class NoTemplateError(UnprocessableError):
    """The model has no chat template: it completes text and cannot chat."""

    code = "no_chat_template"


class TemplateError(UnprocessableError):
    """The model's chat template cannot render this conversation."""

    code = "chat_template_failed"


class PromptTooCostlyError(InvalidRequestError):
    """Tokenising the text takes more time or memory than a request may take."""

    code = "prompt_too_costly"
