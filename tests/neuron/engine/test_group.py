"""Several ranks of one model: their messages, and the same results as one."""

import array
import asyncio
import concurrent.futures
import dataclasses
import datetime
import pathlib
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import numpy as np
import psutil
import pytest
import torch
from local_texts import LocalTexts

from cortex.wire.errors import ApiError, UnprocessableError
from cortex.wire.node import ModelSpec
from neuron.device.jobs import Generate, GroupSettings, SamplerSettings, TokenRow
from neuron.device.worker import Worker
from neuron.engine.errors import GroupLostError
from neuron.engine.group import Cleared, Group, Planned, plan_of, rank_0_waits
from neuron.engine.plan import StepPlan
from neuron.errors import NoDeviceError
from neuron.models.errors import DoesNotFitError
from neuron.torch_harness import TorchHarness

HOST = torch.device("cpu")
Result = TypeVar("Result")


def address() -> str:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{trial.getsockname()[1]}"


def together(size: int, work: Callable[[Group], Any], limit_s: float = 20.0) -> list[Any]:
    """Run ``work`` as each rank, on threads; return what each returned."""
    where = address()

    def run(rank: int) -> Any:
        group = Group(GroupSettings(rank, size, where, limit_s), HOST)
        try:
            return work(group)
        finally:
            group.close()

    with concurrent.futures.ThreadPoolExecutor(size) as ranks:
        return list(ranks.map(run, range(size)))


def test_sums_gathers_and_least() -> None:
    def work(group: Group) -> tuple[torch.Tensor, torch.Tensor, int]:
        total = group.sum(torch.full((3, 2), 10.0**group.rank))
        widths = (3, 2, 2)
        part = torch.full((2, widths[group.rank]), float(group.rank))
        return total, group.gather(part, widths), group.least(7 - group.rank)

    for total, gathered, least in together(3, work):
        assert total.tolist() == [[111.0, 111.0]] * 3
        assert gathered.tolist() == [[0, 0, 0, 1, 1, 2, 2]] * 2
        assert least == 5


def plan() -> StepPlan:
    fields = dataclasses.fields(StepPlan)
    arrays = {field.name: np.arange(5, dtype=np.int32) for field in fields}
    arrays["page_tables"] = np.arange(24, dtype=np.int32).reshape(2, 3, 4)[:, :, :3]
    return StepPlan(**{**arrays, "num_decodes": 3})  # type: ignore[arg-type]


def test_messages_of_rank_0_arrive() -> None:
    sent = plan()

    def work(group: Group) -> list[Any]:
        if group.rank:
            found = []
            while (message := group.receive()) is not None:
                found.append(message)
            return found
        group.send(sent)
        group.send((np.array([4, 2], np.int32), np.array([3], np.int32)))
        return []

    for step, cleared in together(3, work)[1:]:
        assert isinstance(step, Planned)
        assert isinstance(cleared, Cleared)
        assert [np.frombuffer(pages, np.int32).tolist() for pages in cleared.tables] == [[4, 2], [3]]
        for field in dataclasses.fields(StepPlan):
            found, expected = getattr(plan_of(step), field.name), getattr(sent, field.name)
            assert np.array_equal(found, expected), field.name


def test_a_missing_rank_is_an_error() -> None:
    start = time.monotonic()
    with pytest.raises(GroupLostError, match="lost in meeting the other ranks"):
        Group(GroupSettings(0, 2, address(), 0.5), HOST)
    assert time.monotonic() - start < 5


def test_a_rank_that_leaves_or_hangs_is_noticed() -> None:
    gone = threading.Event()

    def work(group: Group) -> float:
        if group.rank:
            gone.wait(10)
            return 0.0
        start = time.monotonic()
        with pytest.raises(GroupLostError, match="lost in a sum"):
            group.sum(torch.ones(1))
        gone.set()
        return time.monotonic() - start

    assert 0.5 < together(2, work, limit_s=1.0)[0] < 5


def test_a_stranger_gets_no_plans() -> None:
    where = address()

    def run(rank: int) -> bool:
        if rank:
            host, _, port = where.partition(":")
            store = torch.distributed.TCPStore(host, int(port), is_master=False, timeout=datetime.timedelta(seconds=20))
            plans = int(store.get("plans").decode().partition(" ")[0])
            with socket.create_connection((host, plans), 10) as link:
                link.sendall(bytes(16))  # the wrong token
        group = Group(GroupSettings(rank, 2, where, 20.0), HOST)
        if rank:
            found = group.receive() == Cleared((np.array([1], np.int32).tobytes(),))
        else:
            group.send((np.array([1], np.int32),))
            found = len(group._sockets) == 1
        group.close()
        return found

    with concurrent.futures.ThreadPoolExecutor(2) as ranks:
        assert list(ranks.map(run, range(2))) == [True, True]


def test_ranks_listen_where_they_reach_each_other_and_nowhere_else() -> None:
    def listening() -> set[tuple[str, int]]:
        found = psutil.Process().net_connections("tcp")
        return {(link.laddr.ip, link.laddr.port) for link in found if link.status == psutil.CONN_LISTEN}

    before = listening()
    opened = together(2, lambda group: (group.least(0), listening() - before)[1])
    assert {host for host, _ in opened[0] | opened[1]} == {"127.0.0.1"}


def test_rank_0_is_found_once_it_waits() -> None:
    where = address()
    second = GroupSettings(1, 2, where, 20.0)
    assert not rank_0_waits(second)

    def follow() -> int:
        while not rank_0_waits(second):
            pass
        group = Group(second, HOST)
        found = group.least(7)
        group.close()
        return found

    with concurrent.futures.ThreadPoolExecutor(1) as other:
        following = other.submit(follow)
        group = Group(GroupSettings(0, 2, where, 20.0), HOST)
        assert group.least(8) == following.result() == 7
        group.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_nccl_takes_the_arguments_of_gloo() -> None:
    """Run a single rank, the most on one GPU."""
    gpu = torch.device("cuda:0")
    group = Group(GroupSettings(0, 1, address(), 20.0), gpu)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert group.sum(torch.full((3, 2), 7.0, dtype=torch.bfloat16, device=gpu)).tolist() == [[7.0, 7.0]] * 3
        assert group.gather(torch.full((2, 3), 4.0, device=gpu), (3,)).tolist() == [[4.0] * 3] * 2
        assert group.least(5) == 5
    group.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_two_ranks_on_one_gpu_are_an_error_of_both() -> None:
    where, gpu = address(), torch.device("cuda:0")

    def meet(rank: int) -> str:
        with pytest.raises(GroupLostError) as caught:
            Group(GroupSettings(rank, 2, where, 20.0), gpu)
        return caught.value.message

    with concurrent.futures.ThreadPoolExecutor(2) as ranks:
        assert all("NCCL error" in error for error in ranks.map(meet, range(2)))


# ------------------------------------------------------------------ processes


CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"kind": "llama", "attention_bias": True},
    "qwen2": {"kind": "qwen2"},
    "qwen3": {"kind": "qwen3", "tie_word_embeddings": True},
    "qwen3-moe": {
        "kind": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    },
    # Part of a tensor that holds several, a rotation of half of each head, experts of all tokens.
    "phi3": {"kind": "phi3", "sliding_window": 30},
    "glm4-moe": {
        "kind": "glm4_moe", "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
        "n_shared_experts": 1, "use_qk_norm": True, "attention_bias": True, "num_hidden_layers": 2,
    },
    "qwen2-moe": {
        "kind": "qwen2_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 96, "num_hidden_layers": 2,
    },
    "gemma3": {
        "kind": "gemma3", "sliding_window": 20, "sliding_window_pattern": 3, "num_key_value_heads": 2,
        "final_logit_softcapping": 5.0, "tie_word_embeddings": True,
    },
}  # fmt: skip
PROMPTS = ([5, 9, 17, 40, 3], list(range(3, 60)), [7])


async def generated(worker: Worker, model: str, prompts: tuple[list[int], ...], max_tokens: int) -> list[list[int]]:
    """Greedy tokens of all prompts at once."""
    done = [asyncio.get_running_loop().create_future() for _ in prompts]
    found: list[list[int]] = [[] for _ in prompts]

    def sink(index: int, item: Any) -> None:
        if isinstance(item, TokenRow):
            found[index] += array.array("i", item.ids)
            if item.end is not None:
                done[index].set_result(None)
        else:
            done[index].set_exception(item)

    for index, prompt in enumerate(prompts):
        ids = array.array("i", prompt).tobytes()
        asked = Generate(0, model, ids, max_tokens, (), SamplerSettings(temperature=0.0))
        worker.run(asked, lambda item, i=index: sink(i, item))
    await asyncio.wait_for(asyncio.gather(*done), 60)
    return found


def test_two_workers_compute_the_same_as_one(
    make_checkpoint: Callable[..., pathlib.Path], harness: Callable[..., Any], set_engine: Callable[..., None]
) -> None:
    set_engine(cpu_kernels=False)
    compare({name: make_checkpoint(**changes) for name, changes in CONFIGS.items()}, harness, 4 << 20)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2_gguf", "gemma3_gguf"])
def test_two_workers_compute_the_same_as_one_of_a_real_model(
    name: str, request: pytest.FixtureRequest, harness: Callable[..., Any], set_engine: Callable[..., None]
) -> None:
    """Gemma has a single key-value head, on both ranks."""
    set_engine(cpu_kernels=False)
    compare({name: request.getfixturevalue(name)}, harness, 64 << 20)


def test_a_model_is_loaded_beside_one_whose_steps_go_on(
    make_checkpoint: Callable[..., pathlib.Path],
) -> None:
    """A rank that waited for the second's group too early would be missing in the first's sums."""
    paths = {"first": make_checkpoint("llama"), "second": make_checkpoint("qwen3")}
    specs = {name: ModelSpec(name, "x", tensor_parallel=2, dtype="float32", kv_cache_bytes=4 << 20) for name in paths}

    async def story(workers: tuple[Worker, ...], loader: TorchHarness) -> None:
        await loader._load_parts(workers, specs["first"], paths["first"], lambda _: None)
        for _ in range(4):
            running = asyncio.create_task(generated(workers[0], "first", ([5, 9, 17],), 40))
            await loader._load_parts(workers, specs["second"], paths["second"], lambda _: None)
            assert len((await running)[0]) == 40
            await asyncio.gather(*(worker.unload("second") for worker in workers))

    in_two_workers(story)


def in_two_workers(story: Callable[[tuple[Worker, ...], TorchHarness], Awaitable[Result]]) -> Result:
    async def whole() -> Result:
        command = [sys.executable, "-P", "-m", "neuron.engine"]
        workers = tuple(Worker(f"cpu:{i}", command, environment={"OMP_NUM_THREADS": "1"}) for i in range(2))
        try:
            await asyncio.gather(*(worker.start() for worker in workers))
            harness = TorchHarness({worker.device_id: worker for worker in workers}, LocalTexts(), 5.0)
            return await story(workers, harness)
        finally:
            await asyncio.gather(*(worker.stop(5) for worker in workers))

    return asyncio.run(whole())


def compare(paths: dict[str, pathlib.Path], harness: Callable[..., Any], kv_cache_bytes: int) -> None:
    async def story(workers: tuple[Worker, ...], loader: TorchHarness) -> dict[str, list[list[int]]]:
        found = {}
        for name, path in paths.items():
            spec = ModelSpec(name, "x", tensor_parallel=2, dtype="float32", kv_cache_bytes=kv_cache_bytes)
            loaded = await loader._load_parts(workers, spec, path, lambda _: None)
            assert loaded.model == name
            found[name] = await generated(workers[0], name, PROMPTS, 24)
        other = ModelSpec("other", "x", tensor_parallel=2, dtype="float32")
        with pytest.raises(UnprocessableError, match="must share all of them"):
            await loader._load_parts((workers[1], workers[0]), other, path, lambda _: None)
        with pytest.raises(ApiError, match="loaded or loading on cpu:"):
            await loader._load_parts(workers, spec, path, lambda _: None)
        for name in paths:
            await asyncio.gather(*(worker.unload(name) for worker in workers))
        assert [(await worker.memory()).used_bytes > 0 for worker in workers] == [True, True]
        return found

    found = in_two_workers(story)
    for name, path in paths.items():
        single = harness()
        single.load(path, dtype="float32")
        for number, prompt in enumerate(PROMPTS):
            single.generate(number, prompt, 24)
        single.run()
        assert found[name] == [single.outputs()[number] for number in range(len(PROMPTS))], name


# ------------------------------------------------------------------ the daemon's side


def devices(*names: str) -> TorchHarness:
    return TorchHarness({name: Worker(name, ["true"]) for name in names}, LocalTexts(), 0.1)


def test_an_unknown_device_is_named_with_the_known_ones(tiny_llama: pathlib.Path) -> None:
    with pytest.raises(NoDeviceError, match="'cuda:7' is not a device of this neuron; it has: cpu:0") as caught:
        asyncio.run(devices("cpu:0").measure(ModelSpec("m", "x", devices=("cuda:7",)), tiny_llama))
    assert caught.value.param == "devices"


@pytest.mark.parametrize(
    ("here", "expected"),
    [
        (("cuda:0", "cuda:1", "cpu:0", "cpu:1"), {"cuda:0", "cuda:1"}),
        (("cuda:0", "cpu:0", "cpu:1", "cpu:2"), {"cpu:0", "cpu:1", "cpu:2"}),
    ],
)
def test_a_group_has_devices_of_one_kind(here: tuple[str, ...], expected: set[str], tiny_llama: pathlib.Path) -> None:
    need = asyncio.run(devices(*here).measure(ModelSpec("m", "x", tensor_parallel=2), tiny_llama))
    assert (need.bytes_on.keys(), need.num_devices) == (expected, 2)


@pytest.mark.parametrize(
    ("size", "named", "may"),
    [
        (4, (), "cuda:0, cuda:1"),
        (2, ("cuda:0", "cpu:0"), "cuda:0"),
        (2, ("cuda:0", "cuda:0"), "cuda:0"),
        (2, ("cuda:1",), "cuda:1"),
        (0, (), "cuda:0, cuda:1"),
        (-1, ("cpu:0",), "cpu:0"),
    ],
)
def test_a_group_that_no_devices_make_is_refused(
    size: int, named: tuple[str, ...], may: str, tiny_llama: pathlib.Path
) -> None:
    spec = ModelSpec("m", "x", tensor_parallel=size, devices=named)
    with pytest.raises(UnprocessableError) as caught:
        asyncio.run(devices("cuda:0", "cuda:1", "cpu:0").measure(spec, tiny_llama))
    assert caught.value.param == "tensor_parallel"
    if len(named) in {0, size}:
        assert f"wants {size} devices of one kind; it may have: {may}." in caught.value.message


def test_a_load_that_fails_on_one_rank_names_the_reason_and_is_undone_on_the_others(tiny_llama: pathlib.Path) -> None:
    """The others need not have noticed: they may wait for each other, or for a file of a hundred gigabytes."""

    class Rank:
        def __init__(self, name: str, error: ApiError | None = None) -> None:
            self.device_id = name
            self.unloaded = 0
            self._error = error

        async def load(self, *_: object, **__: object) -> None:
            if self._error is not None:
                raise self._error
            await asyncio.get_running_loop().create_future()

        async def unload(self, model: str) -> None:
            self.unloaded += 1

    ranks = Rank("cuda:0"), Rank("cuda:1", DoesNotFitError("too large")), Rank("cuda:2")
    loader = TorchHarness({rank.device_id: rank for rank in ranks}, LocalTexts(), 0.1)  # type: ignore[misc]
    for _ in range(2):
        with pytest.raises(DoesNotFitError, match="too large"):
            asyncio.run(loader._load_parts(ranks, ModelSpec("m", "x", tensor_parallel=3), tiny_llama, lambda _: None))  # type: ignore[arg-type]
    assert [rank.unloaded for rank in ranks] == [2, 0, 2]
    assert not loader._groups
