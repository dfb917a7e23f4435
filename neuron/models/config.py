"""Configuration of a model, read from ``config.json`` or from GGUF metadata into one value.

Imports no torch: the daemon's preflight uses the same functions as the worker that loads the model.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

from neuron.device.jobs import Pooling
from neuron.layers.parameters import tensors_of
from neuron.models.embedding_folder import has_head, makes_embeddings, pooling_of
from neuron.models.ends import folder_ends, gguf_ends, token_ids
from neuron.models.errors import CorruptWeightsError, UnsupportedQuantizationError
from neuron.models.family import Family
from neuron.models.fields import Fields, GgufFields, JsonFields
from neuron.models.files import quoted, read_json_object
from neuron.models.gguf import UNREADABLE, GgufHeader, TensorInfo, TensorKind, name_of
from neuron.models.gguf_parts import read_parts
from neuron.models.model import GenerationDefaults, ModelConfig
from neuron.models.registry import find_family
from neuron.models.safetensors import TensorEntry, read_tensors
from neuron.models.schemes import quantization_config, read_schemes
from neuron.models.stored import by_tensor, unstacked
from neuron.models.wrappers import text_values


def read_config(path: pathlib.Path) -> ModelConfig:
    """Read the model at ``path``: a ``.gguf`` file, or a folder with ``config.json``.

    Raises :class:`CorruptWeightsError`, :class:`UnsupportedArchitectureError`, :class:`UnsupportedRopeError` or
    :class:`UnsupportedQuantizationError`.
    """
    if path.is_dir():
        return config_from_folder(path)
    try:
        return config_from_gguf(path, read_parts(path))
    except FileNotFoundError:
        raise CorruptWeightsError(path, "no such file or folder") from None


def config_from_folder(folder: pathlib.Path, entries: Mapping[str, TensorEntry] | None = None) -> ModelConfig:
    """Return the configuration of a folder, whose tensors are ``entries``; of a quantised model they are read."""
    path = folder / "config.json"
    values = read_json_object(path)
    if values is None:
        raise CorruptWeightsError(path, "no such file")
    class_names = JsonFields(path, values).names("architectures")
    fields = JsonFields(path, text_values(path, values))
    family = find_family(str(fields.value("model_type")), fields.names("architectures") or None, path)
    fields = JsonFields(path, {**family.defaults, **fields.values})
    quantization = quantization_config(folder, values)
    generation_path = folder / "generation_config.json"
    generation = read_json_object(generation_path) or {}
    embeds = makes_embeddings(folder, class_names)
    config = _with_draft_head(_built(family, fields), lambda: read_tensors(folder) if entries is None else entries)
    if (embeds or "text_config" in values) and (head := has_head(folder)) is not None:
        # Without a head nothing is generated, and a tied one takes no memory. Wrappers do not tell reliably.
        tied = not head or (embeds and config.head.tied)
        config = dataclasses.replace(config, head=dataclasses.replace(config.head, tied=tied))
    kinds = None
    if quantization is not None:
        kinds = read_schemes(path, quantization, read_tensors(folder) if entries is None else entries, config)
    return _with_ends(
        config,
        folder_ends(folder, (generation, *_configs(values))),
        bos_id=next(iter(token_ids(values, "bos_token_id", path)), None),
        generation=_generation(generation_path, generation, GENERATION_KEYS),
        pooling=pooling_of(folder),
        generates=not embeds,
        tensor_kinds=kinds or {},
    )


def config_from_gguf(path: pathlib.Path, header: GgufHeader) -> ModelConfig:
    """Return the configuration that a GGUF header holds; ``path`` is the file it was read from.

    Raises as :func:`read_config`.
    """
    values = header.metadata
    name = str(values.get("general.architecture"))
    fields = GgufFields(path, header, name)
    names = {tensor.name for tensor in header.tensors}
    config = _with_draft_head(_built(find_family(name, None, path), fields), lambda: names, gguf=True)
    stored = by_tensor(config, unstacked(header.tensors), path, gguf=True)
    kinds = {name: _kind_of(stored[name]) for name in config.tensors() if name in stored}
    return _with_ends(
        config,
        gguf_ends(values, path),
        bos_id=next(iter(token_ids(values, "tokenizer.ggml.bos_token_id", path)), None),
        generation=_generation(path, values, GGUF_GENERATION_KEYS),
        pooling=Pooling.MEAN if fields.values.get("pooling_type") == GGUF_MEAN_POOLING else Pooling.LAST,
        tensor_kinds=kinds,
    )


def _kind_of(tensor: TensorInfo) -> TensorKind:
    if not isinstance(tensor.kind, TensorKind) or tensor.kind in UNREADABLE:
        raise UnsupportedQuantizationError(
            f"{tensor.file}: {tensor.name} is stored as {name_of(tensor.kind)}, which cannot be read"
        )
    return tensor.kind


GGUF_MEAN_POOLING: Final = 1
"""Mean pooling as a ``pooling_type`` of GGUF; a decoder's other kinds amount to its last token."""
GENERATION_KEYS: Final = {field.name: field.name for field in dataclasses.fields(GenerationDefaults)}
GGUF_GENERATION_KEYS: Final = {
    "temperature": "general.sampling.temp",
    "top_p": "general.sampling.top_p",
    "top_k": "general.sampling.top_k",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}


def _built(family: Family, fields: Fields) -> ModelConfig:
    try:
        return family.build(fields)
    except ValueError as error:
        raise CorruptWeightsError(fields.path, str(error)) from error


def _with_draft_head(
    config: ModelConfig, read_names: Callable[[], Collection[str]], *, gguf: bool = False
) -> ModelConfig:
    """Return ``config`` without its draft head where the checkpoint has none, whatever its configuration tells."""
    if config.draft_head is None:
        return config
    beside = next(config.draft_parameters())
    wanted = {tensor.gguf if gguf else tensor.name for each in beside.values() for tensor in tensors_of(each)}
    try:
        names = read_names()
    except CorruptWeightsError:
        names = ()  # no file yet, or one that is refused later
    return config if wanted <= set(names) else config.without_draft_head()


def _with_ends(config: ModelConfig, eos_ids: tuple[int, ...], **facts: Any) -> ModelConfig:
    """Return ``config`` with its end tokens, without the ones that the model cannot sample, and other ``facts``."""
    ends = tuple(token for token in eos_ids if token < config.vocab_size)
    return dataclasses.replace(config, eos_ids=ends, **facts)


def _configs(values: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Return a configuration, and its text model's where it has several."""
    inner = values.get("text_config")
    return (values, inner) if isinstance(inner, dict) else (values,)


SAMPLING_RANGES: Final = {
    "temperature": (0.0, 1e3),
    "top_p": (0.0, 1.0),
    "top_k": (0, (1 << 31) - 1),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-3, 1e3),
}
"""Ranges of recommended sampling: a default beyond them would refuse every request that relies on it."""


def _generation(path: pathlib.Path, values: Mapping[str, Any], keys: Mapping[str, str]) -> GenerationDefaults:
    found: dict[str, Any] = {}
    for name, key in keys.items():
        value = values.get(key)
        if value is None:
            continue
        least, most = SAMPLING_RANGES[name]
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value <= most:
            raise CorruptWeightsError(path, f"{key} is {quoted(value)}, not a number from {least:g} to {most:g}")
        found[name] = int(value) if name == "top_k" else float(value)
    return GenerationDefaults(**found)
