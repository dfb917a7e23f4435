"""Where commands write for people: as wide as the terminal, and unbroken where there is none.

What goes to a file or through a pipe is read by programs and tests; a line that was broken at some width would be two.
"""

import io
import sys

from rich.console import Console

UNBROKEN = 100_000
"""Columns of what is no terminal. Tables take what they need of it."""


def console(*, markup: bool = False) -> Console:
    """Return what writes to standard output; with ``markup`` brackets are colours: for our own words alone."""
    if sys.stdout.isatty():
        return Console(markup=markup, emoji=False)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.encoding.lower().replace("-", "") != "utf8":
        sys.stdout.reconfigure(errors="replace")  # what the locale cannot write must not end the command
    return Console(width=UNBROKEN, markup=markup, emoji=False)
