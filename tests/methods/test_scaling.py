"""Scales per channel: AWQ's search and SmoothQuant's formula, by hand and against s = 1."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from nybble.calibrate.channels import Channels, channels_of
from nybble.calibrate.workers import Workers
from nybble.errors import NumericError, UsageError
from nybble.formats import parse_format
from nybble.methods import parse_method
from nybble.methods.steps.fitting import Scales
from nybble.methods.steps.scaling import EXPONENTS, awq_candidates, awq_scale, scaled_loss, smooth_scale

pytestmark = pytest.mark.usefixtures("one_thread")


def known(columns: int = 64, tokens: int = 300, seed: int = 0) -> tuple[Tensor, Channels]:
    """(activations, float32 [T, K], some channels far larger than others, and their statistics)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator) * torch.rand(columns, generator=generator).pow(6).mul(20).add(0.05)
    return x, Channels(x.abs().mean(0).double(), x.abs().amax(0).double(), 2 / tokens * x.double().T @ x.double())


def weights(columns: int = 64, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, columns, generator=generator) * 0.05 for rows in (48, 16)]


@pytest.mark.parametrize("scales", ["range", "search", "hqq"])
@pytest.mark.parametrize("spec", ["int4:g32", "int3:g64,asym", "int4:channel", "int4:tensor", "nf4:g64", "nf4:g64,dq"])
def test_awq_is_never_worse_than_no_scale(spec: str, scales: Scales) -> None:
    fmt = parse_format(spec)
    x, channels = known()
    two = weights()
    found = awq_scale(two, [fmt, fmt], channels, scales)
    assert found.before is not None
    assert found.after is not None
    assert found.after <= found.before
    assert channels.moment is not None

    def outputs(scale: Tensor) -> float:
        """The error at the outputs, from the activations themselves, over the outputs' squares."""
        error = energy = 0.0
        assert channels.moment is not None
        importance = channels.moment.diagonal() / scale**2
        for weight in two:
            wide = (weight * scale.float()).numpy()
            rounded = parse_method(f"rtn:scales={scales}").quantize(wide, fmt, (importance / importance.max()).float().numpy())
            value = torch.from_numpy(rounded.decode()) / scale.float()
            error += float((x @ (value - weight).T).double().square().sum())
            energy += float((x @ weight.T).double().square().sum())
        return error / energy

    assert found.before == pytest.approx(outputs(torch.ones(64, dtype=torch.float64)), rel=1e-3)
    assert found.after == pytest.approx(outputs(found.scale), rel=1e-2)


def test_awq_helps_where_channels_differ() -> None:
    fmt = parse_format("int3:g64,asym")
    found = awq_scale(weights(), [fmt, fmt], known()[1], "range")
    assert found.after is not None
    assert found.before is not None
    assert found.after < 0.8 * found.before


def test_the_candidates_by_hand() -> None:
    weight = torch.tensor([[1.0, -2.0, 4.0, 0.5], [3.0, 1.0, -1.0, 0.0]])
    mean = torch.tensor([4.0, 0.0, 1.0, 0.25], dtype=torch.float64)
    found = awq_candidates([weight], [parse_format("int4:channel")], mean)
    assert len(found) == 2 * len(EXPONENTS)
    assert torch.equal(found[0], torch.ones(4, dtype=torch.float64))
    plain = np.array([4.0, 1.0, 0.25]) ** 0.5
    plain /= np.sqrt(plain.max() * plain.min())
    half = EXPONENTS.index(0.5)
    np.testing.assert_allclose(found[half].numpy()[[0, 2, 3]], plain)
    share = np.array([(1 / 4 + 1) / 2, (1 + 1 / 3) / 2, (1 / 8) / 2])
    duo = np.array([4.0, 1.0, 0.25]) ** 0.5 / (share**0.5 + 1e-4)
    duo /= np.sqrt(duo.max() * duo.min())
    np.testing.assert_allclose(found[len(EXPONENTS) + half].numpy()[[0, 2, 3]], duo, rtol=1e-6)
    assert all(float(s[1]) == 1 for s in found)  # a channel that is always zero


def test_the_loss_by_hand() -> None:
    """One row, one block of two columns, int2 symmetric: levels -2 .. 1, plain scale absmax / 1."""
    weight, hessian = torch.tensor([[1.0, 0.4]]), torch.tensor([[1.0, 0.0], [0.0, 9.0]], dtype=torch.float64)
    fmt = parse_format("int2:channel")
    assert scaled_loss([weight], [fmt], hessian, torch.ones(2, dtype=torch.float64), "range") == pytest.approx(9 * 0.4**2)
    scale = torch.tensor([0.5, 1.0], dtype=torch.float64)  # (0.5, 0.4): both round to 0.5
    assert scaled_loss([weight], [fmt], hessian, scale, "range") == pytest.approx(9 * 0.1**2, rel=1e-5)


def test_smoothquant_by_hand() -> None:
    two = [torch.tensor([[1.0, -2.0, 0.0], [0.5, 1.0, 0.0]]), torch.tensor([[-4.0, 0.0, 0.0]])]
    channels = Channels(torch.ones(3), torch.tensor([16.0, 0.0, 1.0], dtype=torch.float64), None)
    found = smooth_scale(two, channels, 0.5)
    np.testing.assert_allclose(found.numpy(), [4 / 2, 1, 1 / np.sqrt(1e-5)])
    np.testing.assert_allclose(smooth_scale(two, channels, 1.0).numpy()[:1], [16])
    np.testing.assert_allclose(smooth_scale(two, channels, 0.0).numpy()[:1], [1 / 4])


def test_channels_are_those_of_all_windows() -> None:
    windows = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(0))
    for threads in (1, 2):
        with Workers(threads) as workers:
            found = channels_of(lambda w: windows[w], 7, True, workers)
        flat = windows.reshape(-1, 3).double()
        assert found.moment is not None
        torch.testing.assert_close(found.mean, flat.abs().mean(0))
        torch.testing.assert_close(found.largest, flat.abs().amax(0))
        torch.testing.assert_close(found.moment, 2 / 35 * flat.T @ flat, rtol=1e-5, atol=1e-6)


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match=r"smooth is the exponent of the activations' range and lies between 0 and 1, not 1\.5"):
        parse_method("smoothquant:smooth=1.5")
    with pytest.raises(UsageError, match="awq and smoothquant fold scales into the same places; use one of them"):
        parse_method("awq+smoothquant")
    assert parse_method("smoothquant:smooth=0.7").settings.smooth == 0.7
    assert parse_method("awq+gptq").settings.feedback
    assert parse_method("gptq+awq").settings.edit == "awq"
    fmt = parse_format("int4:g32")
    channels = known()[1]
    bad = weights()
    bad[1][0, 0] = float("nan")
    with pytest.raises(NumericError, match="1 of 1024 weights are not finite"):
        awq_scale(bad, [fmt, fmt], channels, "search")
    assert channels.moment is not None
    channels.moment[0, 0] = float("inf")
    with pytest.raises(NumericError, match="calibrate on other text"):
        awq_scale(weights(), [fmt, fmt], channels, "search")


def test_a_weight_that_a_scale_would_overflow_takes_none() -> None:
    """float16 scales of groups end at 65504: candidates beyond are no candidates."""
    fmt = parse_format("int4:g32")
    channels = known()[1]
    found = awq_scale([torch.full((4, 64), 4.5e5)], [fmt], channels, "range")
    assert torch.isfinite(found.scale).all()
    assert found.after is not None
    assert found.before is not None
    assert found.after <= found.before
