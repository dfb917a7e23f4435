"""Kernels and whole models on a GPU: correct there, and how near to the GPU's ceilings?

Ceilings are measured in the same run: a copy for bytes, cuBLAS for products, torch's scaled dot product attention for a
prompt. Times are of CUDA graphs of many nodes, so that launches cost what they cost in a decode step; steps of the
engine are those of a worker, sampling included, on the loop that owns the device.

`make bench-gpu` runs all of it. Where there is no package index, and torch, triton, msgspec, safetensors, gguf,
tokenizers and llguidance are there: `python bench/gpu/run.py --keep`, which builds what is native in `build/gpu` first
(meson, ninja and cython). `--part kernels` and `--part models` fit into ten minutes each: what is left of a part after
`--budget-s` is left out, with a note. `--only` takes a part of a table's or a model's name. For one kernel's counters:
`ncu --clock-control none -k regex:decode_attention -c 20 python bench/gpu/run.py --only attention`. What it has built
serves the GPU tests too: `PYTHONPATH=build/gpu/site python -P -m pytest -m gpu $(grep -rl mark.gpu tests)`.

`--small` is a first look at a GPU: all of it, at sizes at which nothing is worth measuring, in a minute or two.
`--rehearse` goes through the same without one, in Triton's interpreter; no time it shows is real.
"""

import contextlib
import importlib.util
import os
import pathlib
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "bench" / "gpu"), str(ROOT / "tests" / "support")]

import report  # noqa: E402

if TYPE_CHECKING:
    from devices import Gpu
    from kernels import Bench, Rows
    from sizes import Sizes

PACKAGES = ("torch", "triton", "numpy")


def find_package() -> None:
    """Make the package importable: where it is not installed, build it into ``build/gpu``."""
    if importlib.util.find_spec("neuron") is not None:
        return
    build, site = ROOT / "build" / "gpu", ROOT / "build" / "gpu" / "site"
    if not (build / "build.ninja").exists():
        setup = ["meson", "setup", str(build), str(ROOT), f"-Dpython.platlibdir={site}", f"-Dpython.purelibdir={site}"]
        subprocess.run([*setup, "-Dpython.install_env=prefix"], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["meson", "install", "-C", str(build), "--quiet"], check=True, stdout=subprocess.DEVNULL)
    sys.path.insert(0, str(site))


class Run:
    """Run of tables, one after the other, each within the remaining time."""

    def __init__(self, options: Any) -> None:
        self.good = True
        self._options = options
        self._deadline = time.monotonic() + options.budget_s
        keep = options.keep and not (options.small or options.rehearse or options.only)
        self.settings: dict[str, Any] = {"packages": PACKAGES, "keep": keep}

    def wants(self, part: str, *names: str) -> bool:
        """Return whether a table of this part and these names is asked for."""
        return self._options.part in ("all", part) and any(self._options.only in name for name in names)

    def table(self, name: str, question: str, *parts: "Callable[[], Rows]") -> None:
        """Write what ``parts`` yield, as far as each gets: one that fails costs no other its figures."""
        if not parts:
            return
        rows: list[dict[str, Any]] = []
        notes: list[str] = []
        for part in parts:
            try:
                for row in self._in_time(part(), notes):
                    rows.append(row)
            except Exception as error:  # noqa: BLE001 (whatever it is, it is this part's)
                traceback.print_exc()
                notes.append(f"a part of it failed: {type(error).__name__}: {error}"[:300])
        bad = [row for row in rows if row.get("verdict", "right") != "right"]
        self.good &= not notes and not bad
        report.write(name, rows, question=question, notes=notes, **self.settings)

    def _in_time(self, rows: "Rows", notes: list[str]) -> "Rows":
        while time.monotonic() < self._deadline:
            try:
                row = next(rows)
            except StopIteration:
                return
            yield row
        notes.append("there was no time for the rest of it")


@contextlib.contextmanager
def measured_on(*, small: bool, rehearses: bool) -> "Iterator[tuple[Gpu, Sizes]]":
    """Yield the device and the sizes of the measurement."""
    import torch
    from devices import Gpu, Rehearsal
    from sizes import SMALL, Sizes

    torch.manual_seed(time.time_ns())
    if not rehearses:
        yield Gpu(), SMALL if small else Sizes()
        return
    with Rehearsal().with_kernels() as gpu:
        yield gpu, SMALL


def compile_ahead(tables: "list[Callable[[Bench], Rows]]", bench: "Bench") -> None:
    """Compile the kernels of the tables on all cores: one by one they would take all of the time."""
    import kernels
    import torch
    from devices import UntimedGpu

    from neuron.engine_settings import DEFAULTS
    from neuron.triton_kernels.compile import PREBUILT, Compilation, KernelCache, KernelCompileError
    from neuron.triton_kernels.launch import recording, target_of
    from neuron.triton_kernels.warm import warm

    began = time.monotonic()
    untimed = UntimedGpu()
    here = target_of(untimed.device)
    makers = [
        partial(kernels.numbers, untimed),
        *(partial(t, kernels.Bench(untimed, bench.sizes, 1.0)) for t in tables),
    ]
    with recording(here) as recorded:
        for make in makers:
            try:
                for _ in make():
                    pass
            except Exception:  # noqa: BLE001 (its table fails in the same way, and earlier notes count)
                traceback.print_exc()
    wanted = recorded
    torch.cuda.empty_cache()
    cache = KernelCache(pathlib.Path(DEFAULTS.kernel_cache), PREBUILT)
    compilation = Compilation(wanted, here.capability, cache, os.cpu_count() or 1)
    done = False
    while not done:
        try:
            done = compilation.poll(60.0)
        except KernelCompileError:
            traceback.print_exc()  # and its launch will fail where it is measured
    for variant, compiled in compilation.results().items():
        warm(variant, compiled)
    compilation.close()
    print(f"{len(wanted)} kernels ready in {time.monotonic() - began:.0f} s")


def main() -> int:
    """Run all, or print the reason why not."""
    parser = report.arguments(__doc__)
    parser.add_argument("--part", choices=("all", "kernels", "models"), default="all")
    parser.add_argument("--only", default="", help="tables with this in their name, or models")
    parser.add_argument("--budget-s", type=float, default=3600.0, help="no row is begun after so many seconds")
    parser.add_argument("--small", action="store_true", help="go through all of it at small sizes")
    parser.add_argument("--rehearse", action="store_true", help="the same without a GPU")
    options = parser.parse_args()
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        import torch
        import triton
    except ModuleNotFoundError as error:
        print(f"skipped: {error.name} is not installed")
        return 0
    if not options.rehearse and not torch.cuda.is_available():
        print("skipped: no CUDA device")
        return 0
    if not options.rehearse and os.environ.get("TRITON_INTERPRET"):
        print("skipped: TRITON_INTERPRET is set")
        return 0
    run = Run(options)
    find_package()
    with measured_on(small=options.small, rehearses=options.rehearse) as (gpu, sizes):
        name = "a rehearsal" if options.rehearse else torch.cuda.get_device_name()
        print(name, "torch", torch.__version__, "triton", triton.__version__)
        import kernels

        bench = kernels.Bench(gpu, sizes, kernels.copy_gb_s(gpu, sizes))
        run.settings["ratios"] = {"copy GB/s": bench.copy_gb_s}
        run.settings["peers"] = {"gpu": name}
        run_kernels(run, bench)
        run_models(run, bench)
    return 0 if run.good else 1


def run_kernels(run: Run, bench: "Bench") -> None:
    """Write the tables of the kernels."""
    import kernels

    tables: dict[str, tuple[str, Callable[[Bench], Rows]]] = {
        "gpu_nodes": ("What does a node of a graph cost?", kernels.nodes),
        "gpu_gemv": ("Projections of few rows: how much of the copy's bandwidth?", kernels.projections),
        "gpu_attention": ("Attention: beside SDPA and the copy?", kernels.attention),
        "gpu_matmul": ("Matmul: how much of cuBLAS?", kernels.products),
        "gpu_quantised": ("Quantised products: how much of the copy's bandwidth?", kernels.quantised),
        "gpu_pointwise": ("The other kernels?", kernels.pointwise),
    }
    wanted = {name: table for name, table in tables.items() if run.wants("kernels", name)}
    with_numbers = run.wants("kernels", "gpu_numbers")
    if not wanted and not with_numbers:
        return
    if not bench.gpu.rehearses:
        compile_ahead([make for _, make in wanted.values()], bench)
    if with_numbers:
        run.table("gpu_numbers", "Are the kernels right on this GPU?", partial(kernels.numbers, bench.gpu))
    for name, (question, make) in wanted.items():
        run.table(name, question, partial(make, bench))


def run_models(run: Run, bench: "Bench") -> None:
    """Write the tables of whole models."""
    if not run.wants("models", "gpu_decode", "gpu_prefill", "gpu_load", *bench.sizes.models):
        return
    import models

    decoded = [(name, "none") for name in reversed(bench.sizes.models)] + list(bench.sizes.quants)
    decode = [
        partial(models.decode_rows, bench, name, quant)
        for name, quant in decoded
        if run.wants("models", "gpu_decode", name)
    ]
    run.table("gpu_decode", "Decode: how much of the copy's bandwidth, and of the host's time?", *decode)
    if run.wants("models", "gpu_load"):
        loads = [partial(models.load_rows, bench, name) for name in bench.sizes.loaded]
        run.table("gpu_load", "Loading: how much of the bus?", partial(models.transfer_rows, bench), *loads)
    prefill = [
        partial(models.prefill_rows, bench, name)
        for name in bench.sizes.prefilled
        if run.wants("models", "gpu_prefill", name)
    ]
    run.table("gpu_prefill", "Prefill: how many products a second?", *prefill)


if __name__ == "__main__":
    sys.exit(main())
