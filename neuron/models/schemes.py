"""Schemes of the quantised weights of a checkpoint in safetensors, by what its files hold for each weight.

``quantization_config`` names the method and what the tensors do not show. Which modules are quantised, and in what
groups, is read from the tensors: lists of modules have the prefixes and patterns of the program that wrote them.
"""

import collections
import dataclasses
import math
import pathlib
from collections.abc import Container, Mapping
from typing import Any, Final, NamedTuple

from neuron.formats.scheme import Piece, Scheme, Settings
from neuron.formats.schemes import find_scheme
from neuron.layers.parameters import Matrix
from neuron.models.errors import CorruptWeightsError, UnsupportedQuantizationError
from neuron.models.files import quoted, read_json_object
from neuron.models.model import ModelConfig
from neuron.models.safetensors import FLOATS, TensorEntry

METHODS: Final = ("fp8", "fbgemm_fp8", "compressed-tensors", "awq", "gptq", "modelopt", "mxfp4")
"""Values of ``quant_method`` whose tensors are known."""
UNREAD: Final = (
    "input_scale",
    "activation_scale",
    "input_global_scale",
    "k_scale",
    "v_scale",
    "q_scale",
    "output_scale",
)
"""Scales of activations and of caches, which stay in the model's dtype here."""
STACK_ENDS: Final = {
    "": "weight", "_scale_inv": "weight_scale_inv", "_blocks": "weight_packed", "_scales": "weight_scale"
}  # fmt: skip
"""Ends of the names of the tensors of a stack of experts' weights, and of the same tensors of one weight.

MXFP4 of a stack, as gpt-oss has it, is ``_blocks`` ``[E, N, K / 32, 16]`` and ``_scales`` ``[E, N, K / 32]``."""
MAX_BLOCK: Final = 1 << 16


def quantization_config(folder: pathlib.Path, values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return what ``config.json`` or ModelOpt's own file has about quantisation; None if the model has none.

    Raises :class:`UnsupportedQuantizationError` for an unknown method.
    """
    inner = values.get("text_config")
    found = values.get("quantization_config") or (inner.get("quantization_config") if isinstance(inner, dict) else None)
    if not found and read_json_object(folder / "hf_quant_config.json") is not None:
        found = {"quant_method": "modelopt"}
    if not found:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else found
    if not isinstance(found, dict) or method not in METHODS:
        raise UnsupportedQuantizationError(
            f"{folder / 'config.json'}: quantization {quoted(method)} is not supported; supported are "
            f"{', '.join(METHODS)}"
        )
    return found


def is_quantised(folder: pathlib.Path) -> bool:
    """Whether a folder's configuration is of a quantised model. Raises as :func:`quantization_config`."""
    values = read_json_object(folder / "config.json")
    return values is not None and quantization_config(folder, values) is not None


def _settings(path: pathlib.Path, values: Mapping[str, Any]) -> Settings:
    """Return the settings of a checkpoint that its tensors do not show."""
    method, layout = values["quant_method"], values.get("checkpoint_format", values.get("version"))
    if method == "gptq":
        if layout not in (None, "gptq", "gptq_v2"):
            raise UnsupportedQuantizationError(f"{path}: GPTQ's layout {quoted(layout)} is not supported")
        offset = int(layout != "gptq_v2")
        return Settings(symmetric=values.get("sym") is True, zero_offset=offset, ordered=values.get("desc_act") is True)
    if method == "awq" and str(layout).lower() not in {"none", "gemm"}:
        raise UnsupportedQuantizationError(f"{path}: AWQ's layout {quoted(layout)} is not supported; gemm is")
    block = values.get("weight_block_size") or _block_structure(values.get("config_groups"))
    if block is None:
        return Settings()
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and 0 < n <= MAX_BLOCK for n in block):
        raise CorruptWeightsError(path, f"blocks of {quoted(block)} share a scale, which are no rows and columns")
    return Settings(block=(block[0], block[1]))


def _block_structure(groups: object) -> object:
    """Return the block of compressed-tensors' first group of modules that has one."""
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        block = weights.get("block_structure") if isinstance(weights, dict) else None
        if block is not None:
            return block
    return None


class Place(NamedTuple):
    """Place of a weight in a checkpoint: rows of a module's weight, of which it may be a part."""

    module: str
    first_row: int
    num_rows: int
    """Rows of the module's weight."""
    columns: int


def places_of(config: ModelConfig, stored: Container[str] = ()) -> dict[str, Place]:
    """Return the place of each weight ``[N, K]``, by name: within a fused module's where ``stored`` has that module."""
    found = {}
    for parameter in (each for parameters in config.parameters() for each in parameters.values()):
        if not isinstance(parameter, Matrix):
            continue
        fused = "" if parameter.fused is None else parameter.fused.name.removesuffix(".weight")
        total, first = sum(tensor.shape[0] for tensor in parameter.tensors), 0
        for tensor in parameter.tensors:
            rows, columns = tensor.shape
            own = Place(tensor.name.removesuffix(".weight"), 0, rows, columns)
            found[tensor.name] = Place(fused, first, total, columns) if fused and fused in stored else own
            first += rows
    return found


def read_schemes(
    path: pathlib.Path, values: Mapping[str, Any], entries: Mapping[str, TensorEntry], config: ModelConfig
) -> dict[str, Scheme]:
    """Return the scheme of each quantised weight of the model, by name.

    ``values`` is :func:`quantization_config` of the file ``path``. Raises :class:`CorruptWeightsError` for tensors that
    contradict the declared shape or each other, and :class:`UnsupportedQuantizationError`.
    """
    settings, modules = _settings(path, values), by_module(unstacked_weights(config, entries))
    found: dict[str, Scheme] = {}
    for name, place in places_of(config, modules).items():
        pieces = modules.get(place.module, {})
        if not pieces or (pieces.keys() == {"weight"} and pieces["weight"].dtype in FLOATS):
            continue
        try:
            scheme = find_scheme(pieces, place.num_rows, place.columns, settings)
        except ValueError as error:
            raise CorruptWeightsError(path, f"{name}: {error}") from error
        if scheme is None:
            held = ", ".join(f"{end} {piece.dtype} {list(piece.shape)}" for end, piece in sorted(pieces.items()))
            raise UnsupportedQuantizationError(f"{path}: {name} is stored as {held[:300]}, which is not supported")
        found[name] = scheme
    return found


def unstacked_weights(config: ModelConfig, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Return ``entries`` with each quantised stack of experts' weights as one weight, whose rows are those of all."""
    found = dict(entries)
    for parameter in (each for parameters in config.parameters() for each in parameters.values()):
        if not isinstance(parameter, Matrix) or parameter.fused is None or not parameter.num_experts:
            continue
        stack, columns = parameter.fused.name, parameter.tensors[0].shape[1]
        own = {end: found[stack + end] for end in STACK_ENDS if stack + end in found}
        if len(own) < 2:
            continue  # floats
        for end, entry in own.items():
            width = columns // 2 if end == "_blocks" else (entry.shape or (1,))[-1]
            rows = math.prod(entry.shape) // width if width else 0
            if rows * width == math.prod(entry.shape):
                del found[stack + end]
                found[f"{stack}.{STACK_ENDS[end]}"] = dataclasses.replace(entry, shape=(rows, width))
    return found


def by_module(entries: Mapping[str, TensorEntry]) -> dict[str, dict[str, Piece]]:
    """Return the tensors of each module that are read, by the ends of their names."""
    found: dict[str, dict[str, Piece]] = collections.defaultdict(dict)
    for name, entry in entries.items():
        module, _, end = name.rpartition(".")
        if end != "bias" and end not in UNREAD:
            found[module][end] = Piece(entry.dtype, entry.shape)
    return found


def whole_shapes(
    entries: Mapping[str, TensorEntry], places: Mapping[str, Place], config: ModelConfig
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a checkpoint's tensors, with each quantised weight of ``places`` as one tensor."""
    modules = {place.module for place in places.values()}
    found = {}
    for name, entry in entries.items():
        module, _, end = name.rpartition(".")
        if end == "bias" or (module not in modules and not (places and end in UNREAD)):
            found[name] = entry.shape
    shapes = config.tensor_shapes()
    return found | {name: shapes[name] for name in places}
