"""The sequences of one request in a device worker, one for each choice, from token rows to inference events."""

import array
import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Callable, Sequence

from cortex.wire.errors import ApiError
from cortex.wire.events import Failed, InferenceEvent, PromptEcho, Started, TokenLogprob
from neuron.device.jobs import Generate, SequenceEnd, TokenLogprobs, TokenRow
from neuron.device.outstanding import Item
from neuron.device.worker import Worker
from neuron.errors import AnswerCutError
from neuron.text.detokenize import Detokenizer


@dataclasses.dataclass(frozen=True, slots=True)
class EchoedPrompt:
    """Prompt of a request that is echoed in the response, and its tokens."""

    text: str
    ids: Sequence[int]
    scores: bool
    """Whether the log probabilities of its tokens are wanted."""


class Generation:
    """The sequences of one request in a worker, one for each choice, and the rows received from them."""

    def __init__(
        self,
        worker: Worker,
        token_text: Callable[[Sequence[int]], list[bytes]],
        choices: list[Detokenizer],
        echo: EchoedPrompt | None = None,
        *,
        is_empty: bool = False,
    ) -> None:
        """``token_text`` returns the bytes of token ids; with ``is_empty`` no output is returned."""
        self._worker = worker
        self._token_text = token_text
        self._choices = choices
        self._echo = echo
        self._is_empty = is_empty
        self._num_scored: dict[int, int] = {}
        """Number of the prompt's tokens scored so far, by choice."""
        self._sequences: dict[int, int] = {}
        self._arrived: list[tuple[int, Item]] = []
        self._wake = asyncio.Event()

    def start(self, choice: int, asked: Generate) -> None:
        """Submit one choice's sequence."""

        def sink(item: Item) -> None:
            self._arrived.append((choice, item))
            self._wake.set()

        self._sequences[choice] = self._worker.run(asked, sink)

    async def events(self, prompt_tokens: int) -> AsyncGenerator[list[InferenceEvent], None]:
        """Yield events until every choice has finished, or one has failed."""
        started = False
        while self._sequences:
            await self._wake.wait()
            self._wake.clear()
            arrived, self._arrived = self._arrived, []
            events: list[InferenceEvent] = []
            for choice, item in arrived:
                if choice not in self._sequences:
                    continue  # it ended on a stop string while this row was in flight
                if isinstance(item, TokenRow) and item.end is SequenceEnd.CANCELLED:
                    item = AnswerCutError()  # not cancelled from here
                if isinstance(item, ApiError):
                    if not started and not events:
                        raise item
                    yield [*events, Failed(item.info())]
                    return
                assert isinstance(item, TokenRow)
                if not started:
                    events.append(Started(prompt_tokens, item.prompt_cached or 0))
                    started = True
                events += self._take_row(choice, item)
            if events:
                yield events

    def cancel(self) -> None:
        """Cancel the sequences that still run."""
        for sequence in self._sequences.values():
            self._worker.cancel(sequence)
        self._sequences.clear()

    def _take_row(self, choice: int, row: TokenRow) -> list[InferenceEvent]:
        events: list[InferenceEvent] = []
        if self._echo is not None:
            events += self._echo_events(choice, row, self._echo)
        if not row.ids and row.end is None:
            return events  # its prompt is still being computed
        if self._is_empty:
            row = TokenRow(row.sequence, b"", SequenceEnd.LENGTH)
        text = self._choices[choice]
        events += text.feed(array.array("i", row.ids), self._logprobs(row))
        if row.end is not None:
            events += text.close(row.end)
            del self._sequences[choice]
        elif text.finished:
            self._worker.cancel(self._sequences.pop(choice))
        return events

    def _echo_events(self, choice: int, row: TokenRow, echo: EchoedPrompt) -> list[InferenceEvent]:
        """Return the echoed prompt of a row: its text first, then its scores as they arrive.

        Computed all at once they would delay all other streams.
        """
        begins = choice not in self._num_scored
        scores: list[TokenLogprob] = []
        if begins and echo.scores:
            scores.append(_logprob(self._token_text(echo.ids[:1])[0], 0.0))  # no token stands before it
        if row.prompt is not None:
            first = self._num_scored.get(choice, 1)
            scores += self._with_text(echo.ids[first : first + len(row.prompt.chosen) // 4], row.prompt)
        self._num_scored[choice] = self._num_scored.get(choice, 0) + len(scores)
        return [PromptEcho(echo.text if begins else "", choice, tuple(scores))] if begins or scores else []

    def _logprobs(self, row: TokenRow) -> list[TokenLogprob]:
        return [] if row.logprobs is None else self._with_text(array.array("i", row.ids), row.logprobs)

    def _with_text(self, ids: Sequence[int], found: TokenLogprobs) -> list[TokenLogprob]:
        """Return the log probabilities of ``ids``, with the bytes of all tokens."""
        chosen = array.array("f", found.chosen)
        top_ids, top = array.array("i", found.top_ids), array.array("f", found.top)
        width = len(top_ids) // max(1, len(ids))
        others = [_logprob(*pair) for pair in zip(self._token_text(top_ids), top, strict=True)]
        return [
            _logprob(text, value, tuple(others[index * width : (index + 1) * width]))
            for index, (text, value) in enumerate(zip(self._token_text(ids), chosen, strict=True))
        ]


def _logprob(utf8: bytes, value: float, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
    return TokenLogprob(utf8.decode(errors="replace"), utf8, value, top)
