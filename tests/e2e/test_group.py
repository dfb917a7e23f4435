"""A model on two workers: the output of one worker, a rank that is killed, a rank that hangs."""

import os
import pathlib
import signal
import time
from collections.abc import Iterator
from typing import Any

import daemons
import httpx
import psutil
import pytest

MODEL = "both"
QUESTION = {
    "messages": [{"role": "user", "content": "What is the capital of France? Then count to thirty."}],
    "temperature": 0,
    "max_tokens": 48,
}


@pytest.fixture(scope="module")
def node(smollm2_gguf: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[daemons.Daemon]:
    """Two workers on this machine's processor, and the real model twice: over both, and on one of them."""
    folder = tmp_path_factory.mktemp("group")
    port = daemons.free_port()
    common = f'source = "{smollm2_gguf}"\ndtype = "float32"\ncontext_tokens = 1024\nmax_sequences = 4\n'
    (folder / "neuron.toml").write_text(
        f'[daemon]\nname = "test"\nlisten = "127.0.0.1:{port}"\ndevices = "cpu:0,cpu:1"\ncollective_limit_s = 4.0\n\n'
        f'[[models]]\nid = "{MODEL}"\ntensor_parallel = 2\n{common}\n'
        f'[[models]]\nid = "one"\ndevices = ["cpu:0"]\n{common}'
    )
    # One worker computes in eager torch too: the kernels' own rounding is not the question.
    environment = {"NEURON_ENGINE__CPU_KERNELS": "false", "OMP_NUM_THREADS": "1"}
    config = ["--config", str(folder / "neuron.toml")]
    with daemons.daemon("neuron", *config, port=port, log=folder / "neuron.log", **environment) as found:
        for name in (MODEL, "one"):
            daemons.until(lambda n=name: daemons.model_state(found, n) == "ready", 120, f"{name} is ready")  # type: ignore[misc]
        yield found


def answer(node: daemons.Daemon, model: str = MODEL) -> str:
    reply = httpx.post(node.url + "/v1/chat/completions", json=QUESTION | {"model": model}, timeout=110)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["message"]["content"])


def worker_of(node: daemons.Daemon, device: str) -> psutil.Process:
    return next(worker for worker in node.workers() if device in worker.cmdline())


def status_of(node: daemons.Daemon) -> Any:
    return next(model for model in node.get("/models")["models"] if model["id"] == MODEL)


def test_two_workers_generate_the_text_of_one(node: daemons.Daemon) -> None:
    text = answer(node)
    assert "Paris" in text
    assert text == answer(node, "one")
    status = status_of(node)
    assert status["devices"] == ["cpu:0", "cpu:1"]
    # A rank has half of all but the embedding and the norms.
    one = next(model for model in node.get("/models")["models"] if model["id"] == "one")
    assert one["weights_bytes"] < status["weights_bytes"] < 1.3 * one["weights_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_costs_the_running_requests_and_no_more(node: daemons.Daemon, blow: signal.Signals) -> None:
    before = answer(node)
    restarts = {worker["device"]: worker["restarts"] for worker in node.get("/health")["workers"]}
    long = QUESTION | {"model": MODEL, "max_tokens": 700, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", node.url + "/v1/chat/completions", json=long, timeout=60) as reply:
        lines = reply.iter_lines()
        for _, line in zip(range(12), lines, strict=False):
            assert "error" not in line
        struck_s = time.monotonic()
        os.kill(worker_of(node, "cpu:1").pid, blow)
        rest = [line for line in lines if line]
    # The death is seen at once; a rank that hangs, when the others have waited for it for so long.
    assert time.monotonic() - struck_s < (8 if blow is signal.SIGKILL else 16)
    assert "device_worker_lost" in rest[-1] or "device_worker_lost" in rest[-2], rest[-3:]
    daemons.until(lambda: daemons.model_state(node, MODEL) == "ready", 90, "the group is back")
    daemons.until(lambda: all(w["state"] == "ready" for w in node.get("/health")["workers"]), 60, "all are back")
    for worker in node.get("/health")["workers"]:
        assert worker["restarts"] == restarts[worker["device"]] + 1
    assert answer(node) == before
