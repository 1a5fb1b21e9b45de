"""The loops that methods are made of, against plain float64 arithmetic, brute force and identities."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nybble.calibrate.fisher import fisher_draw
from nybble.calibrate.statistics import Statistics, Sums
from nybble.errors import NumericError
from nybble.formats import parse_format
from nybble.methods import parse_method
from nybble.methods.steps.choose import choose
from nybble.methods.steps.factor import factorize, loss_of, order_of
from nybble.methods.steps.grid import Chosen, Snap, decode, grid_of, params_of
from nybble.methods.steps.refinement import refine
from nybble.methods.steps.rounding import round_with_feedback

FORMATS = ("int8:channel", "int4:channel", "int4:g32", "int4:g32,asym", "int3:g64", "int2:g32", "nf4:g64", "fp4:g32")
KINDS = ("plain", "few samples", "dead columns", "ill-conditioned", "correlated")


pytestmark = pytest.mark.usefixtures("one_thread")


def problem(kind: str, seed: int, rows: int = 8, columns: int = 96) -> tuple[NDArray[np.float32], torch.Tensor]:
    """(weight float32 [N, K], Hessian float64 [K, K]) of one kind."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, columns)).astype(np.float32)
    tokens = columns // 3 if kind == "few samples" else 4 * columns
    x = rng.standard_normal((tokens, columns))
    if kind == "dead columns":
        x[:, rng.permutation(columns)[: columns // 8]] = 0
    if kind == "ill-conditioned":
        x *= np.logspace(0, -5, columns)[rng.permutation(columns)]
    if kind == "correlated":
        x = x @ (np.eye(columns) + 0.3 * rng.standard_normal((columns, columns)))
    return weight, torch.from_numpy(2 / tokens * (x.T @ x))


def gptq_by_inverse(weight: NDArray[np.float64], hessian: NDArray[np.float64], scale: NDArray[np.float64], bits: int, damp: float,
                    order: NDArray[np.int64]) -> NDArray[np.float64]:  # fmt: skip
    """GPTQ as its paper has it: the upper Cholesky factor of the inverse, the rest of the row corrected after every column."""
    h, w = hessian.copy(), weight.copy()
    dead = np.diag(h) == 0
    h[dead, dead] = np.diag(h)[~dead].mean()
    h[np.diag_indices_from(h)] += damp * np.diag(hessian)[~dead].mean()
    h, w = h[np.ix_(order, order)], w[:, order]
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    codes = np.empty_like(w)
    half = 2 ** (bits - 1)
    for j in range(w.shape[1]):
        codes[:, j] = np.clip(np.rint(w[:, j] / scale), -half, half - 1)
        error = (w[:, j] - codes[:, j] * scale) / upper[j, j]
        w[:, j + 1 :] -= np.outer(error, upper[j, j + 1 :])
    result = np.empty_like(codes)
    result[:, order] = codes + half
    return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["natural", "activation"])
def test_feedback_equals_gptq_by_the_inverse(kind: str, order: str) -> None:
    """Codes of 20 problems a case, 200 in all; a code may differ only where a weight lies midway between two."""
    fmt = parse_format("int4:channel")
    for seed in range(20):
        weight, hessian = problem(kind, seed)
        params = fmt.fit(weight)
        grid = grid_of(fmt, params)
        factor = factorize(hessian, 0.01, order, fmt.block(weight.shape[1]))
        got = round_with_feedback(torch.from_numpy(weight.astype(np.float64)), factor, fmt, grid, "range", Snap(fmt))
        scale = params["scale"].astype(np.float64)[:, 0]
        wide = weight.astype(np.float64)
        expected = gptq_by_inverse(wide, hessian.numpy(), scale, 4, factor.damping, factor.order.numpy())
        np.testing.assert_array_equal(got.codes.numpy(), expected.astype(np.uint8))


@pytest.mark.parametrize("spec", FORMATS)
def test_the_loss_of_the_loop_is_the_sum_over_pivots(spec: str) -> None:
    fmt = parse_format(spec)
    weight, hessian = problem("correlated", 5)
    wide = torch.from_numpy(weight.astype(np.float64))
    factor = factorize(hessian, 0.01, "groups", fmt.block(96))
    snap = Snap(fmt)
    grid = grid_of(fmt, fmt.fit(weight)) if fmt.block(96) == 96 else None
    got = round_with_feedback(wide, factor, fmt, grid, "range", snap)
    error = decode(fmt, got, snap) - wide
    damped = hessian + factor.damping * hessian.diagonal().mean() * torch.eye(96).double()
    by_pivots = (factor.pivots * (error[:, factor.order] @ factor.upper) ** 2).sum(1)
    torch.testing.assert_close(by_pivots, loss_of(error, damped), rtol=1e-9, atol=0)


@pytest.mark.parametrize("spec", FORMATS)
def test_a_diagonal_hessian_gives_rounding_to_nearest(spec: str) -> None:
    fmt = parse_format(spec)
    weight, _ = problem("plain", 1)
    hessian = torch.diag(torch.linspace(0.1, 2, 96).double())
    for order in ("natural", "groups"):
        factor = factorize(hessian, 0.01, order, fmt.block(96))
        grid = grid_of(fmt, fmt.fit(weight)) if fmt.block(96) == 96 else None
        got = round_with_feedback(torch.from_numpy(weight.astype(np.float64)), factor, fmt, grid, "range", Snap(fmt))
        np.testing.assert_array_equal(got.codes.numpy(), fmt.encode(weight, fmt.fit(weight)))


@pytest.mark.parametrize("spec", FORMATS)
@pytest.mark.parametrize("kind", ["few samples", "dead columns", "correlated"])
def test_refinement_never_raises_the_loss_and_ends(spec: str, kind: str) -> None:
    fmt = parse_format(spec)
    weight, hessian = problem(kind, 7)
    wide = torch.from_numpy(weight.astype(np.float64))
    snap, params = Snap(fmt), fmt.fit(weight)
    scale, offset = grid_of(fmt, params)
    chosen = Chosen(torch.from_numpy(fmt.encode(weight, params)), scale, offset)
    losses = [float(loss_of(decode(fmt, chosen, snap) - wide, hessian).sum())]
    for _ in range(6):
        chosen = refine(wide, hessian, fmt, chosen, 1, snap)
        losses.append(float(loss_of(decode(fmt, chosen, snap) - wide, hessian).sum()))
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(losses))
    assert losses[-1] < 0.9 * losses[0]
    stored = fmt.grid(params_of(fmt, chosen.scale, chosen.offset))[0]
    np.testing.assert_array_equal(stored.astype(np.float64), chosen.scale.numpy())


def test_refinement_comes_near_the_best_of_all_codes() -> None:
    """Six columns of four levels: all 4096 rows of codes are tried, with the scale that refinement ended with."""
    fmt = parse_format("int2:channel")
    snap = Snap(fmt)
    ratios = []
    for seed in range(40):
        weight, hessian = problem("correlated", seed, rows=1, columns=6)
        wide = torch.from_numpy(weight.astype(np.float64))
        params = fmt.fit(weight, np.ones(6, np.float32))
        scale, offset = grid_of(fmt, params)
        start = Chosen(torch.from_numpy(fmt.encode(weight, params)), scale, offset)
        got = refine(wide, hessian, fmt, start, 20, snap)
        loss = float(loss_of(decode(fmt, got, snap) - wide, hessian)[0])
        codes = torch.tensor(list(itertools.product(range(4), repeat=6)), dtype=torch.uint8)
        every = loss_of(snap.value(codes, got.scale, None) - wide, hessian)
        ratios.append(loss / float(every.min()))
    assert min(ratios) >= 1 - 1e-9
    assert np.median(ratios) < 1.3


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.sampled_from([0.3, 1.0]))
def test_the_target_is_the_least_of_the_output_error(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    y = torch.from_numpy(rng.standard_normal((64, 12)))
    x = y + 0.2 * torch.from_numpy(rng.standard_normal((64, 12)))
    weight = torch.from_numpy(rng.standard_normal((5, 12)))
    sums = Sums()
    sums.add_window(y, x, [None])
    stats = sums.finish()
    target = stats.target(weight, 0, share, 0.0)
    if share == 1.0:
        for _ in range(3):
            q = torch.from_numpy(rng.standard_normal((5, 12)))
            outside = 2 / 64 * ((x @ weight.T - y @ q.T) ** 2).sum()
            inside = loss_of(q - target, stats.moments[0]).sum()
            at_target = 2 / 64 * ((x @ weight.T - y @ target.T) ** 2).sum()
            torch.testing.assert_close(outside - at_target, inside, rtol=1e-4, atol=1e-6)
    else:
        full = stats.target(weight, 0, 1.0, 0.0)
        torch.testing.assert_close(target - weight, share * (full - weight))


def test_moments_do_not_depend_on_how_they_are_cut() -> None:
    rng = np.random.default_rng(0)
    y = torch.from_numpy(rng.standard_normal((40, 1100)).astype(np.float32))
    whole = Sums()
    whole.add_window(y, None, [None])
    found = whole.finish().moments[0]
    torch.testing.assert_close(found, 2 / 40 * (y.double().T @ y.double()), rtol=1e-5, atol=1e-5)
    assert torch.equal(found, found.T)
    assert torch.equal(found, whole.finish().moments[0])  # finishing changes nothing
    one, two = Sums(), Sums()
    one.add_window(y[:20], None, [None])
    one.add_window(y[20:], None, [None])
    two.add_window(y[:20], None, [None])
    more = Sums()
    more.add_window(y[20:], None, [None])
    torch.testing.assert_close(one.finish().moments[0], two.add(more).finish().moments[0], rtol=1e-5, atol=1e-6)
    ones = Sums()
    ones.add_window(y[:, :8], None, [torch.ones(40), torch.arange(40).float()])
    plain, weighted = ones.finish().moments
    torch.testing.assert_close(plain, 2 / 40 * (y[:, :8].T @ y[:, :8]).double(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(plain, weighted)


def test_orders_keep_blocks_whole() -> None:
    diagonal = torch.tensor([1.0, 9, 2, 3, 8, 4, 7, 5, 6, 10])
    assert order_of(diagonal, "natural", 4).tolist() == list(range(10))
    assert order_of(diagonal, "activation", 4).tolist() == [9, 1, 4, 6, 8, 7, 5, 3, 2, 0]
    assert order_of(diagonal, "groups", 4).tolist() == [9, 8, 1, 3, 2, 0, 4, 6, 7, 5]


def test_damping_climbs_until_the_hessian_can_be_factored() -> None:
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).double()
    factor = factorize(x.T @ x, 0.0, "natural", 32)
    assert factor.damping > 0
    torch.testing.assert_close(factor.upper.triu(), factor.upper)
    assert factorize(torch.eye(4).double(), 0.0, "natural", 4).damping == 0
    dead = torch.diag(torch.tensor([1.0, 0, 2, 0]).double())
    assert factorize(dead, 0.01, "natural", 4).dead == 2
    with pytest.raises(NumericError, match="NaN or infinity"):
        factorize(torch.full((4, 4), float("nan")).double(), 0.01, "natural", 4)
    with pytest.raises(NumericError, match="not positive definite"):
        factorize(torch.tensor([[1.0, 1e9], [1e9, 1.0]]).double(), 0.01, "natural", 2)


def test_a_column_that_calibration_never_activated_keeps_its_rounded_value() -> None:
    fmt = parse_format("int4:g32")
    weight, hessian = problem("dead columns", 3)
    dead = (hessian.diagonal() == 0).numpy()
    tensor, account = choose(weight, fmt, parse_method("gptq").settings, Statistics([hessian]))
    assert account.dead_columns == int(dead.sum()) > 0
    scale = np.repeat(tensor.params["scale"].astype(np.float32), 32, axis=1)
    error = np.abs(tensor.decode() - weight)
    inside = np.abs(weight) <= 7 * scale
    assert (error[:, dead] <= scale[:, dead] / 2 * 1.0001)[inside[:, dead]].all()


@pytest.mark.parametrize("method", ["gptq", "best:tune=0"])
@pytest.mark.parametrize("spec", ["int8:channel", "int4:g32,asym", "int2:g32", "int4:tensor", "nf4:g64,dq"])
@pytest.mark.parametrize("kind", KINDS)
def test_never_worse_than_rounding_to_nearest(method: str, spec: str, kind: str) -> None:
    weight, hessian = problem(kind, 11)
    tensor, account = choose(weight, parse_format(spec), parse_method(method).settings, Statistics([hessian]))
    error = torch.from_numpy(tensor.decode().astype(np.float64) - weight)
    energy = loss_of(torch.from_numpy(weight.astype(np.float64)), hessian).sum()
    torch.testing.assert_close(loss_of(error, hessian).sum() / energy, torch.tensor(account.loss).double(), rtol=1e-4, atol=1e-12)
    assert account.loss <= account.loss_of_rounding * (1 + 1e-9)


def test_rows_in_groups_follow_their_own_hessian() -> None:
    weight, one = problem("correlated", 2)
    _, two = problem("correlated", 3)
    fmt, how = parse_format("int3:g32"), parse_method("gptq").settings
    both, _ = choose(weight, fmt, how, Statistics([one, two]))
    first, _ = choose(weight[:4], fmt, how, Statistics([one]))
    second, _ = choose(weight[4:], fmt, how, Statistics([two]))
    np.testing.assert_array_equal(both.codes, np.concatenate([first.codes, second.codes]))


def test_fisher_draws_have_the_covariance_of_the_logits() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    generator = torch.Generator().manual_seed(0)
    v = fisher_draw(p.expand(400_000, 4), p.sqrt().expand(400_000, 4), generator)
    torch.testing.assert_close(v.T @ v / len(v), torch.diag(p) - torch.outer(p, p), rtol=0, atol=3e-3)
