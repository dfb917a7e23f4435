"""What the steps of a model take here, as measured, and what follows for the next one.

Two questions are answered from it. How much of a prompt may ride along with those who decode: so much that their next
token comes no later than ``STALL_FACTOR`` times as long as it takes without. And what it costs to check guesses, which
is more rows in a step. Seconds are wall time; a step that something else held up counts little.
"""

import bisect
from typing import Final

STALL_FACTOR: Final = 2.2
"""How much longer a step of decodes may take for a prompt's sake: more than half of its time is the prompt's then."""
MIN_PROMPT_TOKENS: Final = 5
"""Fewer cost as much: attention reads the context once for a tile of queries. Behind 3,700 tokens of SmolLM2, beside
eight decodes that take 5 ms alone, one token more makes a step of 10.7 ms, five make one of 15.2."""
NEWS: Final = 0.2
"""Weight of a new measurement against those before it."""
OUTLIER: Final = 3.0
"""A measurement beyond so many times the expected counts as that: the process was not running."""
UNKNOWN_ROW: Final = 0.05
"""What a further row is taken to cost, as a share of the step, until one has been measured: little, so that it is."""


class Pace:
    """Measured times of one model's steps. Before any is known, ``page_tokens`` of a prompt are not too many."""

    def __init__(self, page_tokens: int, mixed_step_tokens: int) -> None:
        self._page_tokens = page_tokens
        self._mixed_step_tokens = mixed_step_tokens
        # Steps without prompts: by rows, in rising order, the seconds of each.
        self._rows: list[int] = []
        self._seconds: list[float] = []
        self._prompt_token_s: float | None = None
        self._last_prompt_tokens = page_tokens
        self.host_s = 0.0
        """Seconds of the host's own between two steps that follow each other."""

    def note_host(self, seconds: float) -> None:
        """Take the time that passed on the host between the end of one step and the wait for the next."""
        known = self.host_s or seconds
        self.host_s = known + NEWS * (min(seconds, OUTLIER * known) - known)

    def note(self, num_rows: int, num_prompt_tokens: int, seconds: float) -> None:
        """Take the time of a step of ``num_rows`` rows that decode and so many of prompts."""
        if not num_rows:
            return
        if num_prompt_tokens:
            alone = self.step_s(num_rows)
            if alone is not None:
                self._note_prompt(num_prompt_tokens, max(seconds - alone, 0.05 * seconds))
            return
        at = bisect.bisect_left(self._rows, num_rows)
        if at < len(self._rows) and self._rows[at] == num_rows:
            known = self._seconds[at]
            self._seconds[at] += NEWS * (min(seconds, OUTLIER * known) - known)
        else:
            self._rows.insert(at, num_rows)
            self._seconds.insert(at, seconds)

    def _note_prompt(self, num_tokens: int, seconds: float) -> None:
        each, known = seconds / num_tokens, self._prompt_token_s
        # Attention makes a prompt's later tokens dearer than its first, so the news weighs as much as what was known.
        self._prompt_token_s = each if known is None else (known + min(each, OUTLIER * known)) / 2
        self._last_prompt_tokens = num_tokens

    def step_s(self, num_rows: int) -> float | None:
        """Return what a step of ``num_rows`` rows without prompts takes; ``None`` before any was measured."""
        if not self._rows:
            return None
        at = bisect.bisect_left(self._rows, num_rows)
        if at == len(self._rows):
            return self._seconds[-1] * (1 + UNKNOWN_ROW * (num_rows - self._rows[-1]))
        if at == 0 or self._rows[at] == num_rows:
            return self._seconds[at]
        share = (num_rows - self._rows[at - 1]) / (self._rows[at] - self._rows[at - 1])
        return self._seconds[at - 1] + share * (self._seconds[at] - self._seconds[at - 1])

    def mixed_step_tokens(self, num_rows: int) -> int:
        """Return the rows that a step may have in all in which ``num_rows`` decode."""
        alone = self.step_s(num_rows)
        if alone is None or self._prompt_token_s is None:
            found = float(self._page_tokens)
        else:
            # At most twice as many as last time: what is known is known of that many.
            found = min((STALL_FACTOR - 1) * alone / self._prompt_token_s, 2.0 * self._last_prompt_tokens)
        return min(num_rows + max(int(found), MIN_PROMPT_TOKENS), self._mixed_step_tokens)
