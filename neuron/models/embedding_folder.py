"""Settings of a folder made for embeddings: the pooling of hidden states, and the absence of a head.

Sentence-transformers writes ``modules.json``, the modules that a text passes through, and the settings of each into a
folder of its own. Supported are a decoder, pooling by the last token or the mean of all, and scaling to length 1; a
repository with other modules is refused, since its vectors would differ. Format:
https://sbert.net/docs/sentence_transformer/usage/custom_models.html. Loads no torch.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, Final

from neuron.device.jobs import Pooling
from neuron.models.errors import CorruptWeightsError, UnsupportedArchitectureError
from neuron.models.files import is_name, quoted, read_bounded, read_json_object
from neuron.models.safetensors import read_tensors

_POOLINGS: Final = {"mean_tokens": Pooling.MEAN, "lasttoken": Pooling.LAST}
_STEPS: Final = frozenset({"Transformer", "Pooling", "Normalize"})


def makes_embeddings(folder: pathlib.Path, class_names: tuple[str, ...]) -> bool:
    """Whether the model in ``folder`` makes embeddings alone: saved so, or without a head."""
    if (folder / "modules.json").exists() or (folder / "1_Pooling").exists():
        return True
    return bool(class_names) and all(name.endswith("Model") for name in class_names)


def pooling_of(folder: pathlib.Path) -> Pooling:
    """Return the pooling of embeddings: the last token, unless the folder names another.

    Raises:
        UnsupportedArchitectureError: the pooling, or a further module, is not supported.
        CorruptWeightsError: the files are not such settings.
    """
    place = "1_Pooling"
    if (folder / "modules.json").exists():
        for kind, where in _steps(folder / "modules.json"):
            if kind not in _STEPS:
                raise UnsupportedArchitectureError(f"{folder}: a step {kind!r} of embeddings is not supported")
            if kind == "Pooling":
                place = where
    path = folder / place / "config.json"
    ways = _ways(read_json_object(path) or {})
    if not ways:
        return Pooling.LAST
    if len(ways) > 1 or ways[0] not in _POOLINGS:
        raise UnsupportedArchitectureError(
            f"{path}: pooling by {quoted(ways)} is not supported; supported are {', '.join(_POOLINGS)}"
        )
    return _POOLINGS[ways[0]]


def has_head(folder: pathlib.Path) -> bool | None:
    """Whether a checkpoint holds ``lm_head.weight``; ``None`` if it cannot be read, which is refused later."""
    try:
        return "lm_head.weight" in read_tensors(folder)
    except CorruptWeightsError:
        return None


def _steps(path: pathlib.Path) -> list[tuple[str, str]]:
    """Return the kind and the folder of each module."""
    try:
        steps = json.loads(read_bounded(path))
        found = [(str(step["type"]).rpartition(".")[2], str(step.get("path", ""))) for step in steps]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptWeightsError(path, f"not a list of steps: {error!r}"[:300]) from None
    # Only folders within this one: a repository's settings are as untrusted as its weights.
    if any(where and not is_name(where) for _, where in found):
        raise CorruptWeightsError(path, "a step's folder is outside of this one")
    return found


def _ways(values: Mapping[str, Any]) -> list[str]:
    named = values.get("pooling_mode")
    if isinstance(named, str):
        return ["mean_tokens" if named == "mean" else named]
    prefix = "pooling_mode_"
    return [key.removeprefix(prefix) for key, value in values.items() if key.startswith(prefix) and value is True]
