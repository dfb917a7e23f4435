"""The errors of a neuron: each has the HTTP status and the stable code that a client sees."""

from cortex.wire.errors import InvalidRequestError, UnavailableError


class DeviceListError(InvalidRequestError):
    """A list of devices does not parse or names one twice."""

    code = "invalid_device"


class UnknownDeviceError(DeviceListError):
    """A device was named that this host does not have."""

    code = "unknown_device"


class DeviceWorkerLostError(UnavailableError):
    """The process that owned the device ended while it was needed; it is being replaced."""

    code = "device_worker_lost"


class DeviceWorkerNotReadyError(UnavailableError):
    """The process that owns the device takes no work now: it starts, recovers or was stopped."""

    code = "device_worker_not_ready"
