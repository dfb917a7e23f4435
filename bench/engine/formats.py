"""Bits of a weight in each GGUF kind, in the file, on a GPU and on a CPU; and how fast a load changes its form.

A matrix of 4096 by 4096, which the caches do not hold. "to a GPU's form" is the work that a load leaves to the device,
here done by torch on this CPU; "to the CPU's form" is the packing for the C kernels, by way of float32 where they do
not read the kind. Both are bytes of the file a second, beside a plain copy of as many.

    python bench/engine/formats.py [--keep]
"""

from typing import Any

import gguf
import numpy as np
import report
import torch

from neuron.cpu_kernels import native
from neuron.formats.registry import STORED_FORMATS
from neuron.models.gguf import BLOCKS, UNREADABLE, TensorKind
from neuron.models.packed import Format
from neuron.models.weights import StoredTensor

ROWS = COLUMNS = 4096
REPEATS = 3
FORMATS = (Format.W4, Format.IQ4, Format.FP4, Format.W8)
"""Forms of quantised weights in the CPU kernels, narrowest first."""


def measured(kind: TensorKind, pool: native.Pool) -> dict[str, Any]:
    """Return the row of a kind."""
    block, block_bytes = BLOCKS[kind]
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


def main() -> None:
    """Measure and print; ``--keep`` writes the result."""
    keep = report.arguments(__doc__).parse_args().keep
    kinds = [kind for kind in TensorKind if BLOCKS[kind][0] > 1 and kind not in UNREADABLE]
    pool = native.Pool(torch.get_num_threads())
    report.write(
        "formats",
        [measured(kind, pool) for kind in kinds],
        question="How many bits does a weight take in each GGUF kind, and how fast does a load change its form?",
        packages=["torch", "gguf", "numpy"],
        keep=keep,
    )


if __name__ == "__main__":
    main()
