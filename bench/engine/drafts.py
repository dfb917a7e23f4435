"""Gain and cost of draft tokens for models with a recurrent state: none, of repeated text, and of the model's own head.

The trained models of the tests, dense and with experts, in eager torch, which runs their heads; one stream. *Repeated*:
greedy answers to a conversation whose answers repeat what was said. *New*: text drawn at a temperature of 2 behind
random tokens, where hardly any draft is right. Decode steps alone count, each way in turn in every repeat, and the
median of the repeats' rates; *acceptance* is the share of the verified draft tokens. A head is asked where no text
repeats. It is a fifth of these models, and a sixtieth of a large one.

    PYTHONPATH=bench:bench/engine:tests/support python bench/engine/drafts.py [--tokens N] [--keep]
"""

import os
import statistics
from typing import Final

import hybrid_models
import numpy as np
import report
import tokenizers
import torch
import train_hybrid
from streams import Driver, decode_rate

from neuron.engine.process_memory import keep_activations_mapped
from neuron.engine_settings import EngineSettings

REPEATS: Final = 5
WAYS: Final = {"none": (False, False), "lookup": (True, False), "head": (True, True)}
"""Whether there are drafts, and whether the head makes them."""
NEW_TEXT_TEMPERATURE: Final = 2.0


def conversation() -> str:
    """Return the prompt of a conversation about things and their colours."""
    messages = []
    for number, thing in enumerate(train_hybrid.THINGS):
        colour = train_hybrid.COLOURS[number % len(train_hybrid.COLOURS)]
        messages += [
            {"role": "user", "content": f"Now the {thing} is {colour}. What colour is the {thing}?"},
            {"role": "assistant", "content": f"The {thing} is {colour}."},
        ]
    return train_hybrid.prompt_of(messages[:-1], think=True)


def main() -> None:
    """Measure and print."""
    parser = report.arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=300, help="output of each measurement")
    options = parser.parse_args()
    keep_activations_mapped()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rows, ratios = [], {}
    for kind, path in hybrid_models.TRAINED.items():
        tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        random = np.random.default_rng(0)
        texts = {
            "repeated": (tokenizer.encode(conversation()).ids, 0.0),
            "new": (random.integers(3, train_hybrid.NUM_TOKENS - 20, 500).tolist(), NEW_TEXT_TEMPERATURE),
        }
        drivers = {
            way: Driver(path, EngineSettings(cpu_kernels=False, speculation=speculates), draft_head=has_head)
            for way, (speculates, has_head) in WAYS.items()
        }
        for text, (prompt, temperature) in texts.items():
            rates: dict[str, list[float]] = {way: [] for way in WAYS}
            before = {way: drafts_of(driver) for way, driver in drivers.items()}
            for repeat in range(1 + REPEATS):
                for way, driver in drivers.items():
                    rate = decode_rate(driver, prompt, options.tokens, temperature)
                    if repeat:  # the first one warms up
                        rates[way].append(rate)
            for way, driver in drivers.items():
                proposed, accepted = (now - old for now, old in zip(drafts_of(driver), before[way], strict=True))
                rate, acceptance = statistics.median(rates[way]), accepted / proposed if proposed else 0.0
                rows.append(
                    {"model": kind, "text": text, "drafts": way, "tok/s": rate, "drafts/token": proposed
                     / (options.tokens * (1 + REPEATS)), "acceptance": acceptance}
                )  # fmt: skip
                if way != "none":
                    ratios[f"{kind}_{way}_{text}"] = rate / statistics.median(rates["none"])
                if way == "head" and text == "repeated":
                    ratios[f"{kind}_acceptance"] = acceptance
        del drivers
    report.write(
        "drafts",
        rows,
        question="What draft tokens bring to models with a recurrent state, and what they cost",
        packages=("torch",),
        ratios=ratios,
        keep=options.keep,
    )


def drafts_of(driver: Driver) -> tuple[int, int]:
    """Return the draft tokens that were verified so far, and those of them that were accepted."""
    (model,) = driver.engine._models.values()
    return model.speculation.num_proposed, model.speculation.num_accepted


if __name__ == "__main__":
    main()
