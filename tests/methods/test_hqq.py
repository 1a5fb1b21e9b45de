"""HQQ: its own objective never rises, falls on heavy tails, and the closed forms are what numpy says they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nybble.calibrate.statistics import Statistics
from nybble.errors import NumericError
from nybble.formats import parse_format
from nybble.methods import parse_method
from nybble.methods.steps.choose import choose
from nybble.methods.steps.fitting import BETA, POWER, fit_half_quadratic, fit_params, half_quadratic_loss, shrink

INDEPENDENT = ("int8:channel", "int4:channel", "int4:g64", "int4:g64,asym", "int3:g64,asym", "int2:g32", "nf4:g64", "fp4:g64")
SPECS = (*INDEPENDENT, "int4:tensor", "nf4:g64,dq")


def heavy(seed: int = 0, columns: int = 172) -> NDArray[np.float32]:
    """Student's t with three degrees of freedom; 172 columns leave a short last block."""
    return (np.random.default_rng(seed).standard_t(3, (24, columns)) * 0.02).astype(np.float32)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("seed", range(3))
def test_never_above_the_plain_range(spec: str, seed: int) -> None:
    weight, fmt = heavy(seed), parse_format(spec)
    plain, ours = (half_quadratic_loss(fmt, weight, params) for params in (fmt.fit(weight), fit_half_quadratic(fmt, weight)))
    assert ours.sum() <= plain.sum()
    if spec in INDEPENDENT:
        assert (ours <= plain * (1 + 1e-6)).all()
        assert ours.sum() < plain.sum()


@pytest.mark.parametrize(
    ("spec", "share"), [("int4:g64,asym", 0.98), ("int3:g64,asym", 0.97), ("int2:g64", 0.9), ("int3:g64", 0.99)]
)
def test_heavy_tails_gain(spec: str, share: float) -> None:
    weight, fmt = heavy(columns=256), parse_format(spec)
    ours = half_quadratic_loss(fmt, weight, fit_half_quadratic(fmt, weight)).sum()
    assert ours < share * half_quadratic_loss(fmt, weight, fmt.fit(weight)).sum()


@pytest.mark.parametrize("spec", SPECS)
def test_what_is_stored_is_what_was_judged(spec: str) -> None:
    weight, fmt = heavy(1), parse_format(spec)
    tensor = parse_method("hqq").quantize(weight, fmt)
    codes, params = fmt.from_storage(fmt.to_storage(tensor.codes, tensor.params), tensor.shape)
    np.testing.assert_array_equal(fmt.decode(codes, params), tensor.decode())
    np.testing.assert_array_equal(codes, fmt.encode(weight, params))


def test_the_shrinkage() -> None:
    """HQQ's operator by its formula; with beta large nothing is taken off."""
    error = np.array([-0.6, -0.05, 0.0, 0.2, 3.0])
    expected = [np.sign(e) * max(abs(e) - abs(e) ** (POWER - 1) / BETA, 0) if e else 0.0 for e in error]
    np.testing.assert_allclose(shrink(error, BETA), expected)
    assert (np.abs(shrink(error, 1e9)) <= np.abs(error)).all()
    np.testing.assert_allclose(shrink(error, 1e12), error, atol=1e-9)


def test_zeros_and_one_value() -> None:
    fmt = parse_format("int4:g32,asym")
    weight = np.zeros((2, 64), np.float32)
    weight[1] = 0.25
    params = fit_half_quadratic(fmt, weight)
    np.testing.assert_allclose(fmt.decode(fmt.encode(weight, params), params), weight, rtol=1e-3)


def test_no_scales_of_a_cast() -> None:
    fmt = parse_format("fp16")
    assert fit_params(fmt, heavy(), "hqq") == fit_params(fmt, heavy(), "range")


def test_weights_that_are_not_finite() -> None:
    weight = heavy()
    weight[2, 3] = np.inf
    with pytest.raises(NumericError, match="1 of 4128 weights are not finite, the first is inf at row 2, column 3"):
        fit_half_quadratic(parse_format("int4:g64"), weight)


def test_it_needs_no_data_and_joins_others() -> None:
    assert not parse_method("hqq").uses_calibration
    assert parse_method("gptq:scales=hqq").settings.scales == "hqq"
    assert parse_method("hqq+gptq").settings.feedback


@pytest.mark.parametrize("spec", ["int3:g64,asym", "int4:channel", "int4:tensor", "nf4:g64,dq"])
def test_with_feedback(spec: str) -> None:
    """Scales are fitted where the loop comes to a block, or before it; the result is no worse than rounding."""
    x = torch.randn(400, 172, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x @ (torch.eye(172, dtype=torch.float64) + 0.3 * torch.ones(172, 172, dtype=torch.float64) / 13)
    statistics = Statistics([2 / 400 * x.T @ x])
    weight, fmt = heavy(), parse_format(spec)
    tensor, account = choose(weight, fmt, parse_method("gptq:scales=hqq").settings, statistics)
    assert account.loss < account.loss_of_rounding
    np.testing.assert_array_equal(tensor.codes.shape, weight.shape)
