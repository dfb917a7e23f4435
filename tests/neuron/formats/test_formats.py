"""Quantised matrices equal the gguf library's dequantised blocks, and rounding is optimal."""

import gguf
import pytest
import torch
from gguf_blocks import random_blocks

from neuron.formats.registry import FORMATS, ROUNDED_FORMATS, STORED_FORMATS
from neuron.formats.rounded import quantize_fp8, quantize_int4, quantize_int8


@pytest.mark.parametrize("kind", STORED_FORMATS)
def test_gguf_blocks_keep_their_values(kind: str) -> None:
    rows, columns = 3, 512
    which = gguf.GGMLQuantizationType[kind]
    blocks = random_blocks(which, rows * columns // STORED_FORMATS[kind].block)
    expected = gguf.quants.dequantize(blocks.reshape(rows, -1), which)
    matrix = STORED_FORMATS[kind].read(torch.from_numpy(blocks), rows)
    assert matrix.shape == (rows, columns)
    torch.testing.assert_close(matrix.dequantize(), torch.from_numpy(expected), rtol=1e-6, atol=1e-5)
    # Kernels read row behind row, also where a row is a single block.
    for shape in (rows, len(blocks)):
        assert all(
            array.is_contiguous() for array in STORED_FORMATS[kind].read(torch.from_numpy(blocks), shape).arrays()
        )


@pytest.mark.parametrize("name", FORMATS)
def test_the_layout_is_that_of_the_matrix(name: str) -> None:
    """Plans count bytes by the layout, and kernels are compiled for an empty matrix of it."""
    rows, columns = 3, 512
    layout = FORMATS[name].layout(columns)
    if name in STORED_FORMATS:
        format = STORED_FORMATS[name]
        blocks = torch.zeros((rows * columns // format.block, format.block_bytes), dtype=torch.uint8)
        matrix = format.read(blocks, rows)
    else:
        matrix = ROUNDED_FORMATS[name].quantize(torch.randn(rows, columns))
    empty = layout.empty(rows, columns, torch.device("cpu"))
    assert (matrix.quantization, matrix.group) == (empty.quantization, empty.group)
    assert [(a.shape, a.dtype) for a in matrix.arrays()] == [(a.shape, a.dtype) for a in empty.arrays()]
    assert matrix.nbytes == rows * layout.row_bytes(columns)


@pytest.mark.parametrize("group", [32, 128])
def test_rounding_errs_by_half_a_step(group: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 256)
    for matrix, steps in ((quantize_int8(weight), 254), (quantize_int4(weight, group), 15)):
        width = 256 if steps == 254 else group
        grouped = weight.view(5, -1, width)
        reach = 2 * grouped.abs().amax(-1) if steps == 254 else grouped.amax(-1) - grouped.amin(-1)
        error = (matrix.dequantize() - weight).view(5, -1, width).abs().amax(-1)
        assert (error <= 0.51 * reach / steps + 4e-3).all()
    fp8 = quantize_fp8(weight)
    assert ((fp8.dequantize() - weight).abs() <= weight.abs() / 16 + fp8.scales * 2**-9).all()
