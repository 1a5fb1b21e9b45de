"""The tables of constants agree with where they come from."""

from __future__ import annotations

import hashlib
from statistics import NormalDist

import numpy as np

from nybble.formats.codebook import FP4, NF4, dynamic_levels, quantize_scales


def test_nf4_levels_are_quantiles_of_the_normal_distribution() -> None:
    outermost = (1 - 1 / 30 + 1 - 1 / 32) / 2
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in np.linspace(outermost, 0.5, 9)[:-1]]
    negative = [-quantile(p) for p in np.linspace(outermost, 0.5, 8)[:-1]]
    expected = np.sort([*positive, 0.0, *negative]) / max(positive)
    assert len(NF4) == 16
    np.testing.assert_allclose(NF4, expected, rtol=0, atol=2e-7)
    assert {-1.0, 0.0, 1.0} <= set(NF4)


def test_fp4_is_two_exponent_bits_and_one_mantissa_bit() -> None:
    magnitudes = sorted({abs(level) for level in FP4})
    assert magnitudes == [m / 12 for m in (0, 0.0625, 2, 3, 4, 6, 8, 12)]
    assert FP4[8:] == tuple(0.0 if level == 0 else -level for level in FP4[:8])
    assert not np.signbit(FP4[8])


def test_dynamic_levels() -> None:
    levels = dynamic_levels()
    assert levels.dtype == np.float32
    assert levels.shape == (256,)
    assert (np.diff(levels) > 0).all()
    assert levels[127] == 0
    assert levels[255] == 1
    assert np.array_equal(levels[:127], -levels[128:255][::-1])
    # Golden: the bytes of create_dynamic_map() of bitsandbytes 0.50.2.
    digest = hashlib.sha256(levels.astype("<f4").tobytes()).hexdigest()
    assert digest == "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"


def test_scales_equal_to_each_other_survive_double_quantization() -> None:
    scale = np.full((3, 7), 0.1, dtype=np.float32)
    params = quantize_scales(scale)
    assert params["scale_scale"].tolist() == [0.0]
    assert params["scale_offset"].tolist() == [np.float32(0.1)]
