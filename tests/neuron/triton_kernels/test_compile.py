"""Compiling ahead of time, the cache on disk, and no compiling once a model is ready."""

import concurrent.futures
import contextlib
import dataclasses
import logging
import multiprocessing
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

import kernel_check  # noqa: E402
from kernel_check import compile_once  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from neuron.device.loop import die_with_parent  # noqa: E402
from neuron.engine.errors import error_info  # noqa: E402
from neuron.models import prebuild  # noqa: E402
from neuron.models.config import read_config  # noqa: E402
from neuron.models.prebuild import any_plan, variants  # noqa: E402
from neuron.triton_kernels import (  # noqa: E402
    activation,
    compile,
    decode_state,
    matmul,
    prefill_attention,
    skinny_matmul,
    warm,
)
from neuron.triton_kernels.batch import AttentionParameters, Batch, PagedCache  # noqa: E402
from neuron.triton_kernels.compile import Compilation, KernelCache, KernelCompileError  # noqa: E402
from neuron.triton_kernels.launch import Variant, recording, target_for  # noqa: E402
from neuron.triton_kernels.operations import KERNELS  # noqa: E402
from neuron.triton_kernels.warm import CompileAfterReadyError, DriverTooOldError  # noqa: E402


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def activation_variant() -> Variant:
    with recording(target_for(90)) as recorded:
        activation.gated_activation.triton(meta(3, 2048), "silu")
    (variant,) = recorded
    return variant


def matmul_variant(block_m: int, block_n: int) -> Variant:
    with recording(target_for(80)) as recorded:
        matmul.matmul.triton(meta(4096, 4096), meta(4096, 4096))
    (variant,) = recorded
    constants = dict(variant.constants) | {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": 32, "STAGES": 2}
    return dataclasses.replace(variant, constants=tuple(constants.items()), num_warps=4, num_stages=2)


@pytest.fixture
def cache(tmp_path: pathlib.Path) -> KernelCache:
    return KernelCache(tmp_path / "kernels")


def test_a_kernel_that_spills_fails_the_check(cache: KernelCache) -> None:
    """A tile of 256 by 256 float32 for 128 threads: 512 registers each, of 255."""
    (row,) = kernel_check.inspect_variants([matmul_variant(256, 256)], 80, cache)
    assert row.stack_bytes > 0
    assert any("stack" in fault for fault in row.faults())
    assert any("spills" in fault for fault in row.faults())


def test_one_kernel_that_spills_fails_the_command(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--code", "--quiet", "--processes", "1", "--capability", "80", "--cache", str(tmp_path)]
    arguments += ["--only", "matmul:_matmul_kernel"]
    sound, spilling = (matmul_variant(*tile) for tile in ((64, 64), (256, 256)))
    monkeypatch.setattr(kernel_check, "all_variants", lambda capability: (sound,))
    assert kernel_check.main(arguments) == 0
    assert "1 variants, 0 faults" in capsys.readouterr().out
    monkeypatch.setattr(kernel_check, "all_variants", lambda capability: (sound, spilling))
    assert kernel_check.main(arguments) == 1
    assert "FAIL _matmul_kernel sm_80" in capsys.readouterr().out
    monkeypatch.setattr(kernel_check, "all_variants", lambda capability: ())
    assert kernel_check.main(arguments) == 1


def test_hopper_uses_its_matrix_unit(cache: KernelCache) -> None:
    i32 = torch.int32
    batch = Batch(meta(64, dtype=i32), meta(64), meta(3, dtype=i32), meta(2, 99, dtype=i32), meta(2, dtype=i32))
    q, keys = meta(64, 32, 128), meta(9, 16, 8, 128)
    with recording(target_for(90)) as recorded:
        matmul.matmul.triton(meta(4096, 4096), meta(4096, 4096))
        prefill_attention.prefill_attention.triton(q, PagedCache(keys, keys), batch, AttentionParameters(0.1), q)
    rows = kernel_check.inspect_variants(recorded, 90, cache)
    assert [row.kernel for row in rows] == ["_persistent_matmul_kernel", "_prefill_attention_kernel"]
    for row in rows:
        assert row.faults() == []
        assert row.counts["HGMMA"] > 0
        row.counts["HGMMA"] = 0
        assert row.faults() == ["no HGMMA"]
    assert rows[0].counts["UTMALDG"] > 0


def test_a_dependent_launch_waits_before_it_touches_memory_that_others_write(cache: KernelCache) -> None:
    with recording(target_for(90)) as recorded:
        skinny_matmul.skinny_matmul.triton(meta(1, 4096), meta(4096, 4096), norm=(meta(4096), 1e-6))
    (row,) = kernel_check.inspect_variants(recorded, 90, cache)
    assert row.variant.dependent_launch
    assert row.faults() == []
    # Its weights it asks for at once.
    assert any(one.startswith(kernel_check.WEIGHTS) for one in row.code[: row.code.index(kernel_check.WAIT)])
    constants = {**dict(row.variant.constants), "PDL": False}
    (row,) = kernel_check.inspect_variants(
        [dataclasses.replace(row.variant, constants=tuple(constants.items()))], 90, cache
    )
    (fault,) = row.faults()
    assert re.fullmatch(r"before it waits for the kernel before it: .*EXIT, .*STG.*", fault)


@pytest.mark.parametrize("capability", [80, 90])
def test_tokens_are_published_past_every_cache(cache: KernelCache, capability: int) -> None:
    """The token and whether all rows have ended; all else stays on the device."""
    i32 = torch.int32
    with recording(target_for(capability)) as recorded:
        KERNELS.end_step(decode_state.like(3, 9, 4, meta), meta(3, dtype=i32), 16)
    (row,) = kernel_check.inspect_variants(recorded, capability, cache)
    assert [one for one in row.code if one.startswith("STG")].count("STG.E.STRONG.SYS") == 2


def test_no_warp_reads_the_place_of_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every warp reads ``place`` for itself, and one thread of one warp moves it on: a barrier has to be between."""
    listings, theirs = [], triton.compile

    def ours(*arguments: object, **options: object) -> object:
        compiled = theirs(*arguments, **options)
        listings.append(compiled.asm["ptx"].splitlines())
        return compiled

    monkeypatch.setattr(triton, "compile", ours)
    state = decode_state.like(64, 128, 64, meta)
    with recording(target_for(90)) as recorded:
        KERNELS.end_step(state, state.last, 16)
    compile.compile_variant(next(iter(recorded)), 90)
    (lines,) = listings
    read: dict[str, int] = {}
    written = []
    for number, line in enumerate(lines):
        if found := re.match(r"\s*ld\.global\S* \{.*\}, \[ (\S+)", line):
            read[found[1]] = number
        elif (found := re.match(r"\s*@\S+ st\.global\S* \[ (\S+)", line)) and found[1] in read:
            written.append(any("bar.sync" in between for between in lines[read[found[1]] : number]))
    assert written == [True]


def test_sizes_that_change_from_step_to_step_make_no_variant() -> None:
    with recording(target_for(90)) as recorded:
        for rows in (1, 2, 15, 16, 17, 4096, 4097):
            KERNELS.rms_norm(meta(rows, 4096), meta(4096), 1e-5)
    assert len(recorded) == 1


def test_the_cache_returns_stored_kernels(cache: KernelCache, monkeypatch: pytest.MonkeyPatch) -> None:
    variant = activation_variant()
    assert cache.load(variant, 80) is None
    first = compile_once(variant, 80, cache)
    assert first.cubin[:4] == b"\x7fELF"
    assert kernel_check.resource_usage(first.cubin)[0] > 0
    monkeypatch.setattr(compile, "compile_variant", None)
    assert compile_once(variant, 80, cache) == first
    assert cache.load(variant, 90) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[:100] + bytes([content[100] ^ 1]) + content[101:],
        lambda content: content[:-100] + bytes([content[-100] ^ 1]) + content[-99:],
        lambda content: content[:20],
        lambda _: b"",
        lambda content: content + b"\0",
    ],
)
def test_a_corrupt_entry_is_compiled_again_and_logged(
    cache: KernelCache, caplog: pytest.LogCaptureFixture, damage: Callable[[bytes], bytes]
) -> None:
    variant = activation_variant()
    first = compile_once(variant, 80, cache)
    (path,) = cache.folder.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert compile_once(variant, 80, cache) == first
    assert any("kernel cache" in record.message for record in caplog.records)
    caplog.clear()
    assert cache.load(variant, 80) == first
    assert not caplog.records


def test_an_entry_of_another_kernel_is_compiled_again(cache: KernelCache) -> None:
    variant = activation_variant()
    first = compile_once(variant, 80, cache)
    (path,) = cache.folder.iterdir()
    other = dataclasses.replace(variant, num_warps=8)
    path.rename(path.with_stem(compile.cache_key(other, 80)))
    assert compile_once(other, 80, cache) != first


def test_an_entry_that_cannot_be_read_is_compiled_again(cache: KernelCache, caplog: pytest.LogCaptureFixture) -> None:
    variant = activation_variant()
    (cache.folder / f"{compile.cache_key(variant, 80)}.kernel").mkdir(parents=True)
    assert compile_once(variant, 80, cache).cubin[:4] == b"\x7fELF"
    assert "cannot be read" in caplog.text
    assert "cannot write" in caplog.text
    assert len(list(cache.folder.iterdir())) == 1, "nothing is left of the attempt"


def test_the_key_follows_source_compiler_capability_and_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    variant = activation_variant()
    keys = {compile.cache_key(variant, 80), compile.cache_key(variant, 90)}
    keys.add(compile.cache_key(dataclasses.replace(variant, num_warps=8), 80))
    monkeypatch.setattr(triton, "__version__", "0")
    keys.add(compile.cache_key(variant, 80))
    monkeypatch.setattr(compile, "source_digest", lambda: "other")
    keys.add(compile.cache_key(variant, 80))
    assert len(keys) == 5


class _Driver:
    """Fake of Triton's driver, as far as loading a kernel needs it; ``done`` lists its calls."""

    def __init__(self) -> None:
        self.utils = self
        self.done: list[str] = []

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448}

    def launcher_cls(self, source: object, metadata: object) -> object:
        self.done.append("launcher")
        return lambda *_: self.done.append("launch")

    def load_binary(self, name: str, cubin: bytes, shared_bytes: int, device: int) -> tuple[int, int, int, int, int]:
        assert cubin[:4] == b"\x7fELF"
        self.done.append(f"module of {name}")
        return 1, 2, 32, 0, 1024

    def unload_module(self, module: int) -> None:
        self.done.append("unload")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Driver]:
    from triton import knobs
    from triton.runtime import driver

    stub = _Driver()
    monkeypatch.setattr(driver, "_active", stub)
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", None)
    activation._gated_kernel.jitted.device_caches.clear()
    yield stub
    activation._gated_kernel.jitted.device_caches.clear()


def warm_one(variant: Variant, cache: KernelCache, **settings: Any) -> None:
    warm.warm(variant, compile_once(variant, 90, cache), **settings)


@pytest.mark.usefixtures("driver")
def test_compiling_after_ready_is_an_error(cache: KernelCache) -> None:
    variant = activation_variant()
    warm_one(variant, cache)
    warm.forbid_compiling()
    warm_one(variant, cache)  # it is there: nothing to compile
    other = dataclasses.replace(variant, num_warps=8)
    with pytest.raises(CompileAfterReadyError, match="_gated_kernel would be compiled now"):
        warm_one(other, cache)
    with warm.allowing_compiles():
        warm_one(other, cache)
    warm_one(other, cache)


def test_the_first_launch_finds_everything_done(driver: _Driver, cache: KernelCache) -> None:
    warm_one(activation_variant(), cache)
    assert driver.done == ["launcher", "module of _gated_kernel"]
    x, out = torch.empty(5, 2048, dtype=torch.bfloat16), torch.empty(5, 1024, dtype=torch.bfloat16)
    constants = {"ACTIVATION": "silu", "BLOCK": 1024}
    options = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
    activation._gated_kernel.jitted[(5,)](x, out, 2048, 1024, **constants, **options)
    assert driver.done == ["launcher", "module of _gated_kernel", "launch"]


@pytest.mark.usefixtures("driver")
def test_a_launch_finds_a_warmed_kernel(cache: KernelCache) -> None:
    """The JIT's own specialisation of a launch's arguments equals the recorded variant."""
    warm_one(activation_variant(), cache)
    warm.forbid_compiling()
    constants = {"ACTIVATION": "silu", "BLOCK": 1024}
    options = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
    x, out = torch.empty(5, 2048, dtype=torch.bfloat16), torch.empty(5, 1024, dtype=torch.bfloat16)
    activation._gated_kernel.jitted.warmup(x, out, 2048, 1024, grid=(5,), **constants, **options)
    with pytest.raises(CompileAfterReadyError):
        activation._gated_kernel.jitted.warmup(x, out, 2047, 1024, grid=(5,), **constants, **options)


@pytest.mark.usefixtures("driver")
def test_a_prebuilt_kernel_needs_no_compiler(
    cache: KernelCache, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from a wheel: entries in a folder that is only read, loaded by a process that cannot compile."""
    variant = activation_variant()
    made = compile_once(variant, 90, cache)
    monkeypatch.setattr(compile, "compile_variant", None)
    monkeypatch.setattr(triton, "compile", None)
    elsewhere = KernelCache(tmp_path / "own", prebuilt=cache.folder)
    warm_one(variant, elsewhere)
    (kernel,) = activation._gated_kernel.jitted.device_caches[0][0].values()
    assert kernel.asm["cubin"] == made.cubin
    assert kernel.name == made.metadata["name"]
    assert kernel.metadata.shared == made.metadata["shared"]
    assert not elsewhere.folder.exists()


@pytest.mark.usefixtures("driver")
def test_a_driver_older_than_the_cubins_is_reported_before_a_launch(cache: KernelCache) -> None:
    variant = activation_variant()
    with pytest.raises(DriverTooOldError, match=r"supports CUDA 11\.8, .* by CUDA 1[23]\..*; install a driver"):
        warm_one(variant, cache, driver_version=(11, 8))
    made_by = int(compile_once(variant, 90, cache).cuda_version.partition(".")[0])
    warm_one(variant, cache, driver_version=(made_by, 0))


def finish(compilation: Compilation) -> dict[Variant, compile.Compiled]:
    with contextlib.closing(compilation):
        return compilation.results()


def test_other_processes_compile_kernels_that_the_cache_lacks(
    cache: KernelCache, monkeypatch: pytest.MonkeyPatch, wait_for: Callable[..., None]
) -> None:
    first = activation_variant()
    known = compile_once(first, 90, cache)
    second = dataclasses.replace(first, num_warps=8)
    compilation = Compilation([first, second, first], 90, cache, 4, die_with_parent)
    children = multiprocessing.active_children()
    assert len(children) == 1, "one is missing"
    found = finish(compilation)
    assert list(found) == [first, second]
    assert found[first] == known
    assert found[second] == cache.load(second, 90)
    assert found[second].metadata["num_warps"] == 8
    (child,) = children
    # Not join(): the pool's own thread reaps it too, and of two that do one gets no status.
    wait_for(lambda: not child.is_alive(), "the end of the compiler's process")
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", None)
    assert finish(Compilation([second, first], 90, cache, 4)) == found


def test_a_folder_that_takes_nothing_costs_time_only(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    variant = activation_variant()
    found = finish(Compilation([variant], 90, KernelCache(tmp_path / "file"), 1))
    assert found[variant].cubin[:4] == b"\x7fELF"
    assert "cannot write" in caplog.text


def test_a_compile_error_is_reported(cache: KernelCache) -> None:
    variant = dataclasses.replace(activation_variant(), num_warps=3)
    with pytest.raises(KernelCompileError, match="_gated_kernel for sm_90"):
        finish(Compilation([variant], 90, cache, 1))


def test_a_compiler_that_dies_is_an_error(cache: KernelCache) -> None:
    with pytest.raises(KernelCompileError, match="_gated_kernel: the compiler's process has died"):
        finish(Compilation([activation_variant()], 90, cache, 1, os.abort))


def test_a_load_reports_an_error_of_driver_or_compiler() -> None:
    info = error_info(DriverTooOldError((11, 8), "12.8"))
    assert info.code == "driver_too_old"
    assert "install a driver for CUDA 12.0 or later" in info.message
    assert error_info(compile.KernelCompileError("ptxas: no")).code == "kernel_compile_failed"


def test_a_load_finds_kernels_of_make_kernels(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = pathlib.Path(__file__).parents[3] / "packaging" / "kernels" / "SmolLM2-135M"
    made = tmp_path / "prebuilt"
    prebuild.main([str(shapes), "--capability", "80", "--quant", "none", "--out", str(made)])
    assert len(list(made.glob("*.kernel"))) > 5
    monkeypatch.setattr(compile, "compile_variant", None)
    model = read_config(shapes)
    wanted = variants(model, any_plan(model, "bfloat16"), 80)
    found = finish(Compilation(wanted, 80, KernelCache(tmp_path / "own", prebuilt=made), 1))
    assert [one.capability for one in found.values()] == [80] * len(wanted)
    assert not (tmp_path / "own").exists()
