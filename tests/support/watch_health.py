"""Ask daemons for ``/health`` all the time, until stdin is closed: ``python watch_health.py URL...``.

A process of its own: what a test's other threads do must not count. Prints the slowest answer in seconds, the number of
answers, and then each failure on a line.
"""

import sys
import threading
import time
import urllib.request

INTERVAL_S = 0.05


def main(urls: list[str]) -> None:
    over = threading.Event()
    times_s: list[float] = []
    failures: list[str] = []

    def watch(url: str) -> None:
        while not over.wait(INTERVAL_S):
            began = time.monotonic()
            try:
                urllib.request.urlopen(f"{url}/health", timeout=30).read()
            except OSError as error:
                failures.append(f"{url}: {error}")
            times_s.append(time.monotonic() - began)

    threads = [threading.Thread(target=watch, args=(url,)) for url in urls]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    over.set()
    for thread in threads:
        thread.join()
    print(max(times_s), len(times_s), *failures, sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
