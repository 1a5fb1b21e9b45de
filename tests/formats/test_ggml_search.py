"""What is searched for ggml's formats, and grids of scales of scales that come from elsewhere."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nybble import kernels
from nybble.files.safetensors import SafetensorsFile
from nybble.formats import parse_format
from nybble.formats.base import spread
from nybble.formats.ggml_search import SHAPES, search_of, weigh
from nybble.kernels import reference_search

RUNS = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs")
ALONE = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "mxfp4")
PARTIAL = Path(__file__).parents[3] / "shared" / "data" / "models" / "gpt2-small-attention-partial" / "model.safetensors"
Weight = NDArray[np.float32]
few = settings(derandomize=True, max_examples=60, deadline=None)


def normal(shape: tuple[int, int], seed: int = 0) -> Weight:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def loss(spec: str, weight: Weight, found: Any, importance: Weight | None = None) -> float:
    error = parse_format(spec).decode(*found).astype(np.float64) - weight
    return float((error**2 * (1 if importance is None else importance)).sum())


def some_params(spec: str, rows: int, runs: int, seed: int) -> dict[str, Any]:
    """Params that a file may hold, halves of both signs and all sizes among them."""
    random, stored = np.random.default_rng(seed), {}
    for name, (dtype, shape) in parse_format(spec).storage((rows, runs * 256)).items():
        if dtype == "float16":
            stored[name] = (random.normal(size=shape) * 2.0 ** random.integers(-20, 8, shape)).astype(np.float16)
        elif name != "codes":
            stored[name] = random.integers(0, 256, shape, dtype=np.uint8).view(dtype)
    return stored


@pytest.mark.parametrize("spec", RUNS)
@few
@given(rows=st.integers(1, 4), runs=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
def test_a_grid_that_the_format_holds_is_kept_to_the_bit(spec: str, rows: int, runs: int, seed: int) -> None:
    fmt = parse_format(spec)
    scale, offset = fmt.grid(some_params(spec, rows, runs, seed))
    again = fmt.from_grid(scale.astype(np.float64), None if offset is None else offset.astype(np.float64))
    kept, kept_offset = fmt.grid(again)
    np.testing.assert_array_equal(kept, scale)
    assert (kept_offset is None) is (offset is None)
    if offset is not None:
        np.testing.assert_array_equal(kept_offset, offset)
    stored = fmt.to_storage(np.zeros((rows, runs * 256), np.uint8), again)
    assert {name: (array.dtype.name, array.shape) for name, array in stored.items()} == fmt.storage((rows, runs * 256))


@pytest.mark.parametrize("spec", RUNS)
def test_a_tuned_grid_becomes_the_nearest_that_is_stored(spec: str) -> None:
    """Two sides: within half of the smallest multiple that serves the largest, and not exact."""
    fmt, random = parse_format(spec), np.random.default_rng(1)
    blocks = 256 // fmt.block(256)
    scale = random.uniform(0.2, 1, (50, 3 * blocks)) * (1 if fmt.shifted else random.choice([-1, 1], (50, 3 * blocks)))
    offset = -random.uniform(0, 1, scale.shape) if fmt.shifted else None
    found = fmt.grid(fmt.from_grid(scale, offset))
    most = {"q2_k": 15, "q3_k": 32, "q6_k": 128, "iq4_xs": 32}.get(spec, 63)
    for wanted, got in zip((scale, offset), found, strict=True):
        if wanted is None or got is None:
            assert wanted is got is None
            continue
        error, largest = np.abs(got - wanted), np.abs(wanted).reshape(50, 3, blocks).max(-1).repeat(blocks, 1)
        assert (error <= largest / most * 1.05).all()
        nearest = largest / most / 12**0.5  # what evenly spread remainders come to
        assert 0.5 * nearest.mean() < np.sqrt((error**2).mean()) < nearest.mean()


def test_offsets_above_zero_have_no_place_but_those_of_one_sign_have() -> None:
    fmt = parse_format("q4_k")
    ones = np.ones((1, 8))
    assert fmt.grid(fmt.from_grid(ones, ones * 0.5))[1] == pytest.approx(0.5 * ones)
    mixed = fmt.grid(fmt.from_grid(ones, np.array([[-4.0, 0.5, -1, -2, -3, 0.25, 0, -4]])))[1]
    assert mixed is not None
    assert mixed[0] == pytest.approx([-4, 0, -1, -2, -3, 0, 0, -4], abs=0.04)


@pytest.mark.parametrize("spec", [*RUNS, *ALONE])
def test_importance_counts_by_its_ratios_within_a_run(spec: str) -> None:
    """Times any power of two, and in every run times another one: the same bytes."""
    fmt, weight = parse_format(spec), normal((5, 768))
    importance = np.random.default_rng(2).gamma(0.5, 1, 768).astype(np.float32)
    codes, params = fmt.round(weight, importance)
    for factor in (2.0**40, 2.0**-60, np.repeat([1, 2.0**20, 2.0**-30], 256)):
        again, params_again = fmt.round(weight, (importance * factor).astype(np.float32))
        np.testing.assert_array_equal(again, codes)
        for name, array in params.items():
            np.testing.assert_array_equal(params_again[name], array)


@pytest.mark.parametrize("spec", [*RUNS, *ALONE])
def test_importance_of_every_weight(spec: str) -> None:
    fmt, weight = parse_format(spec), normal((6, 512), 3)
    importance = np.random.default_rng(4).gamma(0.3, 1, weight.shape).astype(np.float32)
    each = loss(spec, weight, fmt.round(weight, importance), importance)
    by_column = loss(spec, weight, fmt.round(weight, importance.mean(0)), importance)
    assert each < 0.99 * by_column
    assert each < 0.95 * loss(spec, weight, fmt.round(weight), importance)


@pytest.mark.parametrize("spec", RUNS)
def test_columns_that_never_counted(spec: str) -> None:
    """A dead block, a dead run, and a tensor of them: fitted as if all columns counted alike, within what d allows them."""
    fmt, weight = parse_format(spec), normal((4, 768))
    importance = np.ones(768, np.float32)
    importance[32:64], importance[256:512] = 0, 0
    codes, params = fmt.round(weight, importance)
    error = np.abs(fmt.decode(codes, params) - weight)
    even = np.abs(fmt.decode(*fmt.round(weight)) - weight)
    for part in (slice(32, 64), slice(256, 512)):
        assert error[:, part].mean() < 1.2 * even[:, part].mean()
    codes, params = fmt.round(weight, np.zeros(768, np.float32))
    assert np.abs(fmt.decode(codes, params) - weight).mean() < 1.05 * even.mean()


def test_importance_as_the_search_takes_it() -> None:
    shape = SHAPES["q4_k"]
    given_one = np.ones(512, np.float32)
    given_one[:32], given_one[32:64], given_one[64] = 0, 3e-20, 6
    found = weigh(given_one, (3, 512), shape)
    assert found.shape == (1, 512)
    assert found.dtype == np.float32
    assert found[0, 64] == 0.75
    assert (found[0, :64] == 2.0**-20).all()  # no block is without importance, and 5e-21 of the largest is none
    assert (found[0, 65:256] == 0.125).all()
    assert (found[0, 256:] == 0.5).all()
    assert weigh(np.zeros((3, 512), np.float32), (3, 512), shape).tolist() == np.ones((3, 512)).tolist()


class Watched(reference_search._Runs):
    """Keeps the error of every run after each step."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.errors: list[Any] = []

    def refit(self, found: Any, anew: bool, stretch: Any) -> None:
        super().refit(found, anew, stretch)
        self.errors.append(reference_search.total(found.sums.e))

    def move(self, found: Any, i: Any, j: Any) -> None:
        super().move(found, i, j)
        self.errors.append(reference_search.total(found.sums.e))


@pytest.mark.parametrize("name", SHAPES)
def test_no_step_of_the_refinement_raises_the_error(name: str) -> None:
    shape, random = SHAPES[name], np.random.default_rng(5)
    blocks = shape.run // shape.block
    w = random.standard_t(3, (blocks, shape.block, 200)).astype(np.float32)
    h = random.gamma(0.3, 1, w.shape).astype(np.float32)
    watched = Watched(w, h, search_of(name, True))
    found = watched.search()
    errors = np.array(watched.errors)
    assert len(errors) == (3 if blocks == 1 else 11 if not shape.shifted else 15)
    assert (np.diff(errors, axis=0) <= errors[:-1] * 1e-6).all()
    assert blocks == 1 or errors[-1].sum() < 0.998 * errors[0].sum()
    value = found.d * found.m, -(found.dmin * found.n)  # what is kept is what the error is of
    again = watched.sums(*value)
    np.testing.assert_array_equal(again.e, found.sums.e)


@pytest.mark.parametrize("spec", [*RUNS, "iq4_nl"])
def test_real_weights_end_well_below_the_plain_range(spec: str) -> None:
    if not PARTIAL.exists():
        pytest.skip("the real tensors of shared/data are not here")
    fmt, file = parse_format(spec), SafetensorsFile(PARTIAL)
    for name in ("h.0.attn.c_attn.weight", "h.11.attn.c_proj.weight"):
        weight = np.ascontiguousarray(np.asarray(file.read(name), np.float32).T)
        view = weight.reshape(len(weight), -1, fmt.block(768)).astype(np.float64)
        if fmt.shifted:
            low = np.minimum(view.min(-1), 0)
            plain = fmt.from_grid((view.max(-1) - low) / fmt.levels[-1], low)
        else:
            largest = np.take_along_axis(view, np.abs(view).argmax(-1)[..., None], -1)[..., 0]
            plain = fmt.from_grid(largest / fmt.levels[0], None)
        before = loss(spec, weight, (fmt.encode(weight, plain), plain))
        after = loss(spec, weight, fmt.round(weight))
        assert 0.3 * before < after < 0.93 * before


def test_mxfp4_with_importance_moves_exponents_where_that_pays() -> None:
    fmt, weight = parse_format("mxfp4"), normal((40, 256), 6)
    importance = np.random.default_rng(7).gamma(0.3, 1, 256).astype(np.float32)
    plain, found = fmt.fit(weight), fmt.fit(weight, importance)
    moved = found["exponent"].astype(int) - plain["exponent"]
    assert set(np.unique(moved)) <= {-2, -1, 0, 1}
    assert 0.1 < (moved != 0).mean() < 0.9

    def of_blocks(params: dict[str, Any]) -> NDArray[np.float64]:
        error = fmt.decode(fmt.encode(weight, params), params).astype(np.float64) - weight
        return (error**2 * importance).reshape(40, 8, 32).sum(-1)

    assert (of_blocks(found) <= of_blocks(plain)).all()
    edges = np.zeros((1, 96), np.float32)
    edges[0, 5], edges[0, 40], edges[0, 70] = 2.0**-149, np.finfo(np.float32).max, 1
    codes, params = fmt.round(edges, np.ones(96, np.float32))
    assert np.isfinite(fmt.decode(codes, params)).all()


@pytest.mark.parametrize("spec", ALONE)
def test_the_exponent_or_scale_of_a_grid_is_the_nearest(spec: str) -> None:
    fmt, random = parse_format(spec), np.random.default_rng(8)
    scale = random.uniform(0.001, 2, (4, 7))
    offset = random.normal(size=(4, 7)) if fmt.shifted else None
    found, shift = fmt.grid(fmt.from_grid(scale, offset))
    if spec == "mxfp4":
        candidates = 2.0 ** np.arange(-12, 4)
        nearest = candidates[np.abs(candidates - scale[..., None]).argmin(-1)]
        np.testing.assert_array_equal(found, nearest)
    else:
        np.testing.assert_array_equal(found, scale.astype(np.float16).astype(np.float32))
    if offset is not None:
        np.testing.assert_array_equal(shift, offset.astype(np.float16).astype(np.float32))


def test_codes_with_scales_of_zero_and_infinite_ones() -> None:
    """A file may hold any half: decoding says what it stands for, and nothing warns or breaks."""
    for spec in (*RUNS, *ALONE):
        fmt = parse_format(spec)
        params: dict[str, Any] = {}
        for name, (dtype, shape) in fmt.storage((1, 256)).items():
            if name != "codes":
                params[name] = np.zeros(shape, dtype)
                if dtype == "float16":
                    params[name][:] = np.inf
        scale, _ = fmt.grid(params)
        assert scale.shape == fmt.blocks((1, 256))
        zero = {name: np.zeros_like(array) for name, array in params.items()}
        codes = fmt.encode(np.ones((1, 256), np.float32), zero)
        assert np.isfinite(fmt.decode(codes, zero)).all()


def test_blocks_see_their_own_multipliers() -> None:
    """Multipliers as stored bytes: of q4_k six bits each, least significant first."""
    fmt = parse_format("q4_k")
    numbers = np.array([[1, 2, 3, 4, 5, 6, 7, 8]], np.uint8)
    word = sum(int(value) << 6 * i for i, value in enumerate(numbers[0]))
    stored = np.frombuffer(struct.pack("<Q", word)[:6], np.uint8)[None]
    np.testing.assert_array_equal(kernels.pack(numbers, 6), stored)
    one = np.ones((1, 1), np.float16)
    scale, offset = fmt.grid({"d": one, "dmin": one, "scale": stored.copy(), "min": stored.copy()})
    np.testing.assert_array_equal(scale, numbers)
    assert offset is not None
    np.testing.assert_array_equal(spread(-offset, 256, 32)[0, ::32], numbers[0])
