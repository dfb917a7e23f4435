"""A client in a process of its own that streams chats one after another and writes down when each event came.

``python stream_watch.py URL MODEL``: a line on standard output for each event (``e TIME``), for each stream that begins
(``b TIME``) and ends well (``d TIME``), and for whatever else happens (``! TIME REASON``). Times are the machine's
monotonic clock, in seconds.
"""

import http.client
import json
import sys
import time
from urllib.parse import urlsplit


def report(kind: str, text: str = "") -> None:
    print(kind, repr(time.monotonic()), text, flush=True)


def watch(url: str, model: str) -> None:
    """Stream until the process is ended."""
    body = json.dumps(
        {
            "model": model,
            "messages": [{"role": "user", "content": "Tell a long story of a fox."}],
            "stream": True,
            "max_tokens": 500,
            "ignore_eos": True,
        }
    )
    while True:
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
        try:
            connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
            answer = connection.getresponse()
            if answer.status != 200:
                report("!", f"status {answer.status}: {answer.read(500)!r}")
                time.sleep(0.2)
                continue
            report("b")
            is_done = False
            while line := answer.readline():
                if line.startswith(b"data: [DONE]"):
                    is_done = True
                elif line.startswith(b"data:") and b'"error"' in line:
                    report("!", line[:500].decode(errors="replace").strip())
                elif line.startswith(b"data:"):
                    report("e")
            report("d" if is_done else "!", "" if is_done else "the stream was cut")
        except OSError as error:
            report("!", repr(error))
            time.sleep(0.2)
        finally:
            connection.close()


if __name__ == "__main__":
    watch(sys.argv[1], sys.argv[2])
