"""The search of scales and codes: every instruction set to the bit of the reference, whatever the threads, and no worse than
the plain range."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nybble import kernels
from nybble.kernels import reference_search
from nybble.kernels.arguments import Floats, Found, Search

Walk = Callable[[], Iterator[str]]
TABLE = np.array([-9, -4, -2, -1, 0, 0.5, 3, 8, 20], np.float32)

HOW = {
    "shifted runs": Search(np.arange(16, dtype=np.float32), 32, 256, 0, 63, True, 1,
                           np.array([[15, 0], [14.5, 0.25], [17, 1]], np.float32), np.array([63, 60, 70], np.float32)),
    "shifted runs of 16": Search(np.arange(4, dtype=np.float32), 16, 256, 0, 15, True, 1,
                                 np.array([[3, 0], [2.5, 0.25], [4, 0.5]], np.float32), np.array([15, 13], np.float32)),
    "shifted alone": Search(np.arange(32, dtype=np.float32), 32, 32, 1, 1, True, 1,
                            np.array([[31, 0], [33, 0.5]], np.float32), np.ones(1, np.float32)),
    "runs": Search(np.arange(64, dtype=np.float32) - 32, 16, 256, -128, 127, False, 2,
                   np.array([[-32, 0], [31, 0], [-40, 0], [33, 0]], np.float32), np.array([-128, -110], np.float32)),
    "alone": Search(np.arange(256, dtype=np.float32) - 128, 32, 32, 1, 1, False, 2,
                    np.array([[127, 0], [-127, 0], [140, 0]], np.float32), np.ones(1, np.float32)),
    "table": Search(TABLE, 32, 256, -32, 31, False, 1, np.array([[20, 0], [-9, 0], [25, 0]], np.float32),
                    np.array([-32, -25], np.float32)),
    "short": Search(np.arange(8, dtype=np.float32) - 4, 3, 9, -8, 7, False, 1, np.array([[-4, 0], [3, 0]], np.float32),
                    np.array([-8], np.float32)),
}  # fmt: skip
many = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def by_reference(weight: Floats, how: Search, importance: Floats | None) -> Found:
    rows, columns = weight.shape
    shared, each = (rows, columns // how.run), (rows, columns // how.block)
    out = Found(
        np.empty((rows, columns), np.uint8), np.empty(shared, np.float16), np.empty(each, np.int8),
        np.empty(shared, np.float16) if how.shifted else None, np.empty(each, np.int8) if how.shifted else None,
    )  # fmt: skip
    reference_search.search(weight, importance, how, out)
    return out


def same(one: Found, other: Found, about: str) -> None:
    for name in Found._fields:
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) is (b is None)
        assert a is None or a.tobytes() == b.tobytes(), f"{name}, {about}"


def grid(found: Found, how: Search) -> tuple[Floats, Floats | None]:
    per = how.run // how.block
    scale = np.repeat(found.d.astype(np.float32), per, axis=1) * found.scale
    if found.dmin is None or found.offset is None:
        return scale, None
    return scale, -(np.repeat(found.dmin.astype(np.float32), per, axis=1) * found.offset)


def error(weight: Floats, codes: Any, scale: Floats, offset: Floats | None, how: Search, importance: Floats | None) -> float:
    value = how.levels.astype(np.float64)[codes] * np.repeat(scale.astype(np.float64), how.block, axis=1)
    if offset is not None:
        value = value + np.repeat(offset.astype(np.float64), how.block, axis=1)
    return float(((value - weight) ** 2 * (1 if importance is None else importance)).sum())


def weights(random: np.random.Generator, rows: int, columns: int) -> Floats:
    """Of all sizes, with zero rows, constant ones, outliers and signs of one kind among them."""
    weight = random.standard_t(3, (rows, columns)) * 2.0 ** random.integers(-20, 10, (rows, 1))
    kind = random.integers(0, 9, rows)
    weight[kind == 0] = 0
    weight[kind == 1] = np.abs(weight[kind == 1])
    weight[kind == 2] = -0.3
    weight[kind == 3, -1] = 1000
    weight[kind == 4] = np.round(weight[kind == 4], 1)
    weight[kind == 5] *= 1e-12
    return weight.astype(np.float32)


@pytest.mark.parametrize("name", HOW)
@many
@given(rows=st.integers(1, 9), runs=st.integers(1, 5), seed=st.integers(0, 2**32 - 1), important=st.sampled_from("-ka"))
def test_every_instruction_set_to_the_bit(name: str, rows: int, runs: int, seed: int, important: str, each_set: Walk) -> None:
    how, random = HOW[name], np.random.default_rng(seed)
    weight = weights(random, rows, runs * how.run)
    importance = None
    if important != "-":
        importance = random.gamma(0.3, 1, (1 if important == "k" else rows, weight.shape[1])).astype(np.float32) + np.float32(
            1e-9
        )
    wanted = by_reference(weight, how, importance)
    for isa in each_set():
        same(kernels.search(weight, how, importance), wanted, isa)


def test_threads_change_nothing(each_set: Walk) -> None:
    how = HOW["shifted runs"]
    weight = weights(np.random.default_rng(0), 400, 768)
    for isa in each_set():
        alone = kernels.search(weight, how, None, threads=1)
        for threads in (2, 3, 7):
            same(kernels.search(weight, how, None, threads), alone, isa)


@pytest.mark.parametrize("name", HOW)
def test_no_error_is_above_that_of_the_plain_range(name: str) -> None:
    """The plain range of every block, as float16 where it has a scale for itself; half a multiplier of slack in runs."""
    how, random = HOW[name], np.random.default_rng(1)
    weight = random.standard_normal((64, how.run)).astype(np.float32)
    importance = random.gamma(0.3, 1, (1, how.run)).astype(np.float32)
    view = weight.reshape(64, -1, how.block)
    if how.shifted:
        low = view.min(-1) if how.low == how.high else np.minimum(view.min(-1), 0)
        scale, offset = (view.max(-1) - low) / how.tries[0, 0], low
    else:
        scale = np.take_along_axis(view, np.abs(view).argmax(-1)[..., None], -1)[..., 0] / how.tries[0, 0]
        offset = None
    scale = scale.astype(np.float16).astype(np.float32)
    for given_importance in (None, importance):
        found = kernels.search(weight, how, given_importance)
        codes = kernels.nearest(weight, how.levels, how.block, scale, offset)
        plain = error(weight, codes, scale, offset, how, given_importance)
        searched = error(weight, found.codes, *grid(found, how), how, given_importance)
        assert searched < 0.97 * plain
        assert searched > 0.2 * plain


def test_codes_are_the_nearest_to_what_was_found() -> None:
    random = np.random.default_rng(2)
    for how in HOW.values():
        weight = weights(random, 9, how.run * 2)
        found = kernels.search(weight, how)
        scale, offset = grid(found, how)
        np.testing.assert_array_equal(found.codes, kernels.nearest(weight, how.levels, how.block, scale, offset))


def test_values_on_the_grid_are_found_exactly(each_set: Walk) -> None:
    """Weights that scales and codes of the format can be, with every level in use."""
    random = np.random.default_rng(3)
    how = HOW["shifted runs"]
    codes = random.integers(0, 16, (8, 8, 32))
    codes[..., 0], codes[..., 1] = 0, 15
    m, n = random.integers(40, 64, (8, 8, 1)), random.integers(40, 64, (8, 8, 1))
    m[:, 0] = n[:, 0] = 63
    weight = (2.0**-10 * m * codes - 2.0**-7 * n).astype(np.float32).reshape(8, 256)
    for _ in each_set():
        found = kernels.search(weight, how)
        assert error(weight, found.codes, *grid(found, how), how, None) < 1e-9 * float((weight**2).sum())


@pytest.mark.parametrize("levels", [np.arange(16) - 8.0, np.arange(256) - 128.0, np.arange(2.0), TABLE, np.array([-1.5, 7])])
@many
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 90),
    block=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
    shifts=st.booleans(),
)
def test_nearest_levels(levels: Any, rows: int, columns: int, block: int, seed: int, shifts: bool, each_set: Walk) -> None:
    random = np.random.default_rng(seed)
    shape = (rows, -(-columns // block))
    scale = (random.normal(size=shape) * 2.0 ** random.integers(-30, 5, shape)).astype(np.float32)
    scale[random.random(shape) < 0.1] = 0
    offset = random.normal(size=shape).astype(np.float32) if shifts else None
    levels = levels.astype(np.float32)
    weight = (random.integers(-40, 40, (rows, columns)) / 2 * np.repeat(scale, block, axis=1)[:, :columns]).astype(np.float32)
    weight[random.random(weight.shape) < 0.5] += np.float32(random.normal())
    wanted = np.empty(weight.shape, np.uint8)
    reference_search.nearest(weight, levels, block, scale, offset, wanted)
    for isa in each_set():
        for threads in (1, 3):
            got = kernels.nearest(weight, levels, block, scale, offset, threads)
            np.testing.assert_array_equal(got, wanted, err_msg=isa)
    wide = np.repeat(scale.astype(np.float64), block, axis=1)[:, :columns]
    less = 0 if offset is None else np.repeat(offset.astype(np.float64), block, axis=1)[:, :columns]
    away = np.abs(levels[None, None] * wide[..., None] + np.asarray(less)[..., None] - weight[..., None])
    chosen = np.take_along_axis(away, wanted[..., None].astype(np.int64), -1)[..., 0]
    size = np.abs(weight) + np.abs(less) + np.abs(wide) * np.abs(levels).max()
    assert (chosen <= away.min(-1) + size * 2.0**-20).all()


def test_halfway_between_two_levels(each_set: Walk) -> None:
    one = np.ones((1, 1), np.float32)
    for _ in each_set():
        whole = kernels.nearest(
            np.array([[-0.5, 0.5, 1.5, 2.5, 99, -99]], np.float32), np.arange(8, dtype=np.float32) - 2, 6, one
        )
        assert (whole - 2.0).tolist() == [[0, 0, 2, 2, 5, -2]]
        table = kernels.nearest(np.array([[-6.5, -3, 0.25, 14, 14.001, 99, -99]], np.float32), TABLE, 7, one)
        assert table.tolist() == [[0, 1, 4, 7, 8, 8, 0]]


def test_no_rows_and_no_columns() -> None:
    how = HOW["shifted runs"]
    assert kernels.search(np.empty((0, 256), np.float32), how).codes.shape == (0, 256)
    assert kernels.search(np.empty((3, 0), np.float32), how).d.shape == (3, 0)
    assert kernels.nearest(np.empty((2, 0), np.float32), how.levels, 32, np.empty((2, 0), np.float32)).shape == (2, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": np.arange(1, dtype=np.float32)}, "levels must be 2 to 256 ascending numbers, got 1"),
        ({"levels": np.array([1, 0, 2], np.float32)}, "ascending"),
        ({"levels": np.arange(17, dtype=np.float32) / 2}, "must be at most 16, got 17"),
        ({"levels": np.array([0, 1, 3], np.float32)}, "shifted levels must be whole numbers one apart"),
        ({"block": 0}, "block must be a whole number from 1 to 256, got 0"),
        ({"block": 10}, "run must be 1 to 16 whole blocks of 10, got 256"),
        ({"block": 8}, "run must be 1 to 16 whole blocks of 8, got 256"),
        ({"run": 512}, "run must be a whole number from 1 to 256, got 512"),
        ({"low": -129}, "low must be a whole number from -128 to 127, got -129"),
        ({"high": -1}, "high must be a whole number from 0 to 127, got -1"),
        ({"tries": np.zeros((0, 2), np.float32)}, r"tries must be finite pairs .* got shape \(0, 2\)"),
        ({"tries": np.zeros((1, 2), np.float32)}, "whose first is not 0"),
        ({"plains": 4}, "plains must be a whole number from 1 to 3, got 4"),
        ({"dividers": np.zeros(1, np.float32)}, "dividers must be finite and not 0"),
    ],
)
def test_a_search_that_makes_no_sense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.search(np.zeros((2, 512), np.float32), HOW["shifted runs"]._replace(**change))


def test_arrays_that_do_not_fit() -> None:
    how, weight = HOW["shifted runs"], np.zeros((2, 512), np.float32)
    with pytest.raises(ValueError, match="weight must have rows of whole runs of 256 columns, got 300"):
        kernels.search(weight[:, :300].copy(), how)
    with pytest.raises(ValueError, match="weight must be float32, got float64"):
        kernels.search(weight.astype(np.float64), how)
    with pytest.raises(ValueError, match=r"importance must have shape \(1, 512\) or \(2, 512\), got \(1, 256\)"):
        kernels.search(weight, how, weight[:1, :256].copy())
    with pytest.raises(ValueError, match=r"scale must have shape \(2, 16\), got \(2, 15\)"):
        kernels.nearest(weight, how.levels, 32, np.ones((2, 15), np.float32))
    with pytest.raises(ValueError, match="threads must be a whole number from 1"):
        kernels.search(weight, how, threads=0)


def test_the_extension_itself_refuses_arrays_of_the_wrong_size(native: Any) -> None:
    how, weight = HOW["runs"], np.zeros((2, 512), np.float32)
    codes, d, m = np.zeros((2, 512), np.uint8), np.zeros((2, 2), np.uint16), np.zeros((2, 32), np.int8)
    for wrong in ((codes[:1].copy(), d, m), (codes, d[:, :1].copy(), m), (codes, d, m[:, :16].copy())):
        with pytest.raises(ValueError, match="an output has the wrong shape"):
            native.search(weight, None, *how, *wrong, None, None, 1)
    with pytest.raises(ValueError, match="importance has the wrong shape"):
        native.search(weight, weight[:, :16].copy(), *how, codes, d, m, None, None, 1)
    with pytest.raises(ValueError, match="dmin and n belong to shifted levels"):
        native.search(weight, None, *how, codes, d, m, d, None, 1)
    with pytest.raises(ValueError, match="runs must be at most 16 whole blocks"):
        native.search(weight, None, *how._replace(block=8), codes, d, m, None, None, 1)
    with pytest.raises(ValueError, match="an array has the wrong shape"):
        native.nearest(weight, how.levels, 32, np.ones((2, 15), np.float32), None, codes, 1)
