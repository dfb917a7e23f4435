"""Packing, and products with packed matrices, against dequantised float64: every format, level and irregular shape."""

import gguf
import numpy as np
import pytest
from gguf_blocks import stored_as
from hypothesis import given, settings
from hypothesis import strategies as st

from neuron.cpu_kernels import native
from neuron.models.gguf import TensorKind
from neuron.models.packed import Format, padded

LEVELS = native.levels()
POOL = native.Pool(2)
EXACT = {TensorKind.Q4_0: Format.W4, TensorKind.Q4_1: Format.W4, TensorKind.Q5_0: Format.W8, TensorKind.Q8_0: Format.W8,
         TensorKind.IQ4_NL: Format.IQ4, TensorKind.MXFP4: Format.FP4, TensorKind.F32: Format.W32,
         TensorKind.BF16: Format.W16}  # fmt: skip


K_KINDS = (TensorKind.Q2_K, TensorKind.Q3_K, TensorKind.Q4_K, TensorKind.Q5_K, TensorKind.Q6_K)


def stored_of(kind: TensorKind, rows: int, columns: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return bytes of a kind, random where the gguf library does not write it, and their values by the library."""
    values = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    if kind is TensorKind.F32:
        return values.view(np.uint8).reshape(-1), values
    packed = stored_as(values, gguf.GGMLQuantizationType(kind))
    read = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType(kind))
    return np.ascontiguousarray(packed).view(np.uint8).reshape(-1), read.reshape(rows, columns)


def packed_of(kind: TensorKind, format: Format, rows: int, columns: int, seed: int = 0):
    stored, values = stored_of(kind, rows, columns, seed)
    packed = np.full(native.packed_bytes(format, rows, columns), 0xAA, np.uint8)
    native.pack(POOL, stored, kind, rows, columns, packed, format)
    return native.Matrix(packed, format, rows, columns), values


def unpacked(matrix: native.Matrix, rows: int, columns: int) -> np.ndarray:
    out = np.empty((rows, columns), np.float32)
    for row in range(rows):
        matrix.unpack_row(row, out[row])
    return out


@pytest.mark.parametrize("kind", EXACT, ids=lambda kind: kind.name)
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 50])
def test_packing_keeps_every_value(kind: TensorKind, rows: int) -> None:
    columns = 96
    matrix, values = packed_of(kind, EXACT[kind], rows, columns)
    np.testing.assert_array_equal(unpacked(matrix, rows, columns), values)
    for row in range(rows, padded(rows)):
        assert not unpacked(matrix, padded(rows), columns)[row].any()


@pytest.mark.parametrize(
    ("kind", "format", "tolerance"),
    [
        (TensorKind.Q4_K, Format.W4, 2**-10),  # the scale's rounding to float16
        (TensorKind.IQ4_XS, Format.IQ4, 2**-10),
        (TensorKind.Q6_K, Format.W8, 1 / 200),  # half a level of 254
        (TensorKind.IQ4_XS, Format.W8, 1 / 200),
        (TensorKind.MXFP4, Format.W8, 1 / 200),
        (TensorKind.F16, Format.W8, 1 / 200),
        (TensorKind.Q4_1, Format.W8, 1 / 200),
        (TensorKind.F16, Format.W16, 2**-8),
        (TensorKind.Q8_0, Format.W16, 2**-8),
        *((kind, Format.W32, 1e-6) for kind in K_KINDS),
        (TensorKind.Q5_1, Format.W32, 1e-6),
        (TensorKind.Q5_1, Format.W8, 1 / 200),
    ],
)
def test_packing_another_kind_is_close(kind: TensorKind, format: Format, tolerance: float) -> None:
    matrix, values = packed_of(kind, format, 33, 512)
    blocks = values.reshape(33, -1, 32)
    error = np.abs(unpacked(matrix, 33, 512).reshape(blocks.shape) - blocks)
    assert (error <= tolerance * np.abs(blocks).max(-1, keepdims=True)).all()


def test_lengths_are_checked() -> None:
    stored, _ = stored_of(TensorKind.Q4_1, 16, 64)
    packed = np.zeros(native.packed_bytes(Format.W4, 16, 64), np.uint8)
    for wrong in (
        lambda: native.pack(POOL, stored[:-1], TensorKind.Q4_1, 16, 64, packed, Format.W4),
        lambda: native.pack(POOL, stored, TensorKind.Q4_1, 16, 64, packed[:-1], Format.W4),
        lambda: native.pack(POOL, stored, TensorKind.Q4_1, 16, 64, packed, Format.W4, first_block=1),
        lambda: native.pack(POOL, stored, TensorKind.Q8_0, 16, 64, packed, Format.W4),
        lambda: native.pack(POOL, stored, TensorKind.MXFP4, 16, 64, packed, Format.IQ4),
        lambda: native.pack(POOL, stored, TensorKind.IQ2_S, 16, 64, packed, Format.W8),
        lambda: native.Matrix(packed[:-1], Format.W4, 16, 64),
        lambda: native.Matrix(packed, Format.W4, 16, 63),
        lambda: native.linear("avx1024", native.Matrix(packed, Format.W4, 16, 64), *two(1, 64, 16)),
        lambda: native.linear(LEVELS[0], native.Matrix(packed, Format.W4, 16, 64), *two(1, 63, 16)),
        lambda: native.linear(LEVELS[0], native.Matrix(packed, Format.W4, 16, 64), *two(1, 64, 17)),
    ):
        with pytest.raises(ValueError):
            wrong()


def two(tokens: int, columns: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((tokens, columns), np.float32), np.zeros((tokens, rows), np.float32)


def rounded(x: np.ndarray, format: Format) -> np.ndarray:
    """Return the activations as rounded for a matrix of this format."""
    if format is Format.W32:
        return x.astype(np.float64)
    if format is Format.W16:
        bits = x.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32).astype(np.float64)
    groups = x.reshape(len(x), -1, 32)
    largest = np.abs(groups).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    codes = np.rint(groups * inverse)
    return (codes * (largest / np.float32(127))).astype(np.float64).reshape(x.shape)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from([*EXACT]),
    rows=st.integers(1, 70),
    groups=st.integers(1, 9),
    tokens=st.integers(1, 35),
    mode=st.sampled_from(["store", "add"]),
    seed=st.integers(0, 1000),
)
@pytest.mark.parametrize("level", LEVELS)
def test_linear(level: str, kind: TensorKind, rows: int, groups: int, tokens: int, mode: str, seed: int) -> None:
    format = EXACT[kind]
    columns = groups * 32 - (seed % 31 if format in (Format.W32,) else 0)
    matrix, values = packed_of(kind, format, rows, columns, seed)
    random = np.random.default_rng(seed)
    x = random.standard_normal((tokens, columns)).astype(np.float32) * np.float32(random.choice([1e-3, 1, 50]))
    y = random.standard_normal((tokens, padded(rows))).astype(np.float32)
    expected = rounded(x, format) @ values.astype(np.float64).T
    scale = np.abs(rounded(x, format)) @ np.abs(values.astype(np.float64)).T
    if mode == "add":
        expected += y[:, :rows]
        scale += np.abs(y[:, :rows])
    native.linear(level, matrix, x, y, mode)
    assert (np.abs(y[:, :rows] - expected) <= 3e-6 * scale + 1e-30).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("kind", "block", "weight"),
    [
        (TensorKind.Q4_1, bytes(2) + b"\xff" * 16, 15),
        (TensorKind.Q4_1, bytes(2) + b"\x00" * 16, 0),
        (TensorKind.Q8_0, b"\x80" * 32, -128),
        (TensorKind.Q8_0, b"\x7f" * 32, 127),
        (TensorKind.IQ4_NL, b"\x00" * 16, -127),
        (TensorKind.IQ4_NL, b"\xff" * 16, 113),
    ],
)
def test_the_largest_codes_do_not_saturate(level: str, kind: TensorKind, block: bytes, weight: int) -> None:
    """Every weight and every activation at the end of its range: where 16-bit partial sums would overflow."""
    columns, format = 64, EXACT[kind]
    one = np.array([1.0], np.float16).view(np.uint8).tobytes()
    stored = np.frombuffer((one + block) * (16 * columns // 32), np.uint8)
    packed = np.zeros(native.packed_bytes(format, 16, columns), np.uint8)
    native.pack(POOL, stored, kind, 16, columns, packed, format)
    matrix = native.Matrix(packed, format, 16, columns)
    for sign in (1, -1):
        x = np.full((9, columns), 127.0 * sign, np.float32)
        y = np.zeros((9, 16), np.float32)
        native.linear(level, matrix, x, y)
        np.testing.assert_array_equal(y, 127.0 * sign * columns * weight)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("tokens", [1, 5, 11])
@pytest.mark.parametrize("mode", ["swiglu", "geglu"])
def test_gates_and_bias(level: str, tokens: int, mode: str) -> None:
    rows, columns = 20, 45
    gate, up = (stored_of(TensorKind.F32, rows, columns, seed) for seed in (1, 2))
    packed = np.zeros(2 * native.packed_bytes(Format.W32, rows, columns), np.uint8)
    for first, (stored, _) in enumerate((gate, up)):
        native.pack(POOL, stored, 0, rows, columns, packed, Format.W32, first_block=first, block_step=2)
    matrix = native.Matrix(packed, Format.W32, 2 * padded(rows), columns)
    x = np.random.default_rng(3).standard_normal((tokens, columns)).astype(np.float32) * 3
    y = np.zeros((tokens, padded(rows)), np.float32)
    native.linear(level, matrix, x, y, mode)
    gates, ups = (x.astype(np.float64) @ values.astype(np.float64).T for _, values in (gate, up))
    if mode == "swiglu":
        gated = gates / (1 + np.exp(-gates))
    else:
        gated = gates / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gates + 0.044715 * gates**3)))
    np.testing.assert_allclose(y[:, :rows], gated * ups, rtol=2e-5, atol=2e-5)
    bias = np.arange(32, dtype=np.float32)
    plain = np.zeros(native.packed_bytes(Format.W32, rows, columns), np.uint8)
    native.pack(POOL, gate[0], 0, rows, columns, plain, Format.W32)
    y = np.zeros((tokens, padded(rows)), np.float32)
    native.linear(level, native.Matrix(plain, Format.W32, rows, columns, bias), x, y)
    np.testing.assert_allclose(y[:, :rows], gates + bias[:rows], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", EXACT, ids=lambda kind: kind.name)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_nan_stays_in_its_row(level: str, kind: TensorKind, bad: float) -> None:
    matrix, _ = packed_of(kind, EXACT[kind], 40, 64)
    x = np.random.default_rng(0).standard_normal((9, 64)).astype(np.float32)
    x[4, 37] = bad
    y = np.zeros((9, 48), np.float32)
    native.linear(level, matrix, x, y)
    assert not np.isfinite(y[4, :40]).any()
    assert np.isfinite(y[[0, 1, 2, 3, 5, 6, 7, 8]]).all()


@pytest.mark.parametrize(
    "kind", [TensorKind.Q4_0, TensorKind.IQ4_NL, TensorKind.MXFP4, TensorKind.Q8_0], ids=lambda kind: kind.name
)
def test_levels_with_the_same_operations_give_the_same_bits(kind: TensorKind) -> None:
    """Integer products are exact, and all but the portable level multiply and add in one rounding."""
    fused = [level for level in LEVELS if level != "portable"]
    matrix, _ = packed_of(kind, EXACT[kind], 64, 256)
    x = np.random.default_rng(5).standard_normal((11, 256)).astype(np.float32)
    found = []
    for level in fused:
        y = np.zeros((11, 64), np.float32)
        native.linear(level, matrix, x, y)
        found.append(y)
    assert all(np.array_equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("count", [1, 15, 16, 17, 32, 48, 576, 1000])
def test_rms_norm(level: str, count: int) -> None:
    random = np.random.default_rng(count)
    x, weight, out = (np.zeros(padded(count), np.float32) for _ in range(3))
    x[:count], weight[:count] = random.standard_normal(count), random.random(count)
    native.rms_norm(level, x, weight, 1e-5, count, out)
    exact = x.astype(np.float64)
    expected = exact / np.sqrt((exact**2).sum() / count + 1e-5) * weight
    np.testing.assert_allclose(out, expected, rtol=2e-6, atol=1e-7)
    assert not out[count:].any()


@pytest.mark.parametrize("format", EXACT.values(), ids=lambda format: format.name)
@pytest.mark.parametrize("level", LEVELS)
def test_a_product_is_the_same_beside_others(level: str, format: Format) -> None:
    kind = next(kind for kind, found in EXACT.items() if found is format)
    matrix, _ = packed_of(kind, format, 50, 96)
    x = np.random.default_rng(3).standard_normal((37, 96)).astype(np.float32)
    x[5, 7] = 300.0  # coarse: its rounding remainder is multiplied too
    together = np.zeros((37, padded(50)), np.float32)
    native.linear(level, matrix, x, together)
    fetched = np.zeros_like(together)
    native.linear(level, matrix, x, fetched, into_l2=True)
    assert fetched.tobytes() == together.tobytes()
    for first, end in ((0, 1), (5, 6), (3, 10), (5, 8), (30, 37), (1, 6)):
        own = np.zeros((end - first, padded(50)), np.float32)
        native.linear(level, matrix, np.ascontiguousarray(x[first:end]), own)
        assert own.tobytes() == together[first:end].tobytes()
