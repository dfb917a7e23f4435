"""Calls of Phi-4-mini and Granite 3: ``<|tool_call|>[{"name": ..., "arguments": {...}}, ...]<|/tool_call|>``.

Granite leaves the closing marker out. They are special tokens: a call is forced in the form of Hermes.
"""

import re
from typing import Final

from neuron.text.forms import hermes
from neuron.text.forms.form import CallForm
from neuron.text.forms.marked_json import MarkedReader

TOOL_CALL: Final = "<|tool_call|>"
TOOL_CALL_END: Final = "<|/tool_call|>"


class PhiReader(MarkedReader):
    """Reader of what follows ``<|tool_call|>``: a list."""

    head = re.compile(r"(?!)(?P<name>)")
    behind = (TOOL_CALL_END,)


FORM: Final = CallForm(
    "phi", lambda template: TOOL_CALL in template, PhiReader, hermes.grammar, TOOL_CALL, (TOOL_CALL_END,)
)
