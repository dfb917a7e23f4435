"""``make check-kernels``: check the numbers and the machine code of the kernels.

Numbers: every case of ``kernel_cases`` in Triton's interpreter, with the tiles of sm_80 and of sm_90,
against the eager reference; in a process of its own, because the interpreter is chosen when Triton is imported.
Machine code: every variant of these cases compiled for five compute capabilities. Failures are a stack (spills), STL or
LDL, more shared memory than the GPU has, on sm_90 no HGMMA in the large matmul or in prefill attention, and a dependent
launch that touches anything but weights before it waits. ``--keep`` writes the table to ``bench/results/kernels.json``.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import datetime
import json
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from typing import Any, Final

import kernel_cases
import torch
import triton
import triton_interpreter

from neuron.triton_kernels.compile import Compiled, KernelCache, KernelCompileError, compile_variant
from neuron.triton_kernels.launch import SHARED_BYTES, Target, Variant, recording, target_for, targeting

_TOOLS: Final = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CAPABILITIES: Final = (80, 89, 90, 100, 120)
NUMERIC_TARGETS: Final = (Target(80, 40), Target(90, 3))
"""With many multiprocessors decode attention and skinny matmuls split; with few the persistent matmul takes several
tiles."""
COUNTED: Final = ("HMMA", "HGMMA", "UTCHMMA", "LDGSTS", "UTMALDG", "LDG", "STG", "STL", "LDL")
BRIEF_CAPABILITY: Final = 120
"""Capability for which ``--brief`` compiles all variants; for the others it compiles the first one of each kernel."""
MUST_USE_HGMMA: Final = ("_prefill_attention_kernel", "_persistent_matmul_kernel")
WAIT: Final = "ACQBULK"
"""``griddepcontrol.wait``: the writes of the previous kernel are visible after it."""
ACCESSES: Final = {"LD", "LDG", "LDGSTS", "UTMALDG", "UBLKCP", "ST", "STG", "ATOM", "ATOMG", "RED", "REDG", "EXIT"}
"""Instructions that access memory, or end a program."""
WEIGHTS: Final = "LDG.E.EF"
"""Load with evict-first, which only weights use. No kernel writes weights, so they need no wait."""


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """Compiled variant and its machine code."""

    variant: Variant
    compiled: Compiled
    code: list[str]
    """Machine instructions, in order."""
    counts: collections.Counter[str]
    """Count of each instruction, without modifiers."""
    registers: int
    stack_bytes: int
    """Stack of a thread; over 0 means spills, or arrays in memory."""

    @property
    def kernel(self) -> str:
        """Return the kernel's name without its module."""
        return self.variant.kernel.partition(":")[2]

    def faults(self) -> list[str]:
        """Return every rule that the machine code breaks."""
        capability, shared_bytes, found = self.compiled.capability, self.compiled.metadata["shared"], []
        if self.stack_bytes:
            found.append(f"{self.stack_bytes} bytes of stack")
        if self.counts["STL"] or self.counts["LDL"]:
            found.append(f"spills: {self.counts['STL']} STL, {self.counts['LDL']} LDL")
        limit = SHARED_BYTES[capability]
        if shared_bytes > limit:
            found.append(f"{shared_bytes} bytes of shared memory, the GPU has {limit}")
        if capability == 90 and self.kernel in MUST_USE_HGMMA and not self.counts["HGMMA"]:
            found.append("no HGMMA")
        if self.variant.dependent_launch:
            # Without a wait, every access is too early.
            early = self.code[: self.code.index(WAIT)] if WAIT in self.code else self.code
            touched = {one for one in early if one.partition(".")[0] in ACCESSES and not one.startswith(WEIGHTS)}
            if touched:
                found.append(f"before it waits for the kernel before it: {', '.join(sorted(touched))}")
        return found

    def record(self) -> dict[str, Any]:
        """Return the row of the table."""
        constants = {k: v for k, v in self.variant.constants if v is not None and v is not False}
        return {
            "kernel": self.kernel.strip("_").removesuffix("_kernel"),
            "sm": self.compiled.capability,
            "dtype": next(p.kind.removeprefix("*") for p in self.variant.parameters),
            "constants": " ".join(f"{k}={v}" for k, v in constants.items()),
            "warps": self.compiled.metadata["num_warps"],
            "registers": self.registers,
            "shared_bytes": self.compiled.metadata["shared"],
            "instructions": self.counts.total(),
            **{name: self.counts[name] for name in COUNTED if self.counts[name]},
        }


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """Result for a variant: its row of the table, if it compiled, and its failures, a line each."""

    record: dict[str, Any] | None
    failures: list[str]


def judge(variant: Variant, capability: int, folder: pathlib.Path) -> Verdict:
    """Compile a variant, or read it from ``folder``, and check its machine code."""
    try:
        (row,) = inspect_variants([variant], capability, KernelCache(folder))
    except KernelCompileError as error:
        return Verdict(None, [f"FAIL {error}"])
    record = row.record()
    what = f"{row.kernel} sm_{capability} {record['dtype']} {record['constants']}"
    return Verdict(record, [f"FAIL {what}: {fault}" for fault in row.faults()])


def judge_all(wanted: Iterable[tuple[Variant, int]], folder: pathlib.Path, num_processes: int) -> Iterator[Verdict]:
    """Yield the verdict on each variant and compute capability in order, several at a time."""
    # A process that has started Triton's threads is not forked.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(num_processes, context) as pool:
        yield from pool.map(judge, *zip(*((*each, folder) for each in wanted), strict=True), chunksize=4)


def inspect_variants(wanted: Iterable[Variant], capability: int, cache: KernelCache) -> list[Row]:
    """Compile ``wanted`` and read the machine code. Raises :class:`KernelCompileError`."""
    rows = []
    for variant in wanted:
        compiled = compile_once(variant, capability, cache)
        code = machine_code(compiled.cubin)
        counts = collections.Counter(one.partition(".")[0] for one in code)
        rows.append(Row(variant, compiled, code, counts, *resource_usage(compiled.cubin)))
    return rows


def compile_once(variant: Variant, capability: int, cache: KernelCache) -> Compiled:
    """Return a kernel of ``cache``, compiled and kept there first if need be. Raises :class:`KernelCompileError`."""
    found = cache.load(variant, capability)
    if found is None:
        found = compile_variant(variant, capability)
        cache.keep(variant, found)
    return found


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Return registers and bytes of stack of a thread."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", _on_file("cuobjdump", cubin, "--dump-resource-usage"))
    assert found is not None, "cuobjdump names no resources"
    return int(found[1]), int(found[2])


def machine_code(cubin: bytes) -> list[str]:
    """Return the machine instructions in order, with their modifiers: ``LDG.E.128``."""
    listing = _on_file("nvdisasm", cubin)
    return re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", listing, re.M)


def _on_file(tool: str, cubin: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([_TOOLS / tool, *options, file.name], capture_output=True, text=True, check=True)
    return run.stdout


def all_variants(capability: int) -> tuple[Variant, ...]:
    """Return the variants that the machine-code check covers on one GPU."""
    with recording(target_for(capability)) as recorded:
        kernel_cases.launch_everything()
    return tuple(recorded)


def check_numbers(name_part: str = "") -> int:
    """Run the numeric cases in this process; print each failure and a summary; return the number of failures."""
    triton_interpreter.mend()
    failed = num_cases = 0
    start = time.monotonic()
    worst: dict[str, float] = {}
    for target in NUMERIC_TARGETS:
        for case in kernel_cases.numeric_cases():
            if name_part not in case.name:
                continue
            torch.manual_seed(num_cases)
            with targeting(target):
                error = case.error(torch.device("cpu"))
            num_cases += 1
            kind = f"{case.operation.name} {str(case.dtype).removeprefix('torch.')}"
            worst[kind] = max(worst.get(kind, 0.0), error)
            if not error <= case.tolerance:
                failed += 1
                print(f"FAIL {case.name} {case.dtype} as sm_{target.capability}: {error:.2e} > {case.tolerance:.0e}")
    for kind, error in sorted(worst.items()):
        print(f"{kind:32} worst error {error:.1e}")
    print(f"numbers: {num_cases} cases, {failed} failed, {time.monotonic() - start:.0f} s")
    return failed


def main(arguments: list[str] | None = None) -> int:
    """Run both halves and return the exit status."""
    parser = argparse.ArgumentParser(description="Check the Triton kernels: numbers and machine code.")
    parser.add_argument("--numbers", action="store_true", help="only the numbers; needs TRITON_INTERPRET=1")
    parser.add_argument("--code", action="store_true", help="only the machine code")
    parser.add_argument("--only", default="", help="part of a kernel's or a case's name")
    parser.add_argument("--capability", type=int, action="append", choices=CAPABILITIES)
    parser.add_argument("--cache", type=pathlib.Path, default=pathlib.Path("build/kernels"))
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="compilers at a time")
    parser.add_argument("--brief", action="store_true", help="all variants for one compute capability only")
    parser.add_argument("--quiet", action="store_true", help="no table, only what fails and a summary")
    parser.add_argument("--keep", action="store_true", help="write bench/results/kernels.json")
    options = parser.parse_args(arguments)
    if options.numbers:
        return 1 if check_numbers(options.only) else 0
    failed = 0
    if not options.code:
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        command = [sys.executable, "-P", __file__, "--numbers", "--only", options.only]
        failed += subprocess.run(command, env=environment, check=False).returncode != 0
    start = time.monotonic()
    wanted = []
    for capability in options.capability or CAPABILITIES:
        variants = [variant for variant in all_variants(capability) if options.only in variant.kernel]
        if options.brief and capability != BRIEF_CAPABILITY:
            variants = list({variant.kernel: variant for variant in reversed(variants)}.values())
        wanted += [(variant, capability) for variant in variants]
    if not wanted:
        print(f"no kernel has {options.only!r} in its name")
        return 1
    records, num_faults = [], 0
    for verdict in judge_all(wanted, options.cache, options.processes):
        num_faults += len(verdict.failures)
        print(*verdict.failures, sep="\n", end="\n" * bool(verdict.failures), flush=True)
        if verdict.record is not None:
            records.append(verdict.record)
    if not options.quiet:
        _print_table(records)
    capabilities = " ".join(f"sm_{c}" for c in options.capability or CAPABILITIES)
    print(
        f"machine code by triton {triton.__version__} for {capabilities}: {len(wanted)} variants, {num_faults} faults, "
        f"{time.monotonic() - start:.0f} s"
    )
    if options.keep:
        _keep(records)
    return 1 if failed or num_faults else 0


def _print_table(records: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for record in records for key in record))
    lines = [columns, *([str(record.get(column, "")) for column in columns] for record in records)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _keep(records: list[dict[str, Any]]) -> None:
    path = pathlib.Path("bench/results/kernels.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "question": "What does the compiler make of each kernel?",
        "date": datetime.date.today().isoformat(),
        "versions": {"triton": triton.__version__, "torch": torch.__version__},
        "rows": records,
    }
    lines = ",\n".join("    " + json.dumps(record) for record in result.pop("rows"))
    head = json.dumps(result, indent=2).removesuffix("\n}")
    path.write_text(head + ',\n  "rows": [\n' + lines + "\n  ]\n}\n")


if __name__ == "__main__":
    sys.exit(main())
