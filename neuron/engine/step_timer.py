"""Measured step times of one model, and the limits that follow from them.

They bound the prompt tokens of a mixed step, so that it takes at most ``STALL_FACTOR`` times as long as its decodes
alone, and they give the cost of the further rows that verify draft tokens. Seconds are wall time; outliers count
little.
"""

import bisect
from typing import Final

STALL_FACTOR: Final = 2.2
"""Longest mixed step, relative to its decodes alone: more than half of its time is the prompt's then."""
MIN_PROMPT_TOKENS: Final = 5
"""Fewer cost as much: attention reads the context once for a tile of queries. Behind 3,700 tokens of SmolLM2, beside
eight decodes that take 5 ms alone, one token more makes a step of 10.7 ms, five make one of 15.2."""
NEW_WEIGHT: Final = 0.2
"""Weight of a new measurement against those before it."""
OUTLIER: Final = 3.0
"""Cap on a measurement, relative to the expected one: beyond it the process was not running."""
UNKNOWN_ROW: Final = 0.05
"""Assumed cost of a further row, as a share of the step, until one is measured: low, so that one is tried."""


class StepTimer:
    """Measured times of one model's steps. Until the first, a mixed step gets ``page_tokens`` of a prompt."""

    def __init__(self, page_tokens: int, mixed_step_tokens: int) -> None:
        self._page_tokens = page_tokens
        self._mixed_step_tokens = mixed_step_tokens
        # Steps without prompts: by rows, in rising order, the seconds of each.
        self._rows: list[int] = []
        self._seconds: list[float] = []
        self._measured_once: set[int] = set()
        """Numbers of rows with one measurement, which may be of a first time that takes longer."""
        self._prompt_token_s: float | None = None
        self._last_prompt_tokens = page_tokens
        self.host_s = 0.0
        """Seconds of host work between two consecutive steps."""

    def record_host(self, seconds: float) -> None:
        """Record the host time between the end of one step and the wait for the next."""
        known = self.host_s or seconds
        self.host_s = known + NEW_WEIGHT * (min(seconds, OUTLIER * known) - known)

    def record(self, num_rows: int, num_prompt_tokens: int, seconds: float) -> None:
        """Record the time of a step of ``num_rows`` decoding rows and ``num_prompt_tokens`` of prompts."""
        if not num_rows:
            return
        if num_prompt_tokens:
            alone = self.step_s(num_rows)
            if alone is not None:
                self._record_prompt(num_prompt_tokens, max(seconds - alone, 0.05 * seconds))
            return
        at = bisect.bisect_left(self._rows, num_rows)
        if at < len(self._rows) and self._rows[at] == num_rows:
            known = self._seconds[at]
            if num_rows in self._measured_once:
                self._measured_once.remove(num_rows)
                known = self._seconds[at] = min(known, seconds)
            self._seconds[at] += NEW_WEIGHT * (min(seconds, OUTLIER * known) - known)
        else:
            self._rows.insert(at, num_rows)
            self._seconds.insert(at, seconds)
            self._measured_once.add(num_rows)

    def _record_prompt(self, num_tokens: int, seconds: float) -> None:
        each, known = seconds / num_tokens, self._prompt_token_s
        # Attention makes a prompt's later tokens cost more than its first, so old and new weigh the same.
        self._prompt_token_s = each if known is None else (known + min(each, OUTLIER * known)) / 2
        self._last_prompt_tokens = num_tokens

    def step_s(self, num_rows: int) -> float | None:
        """Return the seconds of a step of ``num_rows`` rows without prompts; ``None`` before any was measured."""
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
        """Return the rows that a step with ``num_rows`` decodes may have in all."""
        alone = self.step_s(num_rows)
        if alone is None or self._prompt_token_s is None:
            found = float(self._page_tokens)
        else:
            # At most twice as many as last time: the measurement holds for about that many.
            found = min((STALL_FACTOR - 1) * alone / self._prompt_token_s, 2.0 * self._last_prompt_tokens)
        return min(num_rows + max(int(found), MIN_PROMPT_TOKENS), self._mixed_step_tokens)
