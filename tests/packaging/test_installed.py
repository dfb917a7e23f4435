"""The packages that `make rpm` built, unpacked into a folder: both daemons run from there as nobody, without a home."""

import contextlib
import json
import os
import pathlib
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator

import daemons
import pytest

BUILT = pathlib.Path(__file__).parents[2] / "build" / "rpm"


@pytest.fixture
def installed() -> Iterator[pathlib.Path]:
    """The unpacked tree, where everybody may read it."""
    for name in ("rpm2cpio", "cpio"):
        daemons.tool(name)
    packages = [next(BUILT.glob(f"{name}/RPMS/*/*.rpm"), None) for name in ("cortex", "helexa-neuron")]
    if None in packages:
        pytest.skip("the packages are not built; make rpm builds them")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        folder.chmod(0o755)
        for package in packages:
            subprocess.run(f"rpm2cpio {package} | cpio -idmu --quiet", shell=True, cwd=folder, check=True)
        for path in folder.joinpath("usr", "bin").iterdir():  # the place is written into them
            path.write_text(path.read_text().replace('="/usr', f'="{folder}/usr'))
        yield folder


@contextlib.contextmanager
def run(folder: pathlib.Path, name: str, port: int, own: pathlib.Path, **environment: str) -> Iterator[daemons.Daemon]:
    """Run a command of the tree as nobody, with an environment of nothing but what is given; it ends by itself."""
    nobody = pwd.getpwnam("nobody") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
    log = own / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(folder / "usr" / "bin" / name), *(["serve"] if name == "cortex" else [])],
            env={"PATH": "/usr/bin:/bin", **environment},
            cwd="/", user=nobody.pw_uid, group=nobody.pw_gid, extra_groups=[],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        )  # fmt: skip
    found = daemons.Daemon(process, port, log)
    try:
        daemons.until(lambda: found.get("/health"), daemons.START_TIMEOUT_S, f"{name} serves")
        yield found
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait(daemons.STOP_TIMEOUT_S)
    assert status == 0, log.read_text()[-4000:]


@pytest.mark.ops
def test_installed_daemons_serve_a_chat_as_nobody_without_a_home(
    installed: pathlib.Path, smollm2_gguf: pathlib.Path
) -> None:
    own = installed / "of-nobody"
    own.mkdir()
    weights = own / "model.gguf"
    shutil.copy(smollm2_gguf, weights)
    shutil.copy(installed / "etc" / "cortex" / "cortex.toml", own)
    (own / "models.toml").write_text("")
    for path in (own, *own.iterdir()):
        shutil.chown(path, "nobody")
    port, gateway_port = daemons.free_port(), daemons.free_port()
    neuron = {
        "NEURON_DAEMON__LISTEN": f"127.0.0.1:{port}",
        "NEURON_DAEMON__DEVICES": "cpu",
        "NEURON_MODELS": json.dumps([{"id": daemons.MODEL, "source": str(weights)}]),
        "NEURON_DAEMON__CACHE": str(own / "cache"),
    }
    cortex = {
        "CORTEX_CONFIG": str(own / "cortex.toml"),
        "CORTEX_GATEWAY__LISTEN": f"127.0.0.1:{gateway_port}",
        "CORTEX_GATEWAY__METRICS_LISTEN": "",
        "CORTEX_NEURONS": json.dumps([{"name": "a", "endpoint": f"http://127.0.0.1:{port}"}]),
        "STATE_DIRECTORY": str(own),
    }
    with (
        run(installed, "neuron", port, own, **neuron) as node,
        run(installed, "cortex", gateway_port, own, **cortex) as at,
    ):
        daemons.until(lambda: daemons.model_state(node) == "ready", daemons.START_TIMEOUT_S, "the model is ready")
        daemons.until(lambda: (at.get("/v1/models") or {}).get("data"), 20, "the catalogue")
        messages = [{"role": "user", "content": "Name the capital of France."}]
        with at.client() as client:
            body = {"model": daemons.MODEL, "messages": messages, "temperature": 0, "max_tokens": 24}
            reply = client.post(f"{at.url}/v1/chat/completions", json=body).json()
        assert "Paris" in reply["choices"][0]["message"]["content"], reply
