"""The errors of the daemon, beside those every process shares (:mod:`cortex.wire.errors`).

Each has a stable code and an HTTP status; the message says what happened, with the value, and what can be done. Those
of models and of the engine are beside them, since a worker process has no use for these.
"""

from cortex.wire.errors import ApiError, InvalidRequestError, UnavailableError, UnprocessableError


class ListenError(ApiError):
    """The daemon's address is taken, or not of this host."""

    code = "cannot_listen"


# ------------------------------------------------------------------ devices


class DeviceListError(InvalidRequestError):
    """A list of devices does not parse or names one twice."""

    code = "invalid_device"


class UnknownDeviceError(DeviceListError):
    """A device was named that this host does not have."""

    code = "unknown_device"


class NoDeviceError(UnavailableError):
    """No device of this node can take the work."""

    code = "no_device"


class DeviceWorkerLostError(UnavailableError):
    """The process that owned the device ended while it was needed; it is being replaced."""

    code = "device_worker_lost"


class DeviceWorkerNotReadyError(UnavailableError):
    """The process that owns the device takes no work now: it starts, recovers or was stopped."""

    code = "device_worker_not_ready"


# ------------------------------------------------------------------ sources of weights


class InvalidSourceError(InvalidRequestError):
    """A source that is none of the forms this project reads."""

    code = "invalid_source"


class SourceNotFoundError(UnprocessableError):
    """The source names nothing that exists."""

    code = "source_not_found"


class SourceUnavailableError(UnavailableError):
    """The source is not in the cache and could not be downloaded."""

    code = "source_unavailable"


class HashMismatchError(UnprocessableError):
    """What was downloaded is not what was asked for."""

    code = "hash_mismatch"


# ------------------------------------------------------------------ models


class ModelConflictError(UnprocessableError):
    """A model of this name is here already, with another source or limits."""

    code = "model_conflict"


class ModelNotReadyError(UnavailableError):
    """The model is on its way in or out; asking for it to be loaded waits for it."""

    code = "model_not_ready"


class GenerationConflictError(ApiError):
    """An unload means a load of the model that is not here any more."""

    status = 409
    code = "generation_conflict"


class NoRoomError(UnavailableError):
    """The model does not fit beside what is loaded, and nothing may be evicted for it."""

    code = "no_room"


class TooManyModelsError(UnavailableError):
    """The node knows as many models as it keeps, and none of them can be forgotten."""

    code = "too_many_models"


class ModelFailedError(UnavailableError):
    """The model's last load failed; asking for it to be loaded tries again."""

    code = "model_failed"


class AnswerCutError(UnavailableError):
    """The model left before its answer was complete: it was unloaded, or the daemon stopped."""

    code = "answer_cut"

    def __init__(self) -> None:
        super().__init__("The model was unloaded before its answer was complete.", retry_after_s=1.0)


class UnsupportedTokenizerError(UnprocessableError):
    """The files hold no tokenizer this project can rebuild."""

    code = "unsupported_tokenizer"


class NoTemplateError(UnprocessableError):
    """The model has no chat template: it completes text and cannot chat."""

    code = "no_chat_template"


class TemplateError(UnprocessableError):
    """The model's chat template cannot render this conversation."""

    code = "chat_template_failed"


class PromptTooCostlyError(InvalidRequestError):
    """Making tokens of the text takes more time or memory than a request may take."""

    code = "prompt_too_costly"
