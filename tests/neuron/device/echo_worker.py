"""Device worker whose engine repeats the prompt: the loop and the messages are real, the model is not.

Faults are requested by ``ECHO_START`` at the start, by the path of a ``Load`` later.
"""

import argparse
import os
import pathlib
import signal
import subprocess
import sys
import time

import msgspec

from cortex.wire.errors import ErrorInfo
from neuron.device import jobs
from neuron.device.loop import DeviceLoop, die_with_parent

decode = msgspec.msgpack.Decoder(jobs.ToWorker).decode
encode = msgspec.msgpack.Encoder().encode


class Echo:
    def __init__(self, loop: DeviceLoop) -> None:
        self.loop = loop
        self.running: dict[int, jobs.Generate] = {}
        self.given: dict[int, int] = {}
        self.keeps_on = False

    @property
    def busy(self) -> bool:
        return bool(self.running)

    def send(self, message: jobs.FromWorker) -> None:
        self.loop.send(encode(message))

    def handle(self, data: bytes) -> None:
        match decode(data):
            case jobs.Load() as load:
                self.load(load)
            case jobs.Unload(job=job):
                self.send(jobs.Done(job))
            case jobs.QueryMemory(job=job):
                free, total = self.loop.memory()
                self.send(jobs.Done(job, jobs.Memory(total, free, 1)))
            case jobs.Generate(model="broken") as wanted:
                self.send(jobs.SequenceFailed(wanted.sequence, ErrorInfo(422, "seeded", "no such thing")))
            case jobs.Generate() as wanted:
                self.running[wanted.sequence] = wanted
                self.given[wanted.sequence] = 0
            case jobs.Cancel(sequence=sequence):
                if self.running.pop(sequence, None):
                    row = jobs.TokenRow(sequence, b"", jobs.SequenceEnd.CANCELLED)
                    self.send(jobs.Tokens((row,), len(self.running), 0))
            case jobs.Shutdown():
                if not self.keeps_on:
                    self.loop.stop()

    def step(self) -> None:
        """Send each sequence a token of its prompt; end it after the last."""
        rows = []
        for number, wanted in list(self.running.items()):
            at = self.given[number]
            self.given[number] = at + 1
            token = wanted.prompt[4 * at % max(len(wanted.prompt), 1) :][:4]
            last = at + 1 >= wanted.max_tokens
            rows.append(jobs.TokenRow(number, token, jobs.SequenceEnd.LENGTH if last else None, None if at else 0))
            if last:
                del self.running[number]
        self.send(jobs.Tokens(tuple(rows), len(self.running), 0))

    def load(self, load: jobs.Load) -> None:
        match load.path:
            case "progress":
                for fraction in (0.0, 0.5, 1.0):
                    self.send(jobs.Progress(load.job, fraction))
            case "refuse":
                self.send(jobs.JobFailed(load.job, ErrorInfo(422, "does_not_fit", "needs 18.2 GiB, free 15.9 GiB")))
                return
            case "mislead":
                self.send(jobs.Done(load.job))
                return
            case "crash":
                raise KeyError("seeded")
            case "fault":
                self.loop.replay(0x77)
            case "die":
                os.kill(os.getpid(), signal.SIGABRT)
            case "exit":
                os._exit(9)
            case "leave":
                self.loop.stop()
                return
            case "wedge":
                time.sleep(600)
            case "garbage":
                self.loop.send(b"\xc1 no message")
            case "shut":
                os.close(self.loop.channel.fileno())
                time.sleep(600)
            case "deaf":
                self.keeps_on = True
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            case "busy":
                self.send(jobs.Progress(load.job, 0.0))
                time.sleep(600)
            case "parent":
                child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
                pathlib.Path(load.spec.source).write_text(str(child.pid))
        self.send(jobs.Done(load.job, jobs.LoadedModel(load.spec.id, "echo", "none", 64, 8, 1000, 2000)))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", required=True)
    parser.add_argument("--channel-fd", type=int, required=True)
    options = parser.parse_args()
    die_with_parent()
    word, _, detail = os.environ.get("ECHO_START", "").partition(":")
    if word == "count":  # append to a file at each start; fail while it is shorter than so many
        path, _, failures = detail.partition(":")
        with pathlib.Path(path).open("a") as file:
            file.write("x")
        if 1 < pathlib.Path(path).stat().st_size <= 1 + int(failures):
            return 5
    elif word == "exit":
        return int(detail)
    elif word == "sleep":
        time.sleep(600)
    capsule = None
    if options.device.startswith("cuda"):
        from neuron.device import _fake_driver  # type: ignore[attr-defined]

        capsule = _fake_driver.capsule()
        _fake_driver.reset()
        _fake_driver.fail("cuGraphLaunch", 1, 719)
    limit_s = float(os.environ.get("ECHO_LIMIT_S", "0"))
    with DeviceLoop(capsule, 0, options.channel_fd, name="echo", step_limit_s=limit_s) as loop:
        device = "cuda:9" if word == "other" else options.device
        free, total = loop.memory()
        loop.send(encode(jobs.Ready(device, os.getpid(), total, free)))
        return loop.run(Echo(loop))


if __name__ == "__main__":
    sys.exit(main())
