"""Model on two GPUs through torch's own NCCL process group: the calls, and their order.

The stub computes nothing; tokens are counted.
"""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import daemons
import pytest

from cortex.wire.node import ModelSpec
from neuron.device import jobs
from neuron.device.channel import ChannelClosed
from neuron.service import NCCL_ENVIRONMENT

HERE = pathlib.Path(__file__).parent
NUM_LAYERS = 2
PROMPT = b"\3\0\0\0" * 20

pytestmark = pytest.mark.stub_cuda


@pytest.fixture(scope="session")
def nccl(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    import nvidia.cu13  # type: ignore[import-not-found]
    import nvidia.nccl  # type: ignore[import-not-found]

    built = tmp_path_factory.mktemp("nccl") / "libnccl-stub.so"  # the real one is loaded too
    folders = [pathlib.Path(next(iter(package.__path__))) / "include" for package in (nvidia.cu13, nvidia.nccl)]
    command = ["gcc", "-shared", "-fPIC", "-O1", "-g", "-Wall", "-Werror", "-fvisibility=hidden"]
    command += [*(f"-I{folder}" for folder in folders), str(HERE / "nccl.c")]
    subprocess.run([*command, "-o", str(built)], check=True)
    return built


def address() -> str:
    return f"127.0.0.1:{daemons.free_port()}"


ALONE = """
import sys, torch
from neuron.device.jobs import GroupSettings
from neuron.engine.group import Group
gpu, stream = torch.device("cuda:0"), torch.cuda.Stream()
with torch.cuda.stream(stream):
    group = Group(GroupSettings(0, 1, sys.argv[1], 20.0), gpu)
    assert group.sum(torch.empty((3, 2), dtype=torch.bfloat16, device=gpu)).shape == (3, 2)
    assert group.gather(torch.empty((2, 3), device=gpu), (3,)).shape == (2, 3)
group.close()
print(hex(stream.cuda_stream))
"""


def test_collectives_are_queued_where_the_step_is(
    library: pathlib.Path, nccl: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    log = tmp_path / "log"
    preloaded = {"LD_PRELOAD": f"{library}:{nccl}", "LD_LIBRARY_PATH": str(library.parent), "STUB_CUDA_LOG": str(log)}
    run = subprocess.run(
        [sys.executable, "-c", ALONE, address()], env={**os.environ, **preloaded}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "WARN" not in run.stderr.upper()
    lines = [line for line in log.read_text().splitlines() if line.startswith("nccl")]
    assert lines[-1] == "nccl abort"
    queued = [line for line in lines if " on " in line]
    assert [line.split()[1] for line in queued] == ["allreduce", "allreduce", "allgather"]
    assert {line.rpartition(" ")[2] for line in queued[1:]} == {run.stdout.strip()}


def loaded(
    start: Callable[..., Any], library: pathlib.Path, nccl: pathlib.Path, limit_s: float = 20.0, **environment: str
) -> list[Any]:
    """Return two workers that hold a model together."""
    where = address()
    ranks = [start(LD_PRELOAD=f"{nccl}:{library}", **environment) for _ in range(2)]
    spec = ModelSpec("m", "test", tensor_parallel=2, dtype="bfloat16", max_sequences=4, context_tokens=512)
    for rank, worker in enumerate(ranks):
        worker.send(jobs.Load(1, spec, str(worker.model), jobs.GroupSettings(rank, 2, where, limit_s)))
    for worker in ranks:
        answer = worker.until(jobs.Done, jobs.JobFailed)
        assert isinstance(answer, jobs.Done), answer
    return ranks


def test_two_workers_serve_a_model(start: Callable[..., Any], library: pathlib.Path, nccl: pathlib.Path) -> None:
    ranks = loaded(start, library, nccl)
    before = len(ranks[0].lines())
    ranks[0].generate(1, 2, temperature=0.0)
    assert ranks[0].tokens == {1: 30, 2: 30}

    def count(what: str) -> int:
        return sum(line.startswith(what) for line in ranks[0].lines()[before:])  # both write to it

    # A sum waits for no rank here, so that one may be behind.
    daemons.until(lambda: count("nccl allgather") >= 2 * 30)
    for worker in reversed(ranks):
        worker.send(jobs.Unload(2, "m"))
        assert isinstance(worker.until(jobs.Done, jobs.JobFailed), jobs.Done)
        assert worker.used_bytes() <= 4 << 20
    assert not count("graph of")
    assert count("nccl allreduce") == 2 * NUM_LAYERS * count("nccl allgather")
    assert count("nccl abort") == 2


def test_a_rank_that_is_gone_ends_the_step_of_the_others(
    start: Callable[..., Any], library: pathlib.Path, nccl: pathlib.Path
) -> None:
    """At the latest when the next plan is sent; before that, the daemon replaces them."""
    ranks = loaded(start, library, nccl)
    ranks[1].send(jobs.Shutdown())
    assert ranks[1].process.wait(30) == 0
    ranks[0].send(jobs.Generate(1, "m", PROMPT, 400, (), jobs.SamplerSettings(temperature=0.0)))
    reason = ranks[0].until(jobs.Poisoned).reason
    assert "a rank of the group was lost in sending a step" in reason
    assert ranks[0].process.wait(30) == jobs.EXIT_POISONED


def test_a_sum_that_never_ends_ends_the_process(
    start: Callable[..., Any], library: pathlib.Path, nccl: pathlib.Path
) -> None:
    """Within the limit and a little, and before any of its tokens are sent."""
    ranks = loaded(start, library, nccl, 3.0, STUB_CUDA_HANG="40", **NCCL_ENVIRONMENT)
    for worker in ranks:
        worker.ends = (-signal.SIGABRT,)
    ranks[0].send(jobs.Generate(1, "m", PROMPT, 400, (), jobs.SamplerSettings(temperature=0.0)))
    last_token_s = time.monotonic()
    with contextlib.suppress(ChannelClosed):
        while True:
            message = ranks[0].receive()
            assert isinstance(message, jobs.Tokens)
            last_token_s = time.monotonic()
    for worker in ranks:
        worker.process.wait(30)
    assert time.monotonic() - last_token_s < 12, "a core dump's time included; by default torch takes a minute more"
    assert 1 < ranks[0].tokens[1] < 20
