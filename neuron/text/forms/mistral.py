"""Calls of Mistral: ``[TOOL_CALLS]`` and a list of objects, or a name, perhaps ``[ARGS]``, and the arguments.

Its marker is a special token, which a grammar of text cannot ask for: a call is forced in the form of Hermes.
"""

import re
from typing import Final

from neuron.text.forms import hermes, think
from neuron.text.forms.form import CallForm, ReasoningForm
from neuron.text.forms.marked_json import MarkedReader

TOOL_CALLS: Final = "[TOOL_CALLS]"
ARGS: Final = "[ARGS]"
CALL_ID: Final = "[CALL_ID]"
THINK: Final = "[THINK]"


class MistralReader(MarkedReader):
    """Reader of what follows ``[TOOL_CALLS]``."""

    head = re.compile(r"\s*(?P<name>[^\n]+?)\s*(?:\[CALL_ID\][^\n]*?)?\s*(?:\[ARGS\])?\s*")


FORM: Final = CallForm(
    "mistral", lambda template: TOOL_CALLS in template, MistralReader, hermes.grammar, TOOL_CALLS, (ARGS, CALL_ID)
)
REASONING: Final = ReasoningForm("mistral", lambda template: THINK in template, THINK, "[/THINK]", think.EARLY_END)
