"""Fuzz a tokenizer's files: ``python tests/fuzz/fuzz_tokenizer.py [tests/fuzz/corpus/tokenizer]``.

An input is ``tokenizer.json``, then a zero byte and ``tokenizer_config.json``. A model with them is refused with 422,
or makes a prompt and a grammar.
"""

import copy
import json
import pathlib
import random
import sys
from typing import Any

import atheris

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "support"))

from text_fuzz import Texts, tokenizer

from cortex.wire.errors import ApiError
from cortex.wire.request import FormatKind, InferenceRequest, OutputFormat

ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1 << 40,
    1 << 70,
    1e999,
    "",
    "a",
    "\x00",
    "Ġ",
    [],
    {},
    [None],
    [[]],
    ["a", "b"],
    {"a": 0},
]
ASKED = InferenceRequest("m", prompt="the cat", output_format=OutputFormat(FormatKind.JSON_OBJECT))


def damaged(value: Any, chance: random.Random) -> Any:
    """Return a copy of a JSON value with some of its parts replaced, taken away or doubled."""
    found = copy.deepcopy(value)
    for _ in range(chance.choice([1, 1, 2, 4])):
        inner = found
        while True:
            key = chance.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
            if not isinstance(inner[key], dict | list) or not inner[key] or chance.randrange(4) == 0:
                break
            inner = inner[key]
        if chance.randrange(4) == 0 and len(inner) > 1:
            del inner[key]
        else:
            inner[key] = copy.deepcopy(chance.choice(ODD))
        if not found:
            break
    return found


def mutate(_data: bytes, max_size: int, seed: int) -> bytes:
    """Return a new input."""
    chance = random.Random(seed)
    names = ("chat_template", "bos_token", "eos_token", "added_tokens_decoder", "add_bos_token")
    config = {name: chance.choice(ODD) for name in names if chance.randrange(2)}
    files = json.dumps(damaged(tokenizer(), chance)), json.dumps(config)
    return "\0".join(files).encode("utf-8", "surrogatepass")[:max_size]


def one_input(data: bytes) -> None:
    """Check one tokenizer."""
    first, _, second = data.partition(b"\0")
    (TEXT.folder / "tokenizer.json").write_bytes(first)
    (TEXT.folder / "tokenizer_config.json").write_bytes(second or b"{}")
    try:
        model = TEXT.open()
    except ApiError as error:
        assert error.info().status == 422, error.info()
        return
    TEXT.check(model.build(ASKED, 512))
    TEXT.check(model.grammar(ASKED))
    model.close()


if __name__ == "__main__":
    TEXT = Texts()
    atheris.Setup([sys.argv[0], "-max_len=65536", *sys.argv[1:]], one_input, custom_mutator=mutate)
    atheris.Fuzz()
