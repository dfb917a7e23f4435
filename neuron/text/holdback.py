"""Length of the end of a growing text that must be held back, since it may begin a marker."""

from collections.abc import Iterable


def held_back(text: str, markers: Iterable[str]) -> int:
    """Return the length of the longest suffix of ``text`` that is a proper prefix of some marker.

    >>> held_back("the end <thi", ["<think>"])
    4
    """
    longest = 0
    for marker in markers:
        for length in range(min(len(marker) - 1, len(text)), longest, -1):
            if text.endswith(marker[:length]):
                longest = length
                break
    return longest
