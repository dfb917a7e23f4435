"""The dialect as a value."""

import re

from cortex.dialects.dialect import Dialect, WholeAnswer
from cortex.dialects.schema import LIST, OBJECT, TEXT, object_with
from lines_dialect import request


class _Lines(WholeAnswer, frozen=True):
    lines: list[str]


LINES = Dialect(
    "test-lines",
    "/v1/lines",
    "Answer a text in lines.",
    request.PARAMETERS,
    request.decode,
    object_with(model=TEXT, lines=LIST, usage=OBJECT),
    _Lines,
    finish=re.compile(rb'"end": ?"(\w+)"'),
    conversation="text",
    is_translated=True,
)
