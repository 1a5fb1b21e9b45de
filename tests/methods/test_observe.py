"""Static grids: histograms against numpy, every observer against a brute-force search that does it in another way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nybble.calibrate.histogram import BINS, Histogram, input_histograms
from nybble.errors import NumericError
from nybble.formats.activations import MIDDLE, Activations
from nybble.methods import parse_method
from nybble.methods.steps.observe import find_limit, grid_to, squared_error, static_grid
from nybble.methods.steps.settings import Settings

OBSERVERS = ("minmax", "percentile", "mse", "entropy")


def values(kind: str, count: int = 20_000) -> NDArray[np.float32]:
    random = np.random.default_rng(5)
    if kind == "gelu":
        x = random.standard_normal(count)
        return (x / (1 + np.exp(-1.702 * x))).astype(np.float32)
    if kind == "heavy":
        return random.standard_t(2, count).astype(np.float32)
    if kind == "negative":
        return -random.gamma(2, 3, count).astype(np.float32)
    return random.standard_normal(count).astype(np.float32)


KINDS = ("normal", "gelu", "heavy", "negative")


def histogram_of(x: NDArray[np.float32], pieces: int = 1) -> Histogram:
    histogram = Histogram()
    for piece in np.array_split(x, pieces):
        histogram.add(torch.from_numpy(piece))
    return histogram


@pytest.mark.parametrize("kind", KINDS)
def test_the_histogram_is_that_of_numpy_however_it_is_cut(kind: str) -> None:
    x = values(kind)
    whole = histogram_of(x)
    largest = float(np.abs(x).max())
    assert largest < whole.range <= 2 * largest
    edges = np.arange(BINS + 1) * whole.width
    np.testing.assert_array_equal(whole.magnitudes, np.histogram(np.abs(x), edges)[0])
    np.testing.assert_array_equal(whole.counts[0], np.histogram(-x[x < 0], edges)[0])
    assert (whole.low, whole.high) == (min(0, x.min()), max(0, x.max()))
    ascending = x[np.argsort(np.abs(x))]  # the range doubles all the way up
    for other in (histogram_of(x, 7), histogram_of(ascending, 50), histogram_of(ascending[::-1].copy(), 50)):
        np.testing.assert_array_equal(other.counts, whole.counts)
        assert (other.range, other.low, other.high) == (whole.range, whole.low, whole.high)


def test_histograms_of_little() -> None:
    histogram = Histogram()
    histogram.add(torch.empty(0, 4))
    histogram.add(torch.zeros(3, 4))
    assert static_grid(histogram, Settings()) == Activations("static", scale=1, zero=MIDDLE)
    histogram.add(torch.full((1,), 1e-44))
    for observer in OBSERVERS:
        assert static_grid(histogram, parse_method(f"static:observer={observer}").settings).scale > 0
    histogram.add(torch.full((1,), 3e38))
    assert histogram.magnitudes.sum() == 14
    with pytest.raises(NumericError, match="inputs are not finite in calibration"):
        histogram.add(torch.tensor([1.0, float("inf")]))


@pytest.mark.parametrize("observer", OBSERVERS)
def test_a_single_value(observer: str) -> None:
    for value in (3.0, -0.7):
        grid = static_grid(
            histogram_of(np.full(100, value, dtype=np.float32)), parse_method(f"static:observer={observer}").settings
        )
        code = np.clip(np.rint(value / grid.scale) + grid.zero, 0, 255) - grid.zero
        assert abs(code * grid.scale - value) <= 0.51 * grid.scale


@pytest.mark.parametrize("kind", KINDS)
def test_minmax_and_percentile(kind: str) -> None:
    x = values(kind)
    histogram = histogram_of(x)
    assert find_limit(histogram, Settings(observer="minmax")) == np.abs(x).max()
    limit = find_limit(histogram, Settings(observer="percentile"))
    exact = np.quantile(np.abs(x), 0.9999, method="inverted_cdf")
    assert exact <= limit <= exact + histogram.width
    assert find_limit(histogram_of(np.ones(5, np.float32)), Settings(observer="percentile")) == 1


def error_of(x: NDArray[np.float32], grid: Activations) -> float:
    codes = np.clip(np.rint(x.astype(np.float64) / grid.scale) + grid.zero, 0, 255)
    return float((((codes - grid.zero) * grid.scale - x) ** 2).sum())


@pytest.mark.parametrize("lopsided", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_mse_against_every_limit(kind: str, lopsided: bool) -> None:
    x = values(kind)
    histogram = histogram_of(x)
    settings = Settings(observer="mse", lopsided=lopsided)
    found = grid_to(histogram, find_limit(histogram, settings), lopsided)
    limits = [bins * histogram.width for bins in range(128, BINS + 1)]
    grids = [grid_to(histogram, min(limit, float(np.abs(x).max())), lopsided) for limit in limits]
    by_histogram = [squared_error(histogram, grid) for grid in grids]
    assert squared_error(histogram, found) <= 1.002 * min(by_histogram)
    for grid in (grids[0], grids[700], grids[-1], found):
        assert squared_error(histogram, grid) == pytest.approx(error_of(x, grid), rel=0.06)
    assert error_of(x, found) <= 1.03 * min(error_of(x, grid) for grid in grids[::16])
    assert error_of(x, found) <= 1.001 * error_of(x, grid_to(histogram, float(np.abs(x).max()), lopsided))


def test_the_error_of_a_bin_is_its_integral() -> None:
    histogram = histogram_of(np.array([0.3, 0.9, -0.2], dtype=np.float32))
    grid = Activations("static", scale=0.0137, zero=11)
    expected = 0.0
    for value in (0.3, 0.9, -0.2):
        low = np.floor(abs(value) / histogram.width) * histogram.width
        spread = np.sign(value) * (low + (np.arange(100_000) + 0.5) / 100_000 * histogram.width)
        expected += error_of(spread.astype(np.float64), grid) / 100_000
    assert squared_error(histogram, grid) == pytest.approx(expected, rel=1e-4)


def brute_entropy(counts: NDArray[np.int64], bins: int) -> float:
    """KL for one limit, level by level."""
    p = counts[:bins].astype(float)
    p[-1] += counts[bins:].sum()
    q = np.zeros(bins)
    for level in range(128):
        members = [i for i in range(bins) if i * 128 // bins == level]
        filled = [i for i in members if counts[i] > 0]
        for i in filled:
            q[i] = counts[members].sum() / len(filled)
    if ((q == 0) & (p > 0)).any():
        return np.inf
    p, q = p / p.sum(), q / q.sum()
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


@pytest.mark.parametrize("kind", ["normal", "gelu"])
def test_entropy_against_the_definition(kind: str) -> None:
    x = values(kind)
    histogram = histogram_of(x)
    last = int(np.flatnonzero(histogram.magnitudes)[-1]) + 1
    tried = {bins: brute_entropy(histogram.magnitudes, bins) for bins in (*range(128, last, 8), last)}
    found = find_limit(histogram, Settings(observer="entropy"))
    best = min(tried, key=lambda bins: tried[bins])
    assert found == pytest.approx(min(best * histogram.width, float(np.abs(x).max())))


def test_lopsided_inputs_get_a_zero_point() -> None:
    gelu = histogram_of(values("gelu"))
    assert gelu.low == pytest.approx(-0.17, abs=0.01)
    grid = grid_to(gelu, gelu.high, True)
    assert 0 < grid.zero < 20
    assert grid.scale == pytest.approx((gelu.high - gelu.low) / 255)
    assert grid_to(gelu, gelu.high, False) == Activations("static", scale=gelu.high / 127, zero=MIDDLE)
    assert grid_to(histogram_of(values("normal")), 2.0, True) == Activations("static", scale=2 / 127, zero=MIDDLE)
    assert grid_to(histogram_of(values("negative")), 9.0, True).zero == 255
    assert grid_to(histogram_of(np.abs(values("normal"))), 2.0, True).zero == 0
    for kind in ("gelu", "negative"):
        x = values(kind)
        one, other = (static_grid(histogram_of(x), Settings(lopsided=on)) for on in (True, False))
        assert error_of(x, one) < 0.4 * error_of(x, other)


def test_inputs_of_layers(tiny: Callable[..., Any]) -> None:
    model = tiny("gpt2")
    windows = np.random.default_rng(0).integers(3, 97, size=(3, 16))
    layer = model.transformer.h[1].mlp.c_fc
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    found = input_histograms(model, {"x": layer}, windows)["x"]
    handle.remove()
    expected = histogram_of(torch.cat(seen).flatten().numpy())
    np.testing.assert_array_equal(found.counts, expected.counts)
    assert found.magnitudes.sum() == 3 * 16 * 64
    assert not layer._forward_pre_hooks
    layer_norm = model.transformer.h[1].ln_2
    layer_norm.weight.data[3] = float("nan")
    with pytest.raises(NumericError, match=r"^x: inputs are not finite"):
        input_histograms(model, {"x": layer}, windows)
