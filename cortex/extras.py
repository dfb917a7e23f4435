"""The dependencies of a neuron that an installation lacks: a gateway's installation has none of them."""

import importlib.util

NEURON_MODULES = (
    "gguf",
    "jinja2",
    "llguidance",
    "numpy",
    "safetensors",
    "tokenizers",
    "torch",
)
"""Modules that a neuron's engine imports, of the extra ``neuron`` in pyproject.toml."""

INSTALL = "pip install 'helexa-cortex[neuron]'"
"""Command that installs them."""


def missing_for_neuron() -> list[str]:
    """Return the modules of a neuron that are not installed."""
    return [name for name in NEURON_MODULES if not _is_there(name)]


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
