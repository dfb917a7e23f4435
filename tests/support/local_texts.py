"""The text side of models in the test's own process: the daemon's text processes without their limits."""

from typing import Any, cast

from cortex.wire.errors import ApiError, RemoteError
from neuron.device.channel import Channel
from neuron.text import jobs
from neuron.text.__main__ import TextServer
from neuron.text.pool import QueueName, TextPool


class _NoChannel:
    closed = True

    def send(self, message: bytes) -> None:
        pass

    def flush(self, timeout_s: float) -> None:
        pass


class LocalTexts(TextPool):
    """A pool without processes; works in any event loop."""

    def __init__(self) -> None:
        super().__init__()
        self._server = TextServer(cast(Channel, _NoChannel()))

    async def run(
        self, queue: QueueName, job: jobs.Job, opening: jobs.Open, principal: str = "", data: bytes | None = None
    ) -> Any:
        try:
            return self._server.do(job)
        except ApiError as error:
            raise RemoteError(error.info()) from error
