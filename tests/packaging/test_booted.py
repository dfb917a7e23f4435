"""The packages that `make rpm` built, installed into a Debian that systemd boots: the units as they are shipped.

The machine is a container with an init, made of the folder that `make test-ops` has debootstrap fill. Of the units is
changed what the host denies them, limits above its own, and how long a hang may last.
"""

import contextlib
import json
import os
import pathlib
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import daemons
import pytest

BUILD = pathlib.Path(__file__).parents[2] / "build"
PACKAGES = ("cortex", "helexa-neuron")
# Asks, a connection for each answer, until /tmp/enough is there or an answer is lost.
LOAD = """
import http.client, json, pathlib, sys, threading
messages = [{"role": "user", "content": "Hello"}]
body = json.dumps({"model": sys.argv[1], "stream": True, "max_tokens": 8, "messages": messages})
answered, lost = [], []
def ask():
    while not lost and not pathlib.Path("/tmp/enough").exists():
        try:
            client = http.client.HTTPConnection("127.0.0.1", 31313, timeout=60)
            client.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
            reply = client.getresponse()
            body_text = reply.read().decode()
            (answered if reply.status == 200 and "[DONE]" in body_text else lost).append(body_text[-200:])
        except OSError as error:
            lost.append(repr(error))
threads = [threading.Thread(target=ask) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps([len(answered), lost]))
"""


class Machine:
    """A running container."""

    def __init__(self, podman: list[str], name: str) -> None:
        self._podman = podman
        self._name = name

    @contextlib.contextmanager
    def beside(self, *command: str) -> Iterator["subprocess.Popen[str]"]:
        """Run a command until the block is left."""
        asked = [*self._podman, "exec", self._name, *command]
        with subprocess.Popen(asked, stdout=subprocess.PIPE, text=True) as process:
            try:
                yield process
            finally:
                process.kill()

    def run(self, *command: str) -> str:
        """Return the output of a command, which must succeed."""
        done = subprocess.run(
            [*self._podman, "exec", self._name, *command], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
        return done.stdout

    def show(self, unit: str, name: str) -> str:
        return self.run("systemctl", "show", "-P", name, unit).strip()

    def children(self, pid: str) -> list[str]:
        return self.run("cat", f"/proc/{pid}/task/{pid}/children").split()

    def get(self, path: str) -> Any:
        """Ask the gateway."""
        return json.loads(self.run("curl", "--silent", f"http://127.0.0.1:31313{path}"))

    def has_model(self) -> bool:
        return any(found["state"] == "ready" for found in self.get("/v1/models")["data"])


@contextlib.contextmanager
def booted(root: pathlib.Path) -> Iterator[Machine]:
    """Boot the system in a folder."""
    # runc, since it supports every version of cgroups; the limits are those that may be set without asking.
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    podman = [daemons.tool("podman"), "--runtime", daemons.tool("runc")]
    name = f"helexa-{os.getpid()}"
    subprocess.run(
        [*podman, "run", "--detach", "--name", name, "--privileged", "--systemd=always", "--network=none",
         f"--ulimit=nofile={files}:{files}", "--ulimit=nproc=4096:4096", "--rootfs", str(root), "/lib/systemd/systemd"],
        check=True, capture_output=True,
    )  # fmt: skip
    machine = Machine(podman, name)
    try:
        daemons.until(lambda: _is_running(machine), 60, "systemd has booted")
        yield machine
    except BaseException:
        with contextlib.suppress(AssertionError):
            print(machine.run("journalctl", "--no-pager", "--lines=80"))
        raise
    finally:
        subprocess.run([*podman, "rm", "--force", "--time=5", name], check=True, capture_output=True)


def _is_running(machine: Machine) -> bool:
    with contextlib.suppress(AssertionError):
        return machine.run("systemctl", "is-system-running").strip() == "running"
    return False


@pytest.fixture
def root(smollm2_gguf: pathlib.Path) -> Iterator[pathlib.Path]:
    """A system with both packages, as a host has it before its first boot, and weights in the neuron's cache."""
    for tool in ("podman", "runc", "chroot"):
        daemons.tool(tool)
    system = BUILD / "machine" / "root"
    packages = [next((BUILD / "rpm").glob(f"{name}/RPMS/*/*.rpm"), None) for name in PACKAGES]
    if None in packages or not system.exists():
        pytest.skip("there are no packages or no system to put them into; make test-ops makes them")
    if os.geteuid() != 0:
        pytest.skip("only root can boot it")
    with tempfile.TemporaryDirectory() as name:  # gigabytes, which pytest would keep
        root = pathlib.Path(name) / "root"
        subprocess.run(["cp", "--archive", "--reflink=auto", str(system), str(root)], check=True)
        _install(root, [package for package in packages if package is not None])
        cache = root / "var/cache/neuron/weights" / smollm2_gguf.parent.relative_to(smollm2_gguf.parents[2])
        shutil.copytree(smollm2_gguf.parent, cache)
        yield root


def _install(root: pathlib.Path, packages: Sequence[pathlib.Path]) -> None:
    for package in packages:
        shutil.copy(package, root / "tmp")
        # Warns of users that are not there yet: on Debian sysusers.d makes them when it boots.
        installed = ["chroot", str(root), "rpm", "--install", "--nodeps", f"/tmp/{package.name}"]
        subprocess.run(installed, check=True, capture_output=True)
    files, locked = (resource.getrlimit(kind)[1] for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK))
    for name in PACKAGES:
        denied = root / "etc/systemd/system" / f"{name}.service.d" / "denied.conf"
        denied.parent.mkdir(parents=True)
        # A hang is to be seen sooner than after a minute.
        denied.write_text(f"[Service]\nLimitNOFILE={files}\nLimitMEMLOCK={locked}\nWatchdogSec=8s\n")


@pytest.mark.ops
def test_units_start_serve_restart_under_load_and_end(root: pathlib.Path) -> None:
    with booted(root) as machine:
        machine.run("chown", "--recursive", "neuron:neuron", "/var/cache/neuron")
        for path, owner in (("cortex/keys.toml", "640 root cortex"), ("neuron/neuron.toml", "640 root neuron")):
            assert machine.run("stat", "--format=%a %U %G", f"/etc/{path}").strip() == owner
        machine.run("neuron", "--check")
        machine.run("cortex", "serve", "--check")
        machine.run("systemctl", "enable", "--now", "helexa-neuron", "cortex.socket", "cortex")
        daemons.until(machine.has_model, 60, "the model is ready")
        _are_confined(machine)

        with machine.beside("python3", "-c", LOAD, daemons.MODEL) as load:
            for _ in range(6):  # more than many a limit of starts lets pass
                machine.run("systemctl", "restart", "cortex")
            machine.run("touch", "/tmp/enough")
            answered, lost = json.loads(load.communicate(timeout=60)[0])
        assert lost == []
        assert answered > 20

        # The watchdog ends what hangs: a neuron, and the worker of a gateway.
        hung = machine.show("helexa-neuron", "MainPID"), machine.children(machine.show("cortex", "MainPID"))[0]
        for pid in hung:
            machine.run("sh", "-c", f"kill -STOP {pid}")
        for unit in ("helexa-neuron", "cortex"):
            daemons.until(lambda unit=unit: machine.show(unit, "NRestarts") == "1", 60, f"{unit} is restarted")
        daemons.until(machine.has_model, 60, "the model is ready again")

        machine.run("systemctl", "stop", "cortex.socket", "cortex", "helexa-neuron")
        for unit in ("cortex", "helexa-neuron"):
            assert (machine.show(unit, "Result"), machine.show(unit, "ExecMainStatus")) == ("success", "0")
            output = machine.run("journalctl", "--no-pager", f"--unit={unit}")
            assert "Traceback" not in output, output[-4000:]


def _are_confined(machine: Machine) -> None:
    for unit, user in (("cortex", "cortex"), ("helexa-neuron", "neuron")):
        pid = machine.show(unit, "MainPID")
        output = dict(line.split(":\t", 1) for line in machine.run("cat", f"/proc/{pid}/status").splitlines())
        assert output["Uid"].split() == [machine.run("id", "--user", user).strip()] * 4
        assert (int(output["CapBnd"], 16), output["NoNewPrivs"], output["Seccomp"]) == (0, "1", "2")
