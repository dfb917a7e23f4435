"""Reasoning between ``<think>`` and ``</think>``, of DeepSeek, Qwen and most others.

Its early end is Qwen3's (arXiv:2505.09388, 4.3).
"""

from typing import Final

from neuron.text.forms.form import ReasoningForm

START: Final = "<think>"
EARLY_END: Final = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now.\n"
)
FORM: Final = ReasoningForm("think", lambda template: START in template, START, "</think>", EARLY_END)
