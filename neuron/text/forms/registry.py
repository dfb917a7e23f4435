"""Forms of tool calls and of reasoning. A new one is a file beside this one and a line here."""

from typing import Final

from neuron.text.forms import (
    deepseek,
    gemma4,
    glm,
    hermes,
    invoke,
    kimi,
    llama,
    mistral,
    phi,
    pythonic,
    think,
    xml,
)
from neuron.text.forms.form import CallForm, ReasoningForm

HERMES: Final = hermes.FORM
"""Form of models whose templates show none."""
FORMS: Final = {
    form.name: form
    for form in (
        mistral.FORM,
        gemma4.FORM,
        kimi.FORM,
        deepseek.FORM,
        invoke.DSML_FORM,
        invoke.MINIMAX_FORM,
        phi.FORM,
        pythonic.FORM,
        pythonic.LLAMA_FORM,
        llama.FORM,
        glm.FORM,
        xml.FORM,
        HERMES,
    )
}
"""Forms by name, in the order in which templates are asked for them."""
ALWAYS_READ: Final = (HERMES, xml.FORM)
"""Forms that any model may write."""
REASONING_FORMS: Final = {form.name: form for form in (gemma4.REASONING, mistral.REASONING, think.FORM)}
"""Forms of reasoning by name."""
MARKERS: Final = frozenset(text for form in FORMS.values() for text in (form.marker, *form.tokens))
"""Texts that may be special tokens, which a tokenizer leaves out of its text."""


def form_of(template: str | None) -> CallForm:
    """Return the form that a chat template shows its model."""
    if template is None or "tools" not in template:
        return HERMES
    return next((form for form in FORMS.values() if form.is_shown(template)), HERMES)


def reasoning_of(template: str | None) -> ReasoningForm | None:
    """Return the form of reasoning that a chat template shows; ``None`` for a model that does not reason."""
    return next((form for form in REASONING_FORMS.values() if template is not None and form.is_shown(template)), None)
