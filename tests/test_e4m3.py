# SPDX-License-Identifier: Apache-2.0
"""The e4m3 conversions against ml_dtypes and torch."""

import ml_dtypes
import numpy as np
import pytest

from cupy_moe import e4m3

SEED = 20762
CODES = np.arange(256, dtype=np.uint8)
MAGNITUDES = CODES[:0x7F].view(ml_dtypes.float8_e4m3fn).astype(np.float32)  # 0, 2**-9, ..., 448
HALFWAY = (MAGNITUDES[:-1] + MAGNITUDES[1:]) / 2  # exact in float32


def by_ml_dtypes(x):
    """Round to e4m3 with ml_dtypes, whose own cast makes NaN of what lies beyond the range."""
    clipped = np.clip(np.nan_to_num(x), -448, 448)
    codes = clipped.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return np.where(np.isnan(x), np.uint8(0x7F), codes)


def by_torch(x):
    """Round to e4m3 with torch on the CPU."""
    torch = pytest.importorskip("torch")
    clipped = torch.from_numpy(np.clip(x, -448, 448))
    codes = clipped.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    return np.where(np.isnan(x), np.uint8(0x7F), codes)


def both_signs(x):
    x = np.asarray(x, np.float32)
    return np.concatenate([x, -x])


def random_values():
    rng = np.random.default_rng(SEED)
    log_uniform = np.exp2(rng.uniform(-14, 10, 500_000)) * rng.choice([-1, 1], 500_000)
    any_bits = rng.integers(0, 2**32, 500_000, dtype=np.uint32).view(np.float32)
    return np.concatenate([log_uniform.astype(np.float32), any_bits])


INPUTS = {
    "every value": both_signs(MAGNITUDES),
    "halfway": both_signs(HALFWAY),
    "just above halfway": both_signs(np.nextafter(HALFWAY, np.float32(np.inf))),
    "just below halfway": both_signs(np.nextafter(HALFWAY, np.float32(0))),
    "float32 subnormals": both_signs([0, 1e-45, 1e-40, 1.1e-38, 1.2e-38]),
    "beyond the range": both_signs([448.1, 463.9, 464, 464.1, 480, 1e10, 3.4e38, np.inf]),
    "random, seed 20762": random_values(),
}


@pytest.mark.parametrize("by_other", [by_ml_dtypes, by_torch])
@pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
def test_encode(x, by_other):
    np.testing.assert_array_equal(e4m3.encode(x), by_other(x))


def test_encode_halfway_takes_the_even_code():
    lower = CODES[:0x7E]
    np.testing.assert_array_equal(e4m3.encode(HALFWAY), lower + lower % 2)


def test_encode_saturates():
    x = np.array([448, 463, 464, 465, 1e30, np.inf], np.float32)
    np.testing.assert_array_equal(e4m3.encode(x), np.full(6, 0x7E))
    np.testing.assert_array_equal(e4m3.encode(-x), np.full(6, 0xFE))


def test_encode_nan_of_either_sign():
    assert e4m3.encode(np.array([np.nan, -np.nan], np.float32)).tolist() == [0x7F, 0x7F]


def test_encode_keeps_the_sign_of_zero():
    assert e4m3.encode(np.array([0.0, -0.0, -1e-9], np.float32)).tolist() == [0x00, 0x80, 0x80]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_encode_other_types(dtype):
    x = np.random.default_rng(SEED).normal(0, 50, (7, 9)).astype(dtype)
    codes = e4m3.encode(x)
    assert codes.dtype == np.uint8
    np.testing.assert_array_equal(codes, by_ml_dtypes(x.astype(np.float32)))


@pytest.mark.parametrize("codes", [CODES, CODES.view(ml_dtypes.float8_e4m3fn)], ids=["uint8", "float8"])
def test_decode(codes):
    values = e4m3.decode(codes)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, CODES.view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    np.testing.assert_array_equal(np.signbit(values[:255]), CODES[:255] >= 0x80)


def test_decode_by_torch():
    torch = pytest.importorskip("torch")
    values = torch.from_numpy(CODES).view(torch.float8_e4m3fn).to(torch.float32).numpy()
    np.testing.assert_array_equal(e4m3.decode(CODES), values)


def test_encode_inverts_decode():
    expected = CODES.copy()
    expected[0xFF] = 0x7F
    np.testing.assert_array_equal(e4m3.encode(e4m3.decode(CODES)), expected)


def test_views_share_memory():
    codes = CODES.copy()
    values = e4m3.as_fp8(codes)
    assert values.dtype == ml_dtypes.float8_e4m3fn
    codes[0] = 0x38
    assert float(values[0]) == 1.0
    assert np.shares_memory(e4m3.as_codes(values), codes)


def test_is_fp8():
    assert e4m3.is_fp8(CODES)
    assert e4m3.is_fp8(CODES.view(ml_dtypes.float8_e4m3fn))
    assert not e4m3.is_fp8(CODES.view(np.int8))
    assert not e4m3.is_fp8(CODES.view(ml_dtypes.float8_e5m2))


def test_namespace_of_something_else():
    with pytest.raises(TypeError, match=r"NumPy or CuPy array, got builtins\.list"):
        e4m3.array_namespace([1.0])


@pytest.mark.parametrize("terms", [1, 16, 2880, 4096, 14336, 1 << 20])
def test_half_unit(terms):
    """The least power of two that the largest sum of so many products takes to be a float16."""
    largest, unit = np.float64(terms * 448.0**2), e4m3.half_unit(terms)
    assert np.frexp(unit)[0] == 0.5
    assert largest / unit <= 65504 < 2 * largest / unit
