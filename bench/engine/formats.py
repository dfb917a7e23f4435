"""Bits of a weight in each GGUF kind, and each scheme of safetensors, in the file, on a GPU and on a CPU; and how fast
a load changes its form.

A matrix of 4096 by 4096, which the caches do not hold. "to a GPU's form" is the work that a load leaves to the device,
here done by torch on this CPU; "to the CPU's form" is the packing for the C kernels, by way of float32 where they do
not read the kind. Both are bytes of the file a second, beside a plain copy of as many.

    python bench/engine/formats.py [--keep]
"""

from typing import Any, Final

import gguf
import numpy as np
import report
import torch

from neuron.cpu_kernels import native
from neuron.formats.registry import STORED_FORMATS
from neuron.formats.scheme import Piece, Settings
from neuron.formats.schemes import find_scheme
from neuron.models.gguf import UNREADABLE, TensorKind
from neuron.models.packed import Format
from neuron.models.weights import StoredTensor

ROWS = COLUMNS = 4096
REPEATS = 3
FORMATS = (Format.W4, Format.IQ4, Format.FP4, Format.W8)
"""Forms of quantised weights in the CPU kernels, narrowest first."""


def measured(kind: TensorKind, pool: native.Pool) -> dict[str, Any]:
    """Return the row of a kind."""
    block, block_bytes = kind.block, kind.block_bytes
    file_bytes = ROWS * COLUMNS // block * block_bytes
    # Numbers of any size take as long; zeros are finite in every kind.
    stored = np.zeros(file_bytes, np.uint8)
    blocks, copy = torch.from_numpy(stored).view(-1, block_bytes), torch.empty(file_bytes, dtype=torch.uint8)
    row: dict[str, Any] = {"kind": kind.name, "bits in the file": 8 * block_bytes / block}
    on_device = STORED_FORMATS.get(kind.name)
    row["bits on a GPU"] = 16.0 if on_device is None else 8 * on_device.device_layout.row_bytes(COLUMNS) / COLUMNS
    form = next((each for each in FORMATS if native.can_pack(kind, each)), Format.W8)
    packed = np.zeros(native.packed_bytes(form, ROWS, COLUMNS), np.uint8)
    row["bits on a CPU"] = 8 * packed.nbytes / (ROWS * COLUMNS)

    def pack() -> None:
        if native.can_pack(kind, form):
            native.pack(pool, stored, kind, ROWS, COLUMNS, packed, form)
        else:
            wide = gguf.quants.dequantize(stored.reshape(ROWS, -1), gguf.GGMLQuantizationType(kind))
            native.pack(pool, wide.reshape(-1).view(np.uint8), TensorKind.F32, ROWS, COLUMNS, packed, form)

    def unpack() -> object:
        if on_device is not None:
            return on_device.read(blocks, ROWS)
        return StoredTensor(kind, stored).values(ROWS, 0, ROWS).bfloat16()

    for name, call in (("to a GPU's form", unpack), ("to the CPU's form", pack)):
        row[f"GB/s {name}"] = file_bytes / report.best_ns(call, repeats=REPEATS)
    row["GB/s copied"] = file_bytes / report.best_ns(lambda: copy.copy_(blocks.view(-1)), repeats=REPEATS)
    return row


GROUPS, TILES = COLUMNS // 128, (ROWS // 128, COLUMNS // 128)
SCHEMES: Final[dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]]] = {
    "fp8, blocks of 128": {
        "weight": (torch.float8_e4m3fn, (ROWS, COLUMNS)), "weight_scale_inv": (torch.float32, TILES),
    },
    "fp8, rows": {"weight": (torch.float8_e4m3fn, (ROWS, COLUMNS)), "weight_scale": (torch.float32, (ROWS, 1))},
    "compressed-tensors int8, rows": {
        "weight": (torch.int8, (ROWS, COLUMNS)), "weight_scale": (torch.bfloat16, (ROWS, 1)),
    },
    "compressed-tensors int4, groups of 128": {
        "weight_packed": (torch.int32, (ROWS, COLUMNS // 8)), "weight_scale": (torch.bfloat16, (ROWS, GROUPS)),
    },
    "GPTQ int4, groups of 128": {
        "qweight": (torch.int32, (COLUMNS // 8, ROWS)), "qzeros": (torch.int32, (GROUPS, ROWS // 8)),
        "scales": (torch.float16, (GROUPS, ROWS)),
    },
    "AWQ int4, groups of 128": {
        "qweight": (torch.int32, (COLUMNS, ROWS // 8)), "qzeros": (torch.int32, (GROUPS, ROWS // 8)),
        "scales": (torch.float16, (GROUPS, ROWS)),
    },
    "NVFP4": {
        "weight_packed": (torch.uint8, (ROWS, COLUMNS // 2)),
        "weight_scale": (torch.float8_e4m3fn, (ROWS, COLUMNS // 16)), "weight_global_scale": (torch.float32, (1,)),
    },
    "MXFP4": {
        "weight_packed": (torch.uint8, (ROWS, COLUMNS // 2)), "weight_scale": (torch.uint8, (ROWS, COLUMNS // 32)),
    },
}  # fmt: skip
"""Tensors of a weight in each scheme."""
DTYPES: Final = {
    torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int8: "I8", torch.int32: "I32", torch.uint8: "U8",
}  # fmt: skip


def measured_scheme(name: str, pool: native.Pool) -> dict[str, Any]:
    """Return the row of a scheme of safetensors."""
    tensors = {end: torch.ones(shape).to(dtype) for end, (dtype, shape) in SCHEMES[name].items()}
    pieces = {end: Piece(DTYPES[tensor.dtype], tuple(tensor.shape)) for end, tensor in tensors.items()}
    scheme = find_scheme(pieces, ROWS, COLUMNS, Settings())
    assert scheme is not None
    rows, columns = range(ROWS), range(COLUMNS)
    layout = scheme.layout(columns)
    assert layout is not None
    file_bytes = sum(tensor.nbytes for tensor in tensors.values())
    kind = TensorKind[scheme.block_kind] if scheme.block_kind else TensorKind.F32
    form = next((each for each in FORMATS if scheme.block_kind and native.can_pack(kind, each)), Format.W16)
    packed = np.zeros(native.packed_bytes(form, ROWS, COLUMNS), np.uint8)

    def take(end: str, *index: slice) -> torch.Tensor:
        return tensors[end][index]

    def pack() -> None:
        values = scheme.blocks(take, rows) if scheme.block_kind else scheme.expand(take, rows, columns)
        native.pack(pool, values.view(torch.uint8).view(-1).numpy(), kind, ROWS, COLUMNS, packed, form)

    copy, whole = torch.empty(file_bytes, dtype=torch.uint8), torch.zeros(file_bytes, dtype=torch.uint8)
    return {
        "kind": name,
        "bits in the file": 8 * file_bytes / (ROWS * COLUMNS),
        "bits on a GPU": 8 * layout.nbytes(ROWS, COLUMNS) / (ROWS * COLUMNS),
        "bits on a CPU": 8 * packed.nbytes / (ROWS * COLUMNS),
        "GB/s to a GPU's form": file_bytes / report.best_ns(lambda: scheme.read(take, rows, columns), repeats=REPEATS),
        "GB/s to the CPU's form": file_bytes / report.best_ns(pack, repeats=REPEATS),
        "GB/s copied": file_bytes / report.best_ns(lambda: copy.copy_(whole), repeats=REPEATS),
    }


def main() -> None:
    """Measure and print; ``--keep`` writes the result."""
    keep = report.arguments(__doc__).parse_args().keep
    kinds = [kind for kind in TensorKind if kind.block > 1 and kind not in UNREADABLE]
    pool = native.Pool(torch.get_num_threads())
    report.write(
        "formats",
        [*(measured(kind, pool) for kind in kinds), *(measured_scheme(name, pool) for name in SCHEMES)],
        question="How many bits does a weight take in each form, and how fast does a load change its form?",
        packages=["torch", "gguf", "numpy"],
        keep=keep,
    )


if __name__ == "__main__":
    main()
