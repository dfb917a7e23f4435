"""A text process: ``python -m neuron.text --channel-fd N --device text:0``.

Started by the daemon with its end of a channel. It does one job at a time, each within the limits that came with it,
and ends with the daemon. What a job does to it is that job's affair: the daemon starts another.
"""

import argparse
import os
import pathlib
import signal
import sys
from typing import Final, assert_never

import msgspec

from cortex.wire.errors import ApiError, InvalidRequestError, UnavailableError
from neuron.device.channel import Channel, ChannelClosed
from neuron.device.loop import die_with_parent
from neuron.text import limits
from neuron.text.jobs import (
    Ask,
    Build,
    Built,
    Check,
    Checked,
    Close,
    Count,
    Counted,
    FromText,
    Job,
    LeftOut,
    Limits,
    Open,
    Opened,
    Phase,
    Ready,
    Refused,
    Retiring,
    Step,
    Tokenise,
    Tokenised,
    ToText,
)
from neuron.text.model_text import ModelText, as_bytes

KEPT_BYTES: Final = 192 << 20
"""A process that holds so much more than after its last model was opened, and cannot give it back, is replaced."""
SEND_TIMEOUT_S: Final = 60.0
TEMPLATE_LIMITS: Final = Limits(cpu_s=3.0, data_bytes=256 << 20)
"""Within which a model's template is to be compiled and to render the least conversation."""


class TextServer:
    """Does jobs that come by ``channel`` until it is closed."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._models: dict[int, ModelText] = {}
        self._decode = msgspec.json.Decoder(ToText).decode
        self._encode = msgspec.msgpack.Encoder().encode
        self._settled_bytes = limits.resident_bytes()

    def run(self) -> None:
        """Serve until the daemon closes its end."""
        self._send(Ready())
        while True:
            try:
                message = self._channel.recv()
            except ChannelClosed:
                return
            job = self._decode(message)
            del message
            if isinstance(job, Close):
                self._models.pop(job.model, None)
                continue
            before = limits.resident_bytes()
            self._send(self._answer(job))
            is_open = isinstance(job, Open)
            del job
            if limits.resident_bytes() - before > limits.GROWN_BYTES:
                limits.give_back()
            if is_open:
                self._settled_bytes = max(self._settled_bytes, limits.resident_bytes())
            elif limits.resident_bytes() - self._settled_bytes > KEPT_BYTES:
                self._send(Retiring())
                return

    def _answer(self, job: Job) -> FromText:
        try:
            with limits.limited(job.limits):
                return self.do(job)
        except ApiError as error:
            return Refused(job.job, error.info())
        except MemoryError:
            return Refused(job.job, InvalidRequestError("The request takes more memory than one may.").info())

    def do(self, job: Job) -> FromText:
        """Do a job, unlimited. Raises :class:`ApiError`."""
        match job:
            case Open():
                path = pathlib.Path(job.path)
                text = ModelText(
                    path,
                    job.num_tokens,
                    job.eos,
                    job.special_tokens_in_text,
                    lambda step: self._announce(job, step),
                    finds_breakpoints=job.finds_breakpoints,
                )
                self._models[job.model] = text
                return Opened(job.job, text.description)
            case Build():
                text = self._model(job.model)
                prompt = text.build(job.request, job.context_tokens)
                return Built(
                    job.job,
                    as_bytes(prompt.ids),
                    prompt.starts_in_reasoning,
                    prompt.ends_reasoning,
                    text.banned(job.request),
                    prompt.breakpoints,
                )
            case Count():
                return Counted(job.job, self._model(job.model).count(job.request, job.context_tokens))
            case Tokenise():
                return Tokenised(job.job, tuple(self._model(job.model).tokenise(job.texts, job.context_tokens)))
            case Check():
                return Checked(job.job, self._model(job.model).grammar(job.request))
            case Ask():
                return LeftOut(job.job, self._model(job.model).left_out(job.request))
            case _:
                assert_never(job)

    def _announce(self, opening: Open, step: Step) -> None:
        if not self._channel.closed:
            self._send(Phase(step))
            limits.allow(TEMPLATE_LIMITS if step is Step.TEMPLATE else opening.limits)

    def _model(self, model: int) -> ModelText:
        found = self._models.get(model)
        if found is None:
            raise UnavailableError("The model's text is not open.", retry_after_s=1.0)
        return found

    def _send(self, message: FromText) -> None:
        self._channel.send(self._encode(message))
        self._channel.flush(SEND_TIMEOUT_S)


def main(arguments: list[str] | None = None) -> int:
    """Serve the daemon; return the exit status."""
    parser = argparse.ArgumentParser(prog="neuron.text", description=__doc__)
    parser.add_argument("--channel-fd", type=int, required=True, help="the inherited end of the daemon's channel")
    parser.add_argument("--device", required=True, help="its name in the daemon's log")
    parser.add_argument("--nice", type=int, default=0, help="niceness to add to the daemon's")
    options = parser.parse_args(arguments)
    os.nice(options.nice)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    limits.prepare()
    TextServer(Channel(options.channel_fd)).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
