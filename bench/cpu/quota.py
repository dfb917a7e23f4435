"""Does decoding keep within the quota of its control group? Printed as JSON, for ``run.py``.

``quota.py CORES COMMAND ...`` runs a side of the bench in a group of its own that may use so many cores' time.
A process with more threads than that is stopped in the middle of each of the kernel's periods; ``not_throttled`` is the
share of periods without a stop. Needs the right to make a control group.
"""

import argparse
import contextlib
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import report

ROOT = pathlib.Path("/sys/fs/cgroup")
PERIOD_US = 100_000


@contextlib.contextmanager
def limited(cores: float) -> Iterator[pathlib.Path]:
    """Control group within this process's own, of version 1 or 2. Raises OSError where none may be made."""
    folder = ROOT
    for line in pathlib.Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "cpu" in controllers.split(",") or (not controllers and folder == ROOT):
            folder = ROOT / controllers / path.lstrip("/") / f"bench-{os.getpid()}"
    folder.mkdir()
    try:
        quota_us = int(cores * PERIOD_US)
        if (folder / "cpu.cfs_quota_us").exists():
            (folder / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (folder / "cpu.cfs_quota_us").write_text(str(quota_us))
        elif (folder / "cpu.max").exists():
            (folder / "cpu.max").write_text(f"{quota_us} {PERIOD_US}")
        else:
            raise FileNotFoundError(f"{folder} does not control the processor")
        yield folder
    finally:
        folder.rmdir()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cores", type=float)
    parser.add_argument("command", nargs=argparse.REMAINDER, help="a side of run.py and its arguments")
    options = parser.parse_args()
    with limited(options.cores) as folder:
        enter = f'echo $$ > "{folder}/cgroup.procs" && exec "$@"'
        command = ["sh", "-c", enter, "sh", *options.command]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        lines = (folder / "cpu.stat").read_text().splitlines()
    counts = {key: int(value) for key, value in (line.split() for line in lines)}
    found = report.figures(done)
    kept = 1 - counts["nr_throttled"] / max(1, counts["nr_periods"])
    print(json.dumps({**found, "not_throttled": kept}))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
