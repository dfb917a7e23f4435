"""Several requests of one call, run concurrently: a list of prompts is as many requests, and one answer.

Their choices are numbered consecutively. At most as many run at a time as the model has slots, since the queue is
shared with other clients.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import msgspec

from cortex.wire.events import Failed, InferenceEvent, Started
from cortex.wire.request import InferenceRequest
from neuron.harness import Model

Batch = Sequence[InferenceEvent]


async def infer_all(model: Model, requests: Sequence[InferenceRequest]) -> AsyncGenerator[Batch, None]:
    """Yield the events of all ``requests``, which have equally many choices, as they come.

    A request that fails ends the others. Raises the first error.
    """
    num_choices = requests[0].num_choices
    slots = asyncio.Semaphore(max(1, model.loaded.max_sequences // num_choices))
    arrived: asyncio.Queue[Batch | Exception | None] = asyncio.Queue(maxsize=2 * len(requests))

    async def run(request: InferenceRequest, first_choice: int) -> None:
        try:
            async with slots, aclosing(model.infer(request)) as batches:
                async for events in batches:
                    await arrived.put([_renumbered(event, first_choice) for event in events])
        except Exception as error:  # noqa: BLE001 (any error is the call's)
            await arrived.put(error)
        else:
            await arrived.put(None)

    tasks = [asyncio.create_task(run(request, index * num_choices)) for index, request in enumerate(requests)]
    running = len(tasks)
    try:
        while running:
            match await arrived.get():
                case None:
                    running -= 1
                case Exception() as error:
                    raise error
                case events:
                    yield events
                    if any(isinstance(event, Failed) for event in events):
                        return
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _renumbered(event: InferenceEvent, first_choice: int) -> InferenceEvent:
    if isinstance(event, Started | Failed):
        return event
    return msgspec.structs.replace(event, choice=event.choice + first_choice)
