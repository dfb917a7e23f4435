"""Writers of quantised checkpoints in safetensors, each of its ecosystem's layout, with the weights they stand for.

compressed-tensors' and transformers' own writers are used where there is one. AutoGPTQ and AutoAWQ cannot be installed
without a GPU's toolkit: their packing is written down here from its public layout.
"""

import inspect
import json
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Written = tuple[dict[str, torch.Tensor], torch.Tensor]
"""Tensors in place of a weight, by the ends of their names, and the weight ``[N, K]`` that they stand for."""
Writer = Callable[..., Written]
"""Function of a weight ``[N, K]``, or of a weight and its name."""

PROJECTION = re.compile(r"_proj(_\w+)?\.weight$")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def quantised_copy(
    folder: pathlib.Path,
    target: pathlib.Path,
    config: Mapping[str, Any],
    write: Writer,
    *,
    plain: Callable[[str], bool] = lambda name: False,
) -> dict[str, torch.Tensor]:
    """Write the checkpoint with its projections quantised, but ``plain`` ones; return the weights it stands for."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    takes_name, stored, expected = len(inspect.signature(write).parameters) > 1, {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not PROJECTION.search(name) or plain(name):
            stored[name] = expected[name] = tensor
            continue
        pieces, expected[name] = write(tensor.float(), *([name] if takes_name else []))
        stored |= {name.removesuffix("weight") + end: piece.contiguous() for end, piece in pieces.items()}
    save_file(stored, target / "model.safetensors")
    values = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**values, "quantization_config": config}))
    return expected


# ------------------------------------------------------------------ scales


def fp8(block: tuple[int, int] | None = None, *, by_row: bool = False, suffix: str = "weight_scale_inv") -> Writer:
    """Float8 with a scale for a block, a row or the tensor."""

    def write(weight: torch.Tensor) -> Written:
        rows, columns = weight.shape
        high, wide = block or ((1, columns) if by_row else (rows, columns))
        grid = -(-rows // high), -(-columns // wide)
        padded = torch.zeros(grid[0] * high, grid[1] * wide)
        padded[:rows, :columns] = weight
        scales = padded.view(grid[0], high, grid[1], wide).abs().amax((1, 3)) / 448
        spread = scales.repeat_interleave(high, 0).repeat_interleave(wide, 1)[:rows, :columns]
        quants = (weight / spread).to(torch.float8_e4m3fn)
        stored = scales if block or by_row else scales.view(())
        return {"weight": quants, suffix: stored}, quants.float() * spread

    return write


def transformers_fp8(weight: torch.Tensor) -> Written:
    """Blocks of transformers' own writer."""
    import types

    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    settings = types.SimpleNamespace(weight_block_size=[64, 64], scale_fmt=None)
    found = Fp8Quantize(types.SimpleNamespace(quantization_config=settings)).convert({"x.weight": weight})
    scales = found["x.weight_scale_inv"]
    whole = found["x.weight"].float() * scales.repeat_interleave(64, 0).repeat_interleave(64, 1)
    return {"weight": found["x.weight"], "weight_scale_inv": scales}, whole


def compressed(format: str, **weights: Any) -> Writer:
    """Weights of compressed-tensors' own writer and reader."""
    import pytest

    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    compressor = BaseCompressor.get_value_from_registry(format)

    def write(weight: torch.Tensor) -> Written:
        group = weights.get("group_size") or weight.shape[1]
        grouped = weight.view(len(weight), -1, group)
        least, greatest = grouped.amin(-1), grouped.amax(-1)
        if weights["strategy"] == "tensor":
            least, greatest = least.min().view(1), greatest.max().view(1)
        state = {"weight": weight}
        if weights["strategy"] == "tensor_group":
            state["weight_global_scale"] = generate_gparam(weight.min().view(1), weight.max().view(1))
        scale, zero = calculate_qparams(least, greatest, scheme.weights, state.get("weight_global_scale"))
        state |= {"weight_scale": scale, "weight_zero_point": zero.to(scheme.weights.zp_dtype or torch.int8)}
        stored = compressor.compress(state, scheme)
        if "weight_global_scale" in stored:  # its decompressor works in bfloat16
            numbers = unpack_fp4_from_uint8(stored["weight_packed"], *weight.shape, dtype=torch.float32)
            scales = stored["weight_scale"].float(), None, scheme.weights, torch.float32
            return stored, dequantize(numbers, *scales, global_scale=stored["weight_global_scale"])
        return stored, compressor.decompress(dict(stored), scheme)["weight"].float()

    return write


def modelopt_nvfp4() -> Writer:
    """ModelOpt's names and factor for the numbers of compressed-tensors."""
    write = compressed(
        "nvfp4-pack-quantized", type="float", num_bits=4, strategy="tensor_group", group_size=16, symmetric=True
    )

    def renamed(weight: torch.Tensor) -> Written:
        pieces, whole = write(weight)
        factor = 1 / pieces["weight_global_scale"].float()
        stored = {"weight": pieces["weight_packed"], "weight_scale": pieces["weight_scale"], "weight_scale_2": factor}
        return stored, whole

    return renamed


# ------------------------------------------------------------------ integers by group


def _rounded(weight: torch.Tensor, group: int, bits: int, symmetric: bool) -> tuple[torch.Tensor, ...]:
    """Levels ``[N, K]``, and scales (float16) and zero points ``[N, K / group]``."""
    grouped, top = weight.view(len(weight), -1, group), (1 << bits) - 1
    if symmetric:
        scales = (grouped.abs().amax(-1) * 2 / top).half().float()
        zeros = torch.full_like(scales, (top + 1) // 2)
    else:
        least, greatest = grouped.amin(-1), grouped.amax(-1)
        scales = ((greatest - least) / top).half().float()
        zeros = (-least / scales).round().clamp(1, top)
    levels = (grouped / scales[:, :, None]).round().add(zeros[:, :, None]).clamp(0, top)
    return levels.view(weight.shape).int(), scales, zeros.int()


def _words(numbers: torch.Tensor, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Numbers ``[a, b]`` packed along b, the lowest bits first."""
    places = order or tuple(range(32 // bits))
    lanes = numbers.long().view(len(numbers), -1, 32 // bits)
    words = sum(lanes[:, :, place] << bits * n for n, place in enumerate(places))
    return (words & 0xFFFFFFFF).view(torch.int64).to(torch.int64).sub((words >> 31 & 1) << 32).int()


def gptq(group: int, *, bits: int = 4, symmetric: bool = False, scattered: bool = False, offset: int = 1) -> Writer:
    """AutoGPTQ's layout; ``scattered``: with the order of ``desc_act``."""

    def write(weight: torch.Tensor) -> Written:
        columns = weight.shape[1]
        order = torch.randperm(columns, generator=torch.Generator().manual_seed(columns)) if scattered else None
        arranged = weight if order is None else weight[:, order]
        levels, scales, zeros = _rounded(arranged, group or columns, bits, symmetric)
        indices = torch.arange(columns, dtype=torch.int32) // (group or columns)
        spread = (levels - zeros[:, indices.long()]) * scales[:, indices.long()]
        if order is not None:
            back = order.argsort()
            levels, spread, indices = levels[:, back], spread[:, back], indices[back]
        stored = {
            "qweight": _words(levels, bits).t(),
            "qzeros": _words((zeros - offset).t().contiguous(), bits),
            "scales": scales.t().half(),
            "g_idx": indices,
        }
        return stored, spread

    return write


def awq(group: int) -> Writer:
    """AutoAWQ's layout for its ``gemm`` kernels."""

    def write(weight: torch.Tensor) -> Written:
        levels, scales, zeros = _rounded(weight, group, 4, symmetric=False)
        spread = (levels - zeros.repeat_interleave(group, 1)) * scales.repeat_interleave(group, 1)
        stored = {
            "qweight": _words(levels.t().contiguous(), 4, AWQ_ORDER),
            "qzeros": _words(zeros.t().contiguous(), 4, AWQ_ORDER),
            "scales": scales.t().half(),
        }
        return stored, spread

    return write
