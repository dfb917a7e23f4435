"""Print a bench's table and keep it: what every script in ``bench/`` ends with.

A result file names the machine and the versions, so that a figure without its circumstances cannot exist.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

RESULTS = pathlib.Path(__file__).parent / "results"


def cpu_model() -> str:
    """Return the processor's name as the kernel gives it."""
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def machine() -> dict[str, Any]:
    """Return what the figures were measured on."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "kernel": platform.release(),
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the installed versions of ``packages``; the missing ones are left out."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def best_ns(call: Callable[[], object], *, repeats: int = 7, min_s: float = 0.05) -> float:
    """Return the median over ``repeats`` of the time of one ``call``, in nanoseconds."""
    count = 1
    while True:
        start = time.perf_counter()
        for _ in range(count):
            call()
        if time.perf_counter() - start >= min_s:
            break
        count *= 2
    samples = []
    for _ in range(repeats):
        start = time.perf_counter_ns()
        for _ in range(count):
            call()
        samples.append((time.perf_counter_ns() - start) / count)
    return statistics.median(samples)


def write(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    question: str,
    packages: Iterable[str] = (),
    ratios: Mapping[str, float] | None = None,
    keep: bool = True,
    peers: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    more: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> None:
    """Print ``rows`` as a table and, if ``keep``, write ``results/NAME.json``.

    ``packages`` are of this environment; ``peers`` are versions of what runs elsewhere. ``more`` tables, by name, come
    before ``rows``.
    """
    print(question)
    for table in (*(more or {}).values(), rows):
        _show(table)
    for ratio, value in (ratios or {}).items():
        print(f"{ratio}: {value:.2f}")
    for note in notes:
        print(note)
    if not keep:
        return
    RESULTS.mkdir(exist_ok=True)
    record: dict[str, Any] = {
        "question": question,
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": {**versions(["helexa-cortex", *packages]), **(peers or {})},
        "notes": list(notes),
        "ratios": dict(ratios or {}),
        "rows": [dict(row) for row in rows],
        **{title: [dict(row) for row in table] for title, table in (more or {}).items()},
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")


def figures(done: "subprocess.CompletedProcess[str]") -> dict[str, Any]:
    """Return the figures that a process printed last; where it failed, end with its status as a shell would."""
    if done.returncode:
        sys.exit(done.returncode if done.returncode > 0 else 128 - done.returncode)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every bench has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--keep", action="store_true", help="write the result under bench/results/")
    return parser


def _show(rows: Sequence[Mapping[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return "" if value is None else str(value)
