"""Does decoding leave the cores to others? Measured beside a busy process a core; printed as JSON, for ``run.py``.

The busy processes only count. With one of them a core and one thread of ours a core, a fair share is a half each.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time

import psutil
import report


def be_busy() -> None:
    """Use a core until ended."""
    while True:
        pass


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", nargs=argparse.REMAINDER, help="a side of run.py and its arguments")
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    busy = [multiprocessing.Process(target=be_busy, daemon=True) for _ in range(cores)]
    for process in busy:
        process.start()
    watched = [psutil.Process(process.pid) for process in busy]
    used = -sum(process.cpu_times().user for process in watched)
    start = time.perf_counter()
    done = subprocess.run(options.command, stdout=subprocess.PIPE, text=True)
    elapsed = time.perf_counter() - start
    used += sum(process.cpu_times().user for process in watched)
    for process in busy:
        process.terminate()
        process.join()
    found = report.figures(done)
    print(json.dumps({**found, "left_to_others": used / elapsed / cores}))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
