"""The same loop over the driver of this machine."""

import pytest

from neuron.device.channel import Channel, socket_pair
from neuron.device.driver import DriverError, DriverNotFoundError, cuda_driver
from neuron.device.loop import DeviceLoop
from neuron.device.probe import probe

pytestmark = pytest.mark.gpu


@pytest.fixture
def driver() -> object:
    try:
        return cuda_driver()
    except DriverNotFoundError as error:
        pytest.skip(str(error))


def test_a_device_is_taken_and_given_back(driver: object) -> None:
    ours, theirs = socket_pair()
    daemon = Channel(ours)
    with DeviceLoop(driver, 0, theirs, name="cuda-dev-0") as loop:  # type: ignore[arg-type]
        free, total = loop.memory()
        assert 0 < free <= total
        assert loop.stream != 0
        assert loop.driver.version() >= (11, 0)
        assert loop.driver.device_name(loop.driver.device(0)) == probe().devices[0].name
    assert (loop.driver.num_contexts, loop.driver.num_streams, loop.driver.num_events) == (0, 0, 0)
    daemon.close()


def test_a_device_that_is_not_there(driver: object) -> None:
    ours, theirs = socket_pair()
    daemon = Channel(ours)
    with pytest.raises(DriverError, match=r"cuDeviceGet returned 101 \(CUDA_ERROR_INVALID_DEVICE\)"):
        DeviceLoop(driver, 999, theirs, name="cuda-dev-999")  # type: ignore[arg-type]
    daemon.close()
