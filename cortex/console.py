"""The console of the commands: as wide as the terminal, and without line breaks where there is none.

Output to a file or a pipe is read by programs and tests, for which a wrapped line would be two.
"""

import io
import sys

from rich.console import Console

UNBROKEN = 100_000
"""Columns where there is no terminal. Tables take as many as they need."""


def console(*, markup: bool = False) -> Console:
    """Return a console on standard output. With ``markup`` brackets are colours, for fixed texts only."""
    if sys.stdout.isatty():
        return Console(markup=markup, emoji=False)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.encoding.lower().replace("-", "") != "utf8":
        sys.stdout.reconfigure(errors="replace")  # characters outside the locale must not end the command
    return Console(width=UNBROKEN, markup=markup, emoji=False)
