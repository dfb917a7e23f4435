"""The command ``neuron`` as far as it starts nothing."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request

import pytest
from daemons import free_port, until

from cortex.extras import NEURON_MODULES
from cortex.wire.node import DeviceKind
from neuron import __version__, cli
from neuron.device import probe


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["neuron", *arguments])
    return cli.main()


def test_a_configuration_can_be_checked_without_serving(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "neuron.toml"
    path.write_text('[[models]]\nid = "m"\nsource = "/w"\n')
    assert run(monkeypatch, "--config", str(path), "--check") == 0
    assert capsys.readouterr().out == "neuron: the configuration is right, models: 1\n"
    path.write_text("[daemon]\nlissten = 1\n")
    assert run(monkeypatch, "--config", str(path), "--check") == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"neuron: {path}: daemon.lissten: unknown key\n")


# ------------------------------------------------------------------ devices that are not here


def test_cuda_devices_without_a_gpu_end_with_status_2_and_a_reason() -> None:
    if any(device.kind is DeviceKind.CUDA for device in probe.probe().devices):
        pytest.skip("there is a GPU here")
    command = [str(pathlib.Path(sys.executable).with_name("neuron")), "--devices", "0,1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("neuron: there is no cuda:0 here: ")
    assert "--devices cpu" in done.stderr
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------------ an installation of the gateway alone

GATEWAY_ALONE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
sys.argv = {arguments}
from {module} import main
sys.exit(main())
"""


def gateway_alone(module: str, *arguments: str) -> list[str]:
    """Return a command that runs where what a neuron needs is not installed."""
    hidden = {*NEURON_MODULES, "pynvml", "transformers"}
    code = GATEWAY_ALONE.format(hidden=hidden, arguments=[module.partition(".")[0], *arguments], module=module)
    return [sys.executable, "-P", "-c", code]


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("--check",)])
def test_with_the_gateway_alone_the_command_still_has_help(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        gateway_alone("neuron.cli", *arguments), capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.lower().count("neuron")


def test_with_the_gateway_alone_a_neuron_starts_and_names_what_to_install(tmp_path: pathlib.Path) -> None:
    port, log = free_port(), tmp_path / "log"
    with log.open("wb") as output:
        command = gateway_alone("neuron.cli", "--listen", f"127.0.0.1:{port}")
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, "NEURON_CONFIG": ""})
    try:
        until(lambda: "neuron.service started" in log.read_text(), 60, "it serves")
        asked = urllib.request.Request(
            f"http://127.0.0.1:{port}/models/load",
            json.dumps({"id": "m", "source": "/w"}).encode(),
            {"content-type": "application/json"},
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(asked, timeout=10)
        error = json.loads(refused.value.read())["error"]
        refused.value.close()
        assert (refused.value.code, error["code"]) == (503, "no_harness")
        assert "tokenizers, torch (pip install 'helexa-cortex[neuron]')" in error["message"]
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, log.read_text()
    output = log.read_text()
    assert "no model can be loaded: not installed here: gguf, " in output
    assert f"started version={__version__} at=http://127.0.0.1:{port} " in output
    assert " harnesses=none secret=off" in output
    assert "Traceback" not in output


def test_with_the_gateway_alone_the_demo_names_what_to_install() -> None:
    done = subprocess.run(gateway_alone("cortex.cli", "demo"), capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].endswith("torch, not installed here: pip install 'helexa-cortex[neuron]'")


def test_checked_modules_are_those_of_the_extra() -> None:
    document = tomllib.loads((pathlib.Path(__file__).parents[2] / "pyproject.toml").read_text())
    extra = {re.split("[<>=\\[]", name)[0] for name in document["project"]["optional-dependencies"]["neuron"]}
    assert extra == {*NEURON_MODULES, "nvidia-ml-py"}
